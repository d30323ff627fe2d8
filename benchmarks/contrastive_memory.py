"""Counts the memory of a training step of SimCLR and CLIP, whole and in parts, without a GPU and without its time.

Usage: PYTHONPATH=. python benchmarks/contrastive_memory.py [--batch 1024] [--parts 256 128 64] [--methods SimCLR CLIP]

Every operation of forward pass, backward pass and AdamW's step runs on tensors without content, whose live bytes are
counted: images, activations, gradients, parameters and the optimizer's state. A GPU needs more for the workspace of its
convolutions, its context and what the allocator cannot reuse: 90 % of its memory count as usable. The second step is
counted, whose optimizer has its state. CLIP's captions are as long as the built-in tower takes them.
"""

import argparse
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.clip import CLIP
from lightning_modules.pairs import PairTask
from lightning_modules.simclr import SimCLR
from lightning_modules.text.tower import TextTower

USABLE = 0.9
"""Share of a GPU's memory that tensors can fill."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations within the block have made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages it has made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.known.pop(key)


class FullText(TextTower):
    """The built-in tower's layers on captions that fill the context; tokens without content cannot be looked at.

    Not `SmallText` itself: torch copies a transformer's layers deeply, which tensors without content do not survive.
    """

    def __init__(self, vocabulary: int = 16384, context: int = 64, width: int = 256, layers: int = 4) -> None:
        super().__init__(width, context)
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.positions = torch.nn.Parameter(torch.zeros(context, width))
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = torch.nn.LayerNorm(width)

    def encode(self, captions: list[str]) -> tuple[Tensor, int]:
        """As many rows as captions."""
        return torch.ones(len(captions), self.context, dtype=torch.int64), 0

    def tokenize_counted(self, captions: Sequence[str]) -> tuple[Tensor, int]:
        """Without a look at the captions, which are empty here."""
        return self.encode(list(captions))

    def arguments(self) -> dict[str, Any]:
        """None: no checkpoint is written."""
        return {}

    def forward(self, tokens: Tensor) -> Tensor:
        """The features of the last token."""
        states = self.tokens(tokens) + self.positions
        mask = torch.nn.Transformer.generate_square_subsequent_mask(self.context)
        for block in self.blocks:
            states = block(states, src_mask=mask, is_causal=True)
        features: Tensor = self.norm(states[:, -1])
        return features


def build(method: str, architecture: str, images_at_once: int | None) -> PairTask:
    """The task in paper B's form."""
    if method == "SimCLR":
        return SimCLR(backbone=architecture, images_at_once=images_at_once)
    return CLIP(text=FullText(), backbone=architecture, images_at_once=images_at_once)


def peak(task: PairTask, batch: int, side: int, half: bool) -> int:
    """Largest number of live bytes in the second of two training steps."""
    decayed, bare = (group["params"] for group in task.parameter_groups())
    optimizer = torch.optim.AdamW([*decayed, *bare], fused=True)  # reads no tensor's content
    live = LiveBytes()
    live.now = sum(tensor.numel() * tensor.element_size() for tensor in [*task.parameters(), *task.buffers()])
    for tensor in [*task.parameters(), *task.buffers()]:
        live.known[tensor.untyped_storage()._cdata] = 0  # counted, and lives on
    with live:
        for _ in range(2):
            live.peak = live.now
            images = torch.empty(batch, 3, side, side, dtype=torch.uint8)
            other = torch.empty_like(images) if isinstance(task, SimCLR) else None
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                loss = task.training_loss(task.normalise(images), {"view2": other, "text": [""] * batch})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del images, other, loss
    return live.peak


def main() -> None:
    """Print a line for each method, precision and size of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--parts", type=int, nargs="*", default=[256, 128, 64])
    parser.add_argument("--methods", nargs="*", default=["SimCLR", "CLIP"])
    parser.add_argument("--memory", type=float, default=40, help="of the GPU, GB of 10^9 bytes")
    arguments = parser.parse_args()
    print(f"{arguments.architecture}, {arguments.side} px, batch {arguments.batch}, AdamW, torch {torch.__version__}")
    for method in arguments.methods:
        for half in (False, True):
            for part in (None, *arguments.parts):
                start = time.perf_counter()
                with FakeTensorMode():
                    size = peak(build(method, arguments.architecture, part), arguments.batch, arguments.side, half)
                fits = "fits" if size <= USABLE * arguments.memory * 1e9 else "does not fit"
                print(
                    f"{method}, {'16-bit autocast' if half else 'float32'}, images_at_once {part}: "
                    f"{size / 1e9:.1f} GB, {fits} {arguments.memory:g} GB ({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
