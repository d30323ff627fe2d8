"""Text towers of contrastive language–image pre-training: captions in, one vector a caption out."""
