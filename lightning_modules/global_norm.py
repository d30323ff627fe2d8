"""BatchNorm of vectors over the global batch, on any device: the number of ranks does not change a result."""

import torch
from torch import Tensor, nn

from lightning_modules.errors import ModelError
from lightning_modules.gather import gather_with_gradient, world_size


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`BatchNorm1d` whose statistics are those of all ranks; torch's SyncBatchNorm does the same on GPUs only.

    Every rank must hold equally many rows.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, D).

        Raises:
            ModelError: In training, one row in all: its variance is 0.
        """
        rows = world_size() * len(input)
        if self.training and rows < 2:
            raise ModelError("BatchNorm got a batch of one", valid="a global batch of 2 or more")
        if rows == len(input) or not self.training:
            return super().forward(input)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _sum_over_ranks(wide.sum(0)) / rows
        variance = _sum_over_ranks((wide - mean).square().sum(0)) / rows
        self._follow(mean.detach(), variance.detach() * rows / (rows - 1))
        normalised = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (normalised * self.weight + self.bias).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics as `BatchNorm1d` does; the variance is the unbiased one."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(new.to(running.dtype), factor)


def _sum_over_ranks(values: Tensor) -> Tensor:
    return gather_with_gradient(values[None]).sum(0)
