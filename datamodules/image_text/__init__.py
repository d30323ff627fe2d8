"""Images with captions: sets of image–text pairs, and captions made of class names."""
