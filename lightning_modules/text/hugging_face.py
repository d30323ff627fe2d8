"""Text encoders and tokenizers of Hugging Face transformers, an optional package: `pip install "farshot[text]"`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.text.tower import TextTower, check_counts, optional_package, token_counts


class HuggingFaceText(TextTower):
    """A text encoder of Hugging Face with its own tokenizer.

    A caption's vector is what the model itself offers: the output of its pooler (BERT, RoBERTa: the first token's
    state through a layer). Models without one (DistilBERT, ModernBERT, T5's encoder, GPT-2) give the mean of the last
    states over the caption's tokens. Code that a repository brings along is never run.

    Args:
        model: A name on the hub, or a folder with `config.json` and the tokenizer's files, which needs no network.
        context: Longest number of tokens, the special ones included.
        pretrained: Also load the weights; otherwise they are random and only configuration and vocabulary are read.

    Raises:
        ModelError: The package is not installed; or the files cannot be found, downloaded or understood; or the model
            is no text encoder, or takes fewer tokens.
    """

    def __init__(self, model: str, context: int = 77, pretrained: bool = False) -> None:
        check_counts(context=context)
        library = optional_package("transformers")
        known = {"trust_remote_code": False, "local_files_only": Path(model).is_dir()}
        with _explained(model):
            config = library.AutoConfig.from_pretrained(model, **known)
            tokenizer = library.AutoTokenizer.from_pretrained(model, **known)
        _check_fit(model, config, tokenizer, context)
        with _explained(model):
            net = (
                library.AutoModel.from_pretrained(model, **known)
                if pretrained
                else library.AutoModel.from_config(config, trust_remote_code=False)
            )
        super().__init__(config.hidden_size, context)
        self.model = model
        self.tower = (net.get_encoder() if config.is_encoder_decoder else net).float()
        self.tokenizer = tokenizer
        self.tokenizer.truncation_side = "right"

    def arguments(self) -> dict[str, Any]:
        """Return model and context; the weights are in the checkpoint, configuration and vocabulary are not."""
        return {"model": self.model, "context": self.context}

    def encode(self, captions: list[str]) -> tuple[Tensor, int]:
        """Tokenize with the model's tokenizer; rows that are too long a second time, so that it cuts them itself."""
        rows: list[list[int]] = self.tokenizer(captions, verbose=False)["input_ids"] if captions else []
        long = [place for place, row in enumerate(rows) if len(row) > self.context]
        for place in long:
            rows[place] = self.tokenizer(captions[place], truncation=True, max_length=self.context)["input_ids"]
        tokens = torch.zeros(len(rows), self.context, dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row)
        return tokens, len(long)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 (B, up to context) to features (B, width)."""
        counts = token_counts(tokens)
        tokens = tokens[:, : int(counts.max())]  # captions are short: most columns are often padding alone
        real = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        padding = self.tokenizer.pad_token_id  # RoBERTa counts its positions by it
        output = self.tower(
            input_ids=tokens.masked_fill(~real, 0 if padding is None else padding), attention_mask=real.long()
        )
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled
        states: Tensor = output.last_hidden_state
        return (states * real[..., None]).sum(dim=1) / counts[:, None]


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn what transformers raises about a name, a folder or the network into an error with a next step."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load {model!r}: {str(error).strip().splitlines()[0]}",
            valid="a name on the hub, or a folder with config.json and the tokenizer's files",
            hint=f"check the name; without a network, name a folder that `hf download {model}` filled elsewhere",
        ) from error


def _check_fit(model: str, config: Any, tokenizer: Any, context: int) -> None:
    """Refuse models that are no text encoders, and a context or vocabulary that the model has no embeddings for."""
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ModelError(
            f"{model!r} is no text encoder: its configuration, {type(config).__name__}, has no hidden_size",
            valid="text models, such as BERT, RoBERTa or DistilBERT",
            hint="OpenClipText builds the text towers of CLIP models",
        )
    special = tokenizer.num_special_tokens_to_add()
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or context)
    if not special < context <= longest:
        raise ModelError(f"context is {context} for {model!r}", valid=f"{special + 1} to {longest} tokens")
    # A row's padding begins after its last number above 0.
    if len(tokenizer) > config.vocab_size or tokenizer("a")["input_ids"][-1:] in ([], [0]):
        raise ModelError(
            f"the tokenizer of {model!r} ({len(tokenizer)} tokens) does not fit the model ({config.vocab_size})",
            valid="token numbers below the model's vocab_size, and rows that do not end with token 0",
            hint="take configuration and tokenizer from one repository",
        )
