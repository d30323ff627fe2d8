"""Text towers and the tokenizer of open_clip, an optional package: `pip install "farshot[text]"`."""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.text.tower import TextTower, check_counts, optional_package

_VOCABULARY = 49408  # CLIP's byte pairs, start and end
# Settings of towers with another tokenizer, other attention or more than one output.
_FOREIGN = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "no_causal_mask", "multimodal_cfg"}


class OpenClipText(TextTower):
    """The text tower of an open_clip model, by default with random weights, and CLIP's byte-pair tokenizer.

    The package holds architectures and vocabulary (49,408 tokens, lower case), so only `pretrained` downloads. The
    tower ends before open_clip's own projection, because the task has one: `width` is 512 for RN50 and ViT-B-32.

    Args:
        model: A model of `open_clip.list_models()` whose text tower is CLIP's transformer.
        context: Longest number of tokens, start and end included, 3 or more.
        pretrained: A tag of `open_clip.list_pretrained()` to start from; None for random weights.

    Raises:
        ModelError: The package is not installed; or it has no such model or weights, or cannot download them; or the
            model's text tower is of another kind.
    """

    def __init__(self, model: str = "RN50", context: int = 77, pretrained: str | None = None) -> None:
        check_counts(context=context)
        if context < 3:
            raise ModelError(f"context is {context}", valid="3 or more: start, a word, end")
        library = optional_package("open_clip")
        _check_model(library, model)
        tags = library.list_pretrained_tags_by_model(model)
        if pretrained is not None and pretrained not in tags:
            raise ModelError(f"open_clip has no weights {pretrained!r} of {model}", valid=tags or "none for this model")
        with _no_root_handler():
            try:
                both = library.create_model(
                    model, pretrained=pretrained, force_custom_text=True, force_context_length=context
                )
            except RuntimeError as error:
                raise ModelError(
                    f"open_clip cannot load {model} with weights {pretrained!r}: {str(error).splitlines()[0]}",
                    hint="downloads stay in the cache: fill it where there is a network, then name it in HF_HOME",
                ) from error
        super().__init__(both.text.width, context)
        self.model = model
        self.tower = both.text
        self.tower.text_projection = None
        self.tokenizer = library.SimpleTokenizer(context_length=context)

    def arguments(self) -> dict[str, Any]:
        """Return model and context; the weights are in the checkpoint."""
        return {"model": self.model, "context": self.context}

    def encode(self, captions: list[str]) -> tuple[Tensor, int]:
        """Tokenize with open_clip; one place more than the context shows which captions do not fit."""
        tokens: Tensor = self.tokenizer(captions, context_length=self.context + 1)
        cut = tokens[:, -1] != 0
        tokens[cut, -2] = tokens[cut, -1]
        return tokens[:, :-1].contiguous(), int(cut.sum())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 (B, context) to features (B, width), the normalised state at the end token."""
        features: Tensor = self.tower(tokens)
        return features


def _check_model(library: Any, model: str) -> None:
    """Refuse names that open_clip does not know, and text towers that are not CLIP's own."""
    known = library.list_models()
    if model not in known:
        raise ModelError(
            f"open_clip {library.__version__} has no model {model!r}",
            valid=difflib.get_close_matches(str(model), known, n=5, cutoff=0.3) or None,
            hint="`python -c 'import open_clip; print(open_clip.list_models())'` lists them",
        )
    config = library.get_model_config(model)
    foreign = _FOREIGN & {key for key, value in {**config, **config["text_cfg"]}.items() if value}
    if foreign or config["text_cfg"]["vocab_size"] != _VOCABULARY:
        raise ModelError(
            f"the text tower of open_clip's {model} is not CLIP's causal transformer with CLIP's tokenizer",
            valid="models such as RN50, ViT-B-32 and ViT-L-14",
            hint="HuggingFaceText builds the towers of Hugging Face",
        )


@contextmanager
def _no_root_handler() -> Iterator[None]:
    """Keep open_clip's messages from giving the root logger a handler, which would print every library's."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
