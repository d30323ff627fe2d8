"""Evaluation of pairs (two views, image and text): every pair once, the same numbers for any batch size and ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.errors import ModelError, NonFiniteLossError

BLOCK = 256
"""Pairs among which a partner is looked for: fixed, since a contrastive loss and a recall depend on their number."""
CLOSEST = (1, 5)
"""A recall counts partners that are among so many."""
ROUNDING = 1e-12
"""Cosines closer than this are equal; they are computed in float64."""


class CollectedPairs(Metric):  # type: ignore[misc]
    """Collects two tensors of each sample on the device and gathers each of them over the ranks once, in table order.

    Every rank must update at least once; a rank without samples passes one with index -1.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    first: list[Tensor]
    second: list[Tensor]
    index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for state in ("first", "second", "index"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, first: Tensor, second: Tensor, index: Tensor) -> None:
        """Adds one batch; costs no synchronisation with the device.

        Args:
            first: (B, ...); floats are kept in float32.
            second: (B, ...), likewise.
            index: int64 (B,), the row of the table; rows below 0 are padding and count for nothing.
        """
        if not len(first) == len(second) == len(index):
            raise ModelError(f"a batch of {len(first)} and {len(second)} samples with {len(index)} indices")
        self.first.append(_kept(first))
        self.second.append(_kept(second))
        self.index.append(index.long())

    def compute(self) -> Any:
        """The samples of all ranks; see `in_order`."""
        return self.in_order()

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Both tensors (N, ...) in the order of the table, without padding.

        Raises:
            ModelError: Nothing was collected, or a sample more than once.
        """
        if not len(self.index):
            raise ModelError("an evaluation without a batch", hint="give it one or more samples")
        first, second, index = (dim_zero_cat(state) for state in (self.first, self.second, self.index))
        index, order = index.sort(stable=True)
        order, index = order[index >= 0], index[index >= 0]
        repeated = index[1:][index[1:] == index[:-1]].unique().tolist()
        if repeated:
            raise ModelError(
                f"{len(repeated)} samples were evaluated more than once: rows {', '.join(map(str, repeated[:5]))}",
                hint="evaluate with the datamodule's own loaders and use_distributed_sampler=False; "
                "reset() this metric between epochs",
            )
        return first[order], second[order]


class PairEvaluation(CollectedPairs):
    """Contrastive loss and matching of held-out pairs, in blocks of 256 pairs of the table's order.

    A last block of a single pair, which would have no negatives, belongs to the one before it. Of a table that is
    sorted by class, a block's negatives are of few classes.

    Args:
        loss: Mean loss of embeddings (n, D) and (n, D), on these alone: `nt_xent` or `info_nce` with
            `across_ranks=False`. It may read a learned temperature, for it is asked when the numbers are computed.
        sides: Names of the two sides, such as ("image", "text"), to add recalls both ways.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], sides: tuple[str, str] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.sides = sides

    def compute(self) -> dict[str, float]:
        """The numbers of all pairs, the same for every world size, batch size and order.

        Returns:
            loss: Mean over the pairs. matched: Share of the firsts to which their own second is the nearest by cosine
            among the block's seconds; where another is as near, as all are after a collapse, it is not matched.
            samples: Pairs. With `sides` also recall_at_1/image_to_text, recall_at_5/..., and .../text_to_image: the
            share with at most 0 or 4 others as near as their own partner. All but samples are NaN for less than 2
            pairs.

        Raises:
            NonFiniteLossError: An embedding is NaN or infinite.
            ModelError: See `in_order`.
        """
        first, second = self.in_order()
        broken = int((~(first.isfinite() & second.isfinite()).all(dim=1)).sum())
        if broken:
            raise NonFiniteLossError(f"{broken} of {len(first)} pairs have embeddings that are NaN or infinite")
        n, pairs = len(first), list(zip(_blocks(first), _blocks(second), strict=True))
        ranks = [_ranks(a, b) for a, b in pairs]
        empty = first.new_zeros(0)
        forth, back = (torch.cat(way) for way in zip(*ranks, strict=True)) if ranks else (empty, empty)
        loss = sum(float(self.loss(a, b)) * len(a) for a, b in pairs) / n if pairs else np.nan
        recalls = [_share(places < k) for places in (forth, back) for k in CLOSEST] if self.sides is not None else []
        return dict(zip(self.names(), (loss, _share(forth < 1), *recalls), strict=True)) | {"samples": float(n)}

    def names(self) -> list[str]:
        """What `compute` returns but the number of samples: what a run can be selected by."""
        return ["loss", "matched", *(f"recall_at_{k}/{way}" for way in self._ways() for k in CLOSEST)]

    def _ways(self) -> list[str]:
        return [f"{a}_to_{b}" for a, b in (self.sides, self.sides[::-1])] if self.sides is not None else []


def _kept(values: Tensor) -> Tensor:
    return values.detach().float() if values.is_floating_point() else values


def _blocks(rows: Tensor) -> list[Tensor]:
    """float64 blocks of `BLOCK` rows, the last one shorter; none of less than 2 rows."""
    rows = rows.double()
    if len(rows) < 2:
        return []
    parts = list(torch.split(rows, BLOCK))
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts[-1]) < 2 else parts


def _ranks(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """How many others are at least as near as its own partner, int64 (n,): to each first, and to each second."""
    cosine = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    own = cosine.diagonal() - ROUNDING
    return (cosine >= own[:, None]).sum(dim=1) - 1, (cosine >= own[None, :]).sum(dim=0) - 1


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else np.nan
