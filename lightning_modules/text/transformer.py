"""The built-in text tower: CLIP's transformer at a small size over hashed words; needs no download."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.errors import ModelError
from lightning_modules.text.tower import TextTower, check_counts, token_counts
from lightning_modules.text.words import RESERVED, hash_captions


class SmallText(TextTower):
    """A causal pre-norm transformer over hashed words; the output is the normalised state at the end token.

    Design and initialisation are those of CLIP's text tower (Radford et al. 2021, arXiv 2103.00020; openai/CLIP,
    `model.py`), with GELU for its approximation. Causal attention alone makes padding invisible.

    Args:
        vocabulary: Numbers that tokens can have, three reserved ones included; see `words.word_number` for how many
            words share one.
        context: Longest number of tokens, start and end included, 3 or more.
        width: Size of the states and of the output.
        layers: Blocks of attention and perceptron.
        heads: Heads of attention; they divide the width.

    Raises:
        ModelError: A size out of range.
    """

    def __init__(
        self, vocabulary: int = 16384, context: int = 64, width: int = 256, layers: int = 4, heads: int = 4
    ) -> None:
        check_counts(vocabulary=vocabulary, context=context, width=width, layers=layers, heads=heads)
        if vocabulary <= RESERVED or context < 3:
            raise ModelError(
                f"SmallText cannot have vocabulary={vocabulary} and context={context}",
                valid=f"vocabulary {RESERVED + 1} or more, context 3 or more: start, a word, end",
            )
        if width % heads:
            raise ModelError(f"{heads} heads do not divide the width {width}", valid="width = heads × size of a head")
        super().__init__(width, context)
        self.vocabulary, self.layers, self.heads = vocabulary, layers, heads
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.empty(context, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        inner = self.width**-0.5
        deviations = {
            "self_attn.in_proj_weight": inner,
            "self_attn.out_proj.weight": inner * (2 * self.layers) ** -0.5,
            "linear1.weight": (2 * self.width) ** -0.5,
            "linear2.weight": inner * (2 * self.layers) ** -0.5,
        }
        for block in self.blocks.layers:
            for name, parameter in block.named_parameters():
                if name in deviations:
                    nn.init.normal_(parameter, std=deviations[name])
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def arguments(self) -> dict[str, Any]:
        """Return the five sizes."""
        return {
            "vocabulary": self.vocabulary,
            "context": self.context,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
        }

    def encode(self, captions: list[str]) -> tuple[Tensor, int]:
        """Hash the words of captions; see `words.hash_captions`."""
        tokens, cut = hash_captions(captions, self.vocabulary, self.context)
        return torch.from_numpy(tokens), cut

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 (B, up to context) to features (B, width)."""
        counts = token_counts(tokens)
        tokens = tokens[:, : int(counts.max())]  # captions are short: most columns are often padding alone
        states = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], states.device, states.dtype)
        states = self.blocks(states, mask=mask, is_causal=True)
        ends = states[torch.arange(len(states), device=states.device), counts - 1]
        features: Tensor = self.norm(ends)
        return features
