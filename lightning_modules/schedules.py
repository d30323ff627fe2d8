"""Learning-rate schedules as pure functions of the optimizer step, and the BiT-HyperRule.

HyperRule: Kolesnikov et al. 2020, "Big Transfer", arXiv 1912.11370; its lengths and mixup follow the
reference implementation (google-research/big_transfer, `bit_hyperrule.py`).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from lightning_modules.errors import ModelError


@dataclass(frozen=True)
class RunLength:
    """How long a run is, in optimizer steps: all that a schedule may depend on.

    Args:
        total_steps: Optimizer steps of the whole run, >= 1.
        steps_per_epoch: Optimizer steps of one pass over the data, >= 1.
        global_batch: Images per optimizer step over all devices and accumulated batches, >= 1.
        train_size: Images in the training set after few-shot selection, >= 1.

    Raises:
        ModelError: A length is below 1 or not finite.
    """

    total_steps: int
    steps_per_epoch: int
    global_batch: int
    train_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 1 <= value < math.inf:
                raise ModelError(
                    f"{name} is {value}", valid=">= 1 and finite", hint="set trainer.max_steps or max_epochs"
                )


#: Sizes of training sets from which the HyperRule's second and third table hold (paper: small, medium, large).
SIZES = (20_000, 500_000)
#: End of the warm-up, the decays and the end of the run, in steps, for each size.
BOUNDARIES = ((100, 200, 300, 400, 500), (500, 3_000, 6_000, 9_000, 10_000), (500, 6_000, 12_000, 18_000, 20_000))


@dataclass(frozen=True)
class HyperRule:
    """The BiT-HyperRule for one size of training set: linear warm-up, then × `gamma` at each decay.

    Args:
        warmup: Steps of warm-up from 0, >= 0.
        decays: Steps after which the rate falls, in ascending order; the first is >= `warmup`.
        total: Steps of the run, >= every decay.
        mixup_alpha: Beta parameter of mixup; 0 = no mixup.
        gamma: Factor at each decay, > 0.

    Raises:
        ModelError: The steps are not in ascending order.
    """

    warmup: int
    decays: tuple[int, ...]
    total: int
    mixup_alpha: float
    gamma: float = 0.1

    def __post_init__(self) -> None:
        steps = [0, self.warmup, *self.decays, self.total]
        if steps != sorted(steps):
            raise ModelError(f"HyperRule steps {steps[1:]} do not ascend", valid="0 <= warmup <= decays <= total")

    def factor(self, step: int) -> float:
        """Multiplier of the peak rate at optimizer step `step`, counted from 0; the last value holds on.

        As in the reference, step 0 trains at rate 0, and the step of a decay still at the rate before it.
        """
        return _warmup(step, self.warmup, 0.0) * self.gamma ** sum(decay < step for decay in self.decays)

    def scaled(self, total: int) -> "HyperRule":
        """The same shape at another length: all steps in proportion, rounded, warm-up at least 1 step.

        Steps stay strictly ascending wherever the length has room for them; decays without room fall on the
        end, where they have no effect.

        Args:
            total: Steps of the new run, >= 1.

        Raises:
            ModelError: `total` is below 1.
        """
        if total < 1:
            raise ModelError(f"HyperRule length is {total}", valid=">= 1 step")
        boundaries = (self.warmup, *self.decays)
        steps: list[int] = []
        for place, boundary in enumerate(boundaries):
            lowest = steps[-1] + 1 if steps else 1
            highest = total - len(boundaries) + place if total > len(boundaries) else total
            steps.append(min(max(round(boundary * total / self.total), lowest), highest))
        return replace(self, warmup=steps[0], decays=tuple(steps[1:]), total=total)


def bit_hyperrule(
    train_size: int,
    *,
    sizes: tuple[int, ...] = SIZES,
    boundaries: tuple[tuple[int, ...], ...] = BOUNDARIES,
    gamma: float = 0.1,
    mixup_alpha: float = 0.1,
    mixup_from: int = 20_000,
) -> HyperRule:
    """The BiT-HyperRule for a training set, counted after few-shot selection.

    Args:
        train_size: Images in the training set, >= 1.
        sizes: Smallest training sets of the second table, the third, ..., ascending.
        boundaries: A table for each size, one more than `sizes`: the end of the warm-up, the decays, the end.
        gamma: Factor at each decay, > 0.
        mixup_alpha: Beta parameter of mixup for sets that are mixed; 0 = none.
        mixup_from: Smallest training set that is mixed.

    Returns:
        By default 500, 10,000 or 20,000 steps for fewer than 20,000, fewer than 500,000 or more images.

    Raises:
        ModelError: `train_size` is below 1, or a table has fewer than two steps or does not ascend.
    """
    if train_size < 1:
        raise ModelError(f"train_size is {train_size}", valid=">= 1 image")
    table = boundaries[sum(train_size >= size for size in sizes)]
    if len(table) < 2:
        raise ModelError(f"HyperRule boundaries {list(table)}", valid="the end of the warm-up, decays, the end")
    return HyperRule(table[0], tuple(table[1:-1]), table[-1], mixup_alpha if train_size >= mixup_from else 0.0, gamma)


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Multiplier of the optimizer's learning rate as a function of the step and the run's length.

    A warm-up is linear per step and takes at most half of the run, so that a short run reaches its peak, too.

    Args:
        reference_batch: Batch size that the optimizer's rate was chosen for; the multiplier is then scaled by
            global batch / reference batch (linear scaling). None = no scaling.

    Raises:
        ModelError: An argument is out of its range.
    """

    reference_batch: int | None = None

    def __post_init__(self) -> None:
        if self.reference_batch is not None:
            _check(self.reference_batch >= 1, "reference_batch", self.reference_batch, ">= 1, or null")

    def factor(self, step: int, run: RunLength) -> float:
        """Multiplier at optimizer step `step`, counted from 0; defined at and after the run's end, too."""
        scaling = 1.0 if self.reference_batch is None else run.global_batch / self.reference_batch
        return scaling * self.shape(step, run)

    @abstractmethod
    def shape(self, step: int, run: RunLength) -> float:
        """Multiplier before linear scaling: 1 at the peak."""

    def plan(self, train_size: int) -> HyperRule | None:
        """Length and mixup that the schedule prescribes for a training set; None: the trainer's stand."""
        return None


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same rate throughout.

    Args:
        reference_batch: See `Schedule`.
    """

    def shape(self, step: int, run: RunLength) -> float:
        """1 at every step."""
        return 1.0


@dataclass(frozen=True)
class WarmupStep(Schedule):
    """Warm-up, then × `gamma` at each milestone.

    Args:
        warmup_epochs: Length of the warm-up, >= 0.
        milestones: Epochs from whose first step on the rate is lower, such as [30, 60, 80]; all after the warm-up.
        gamma: Factor at each milestone, > 0.
        warmup_start: Fraction of the peak at which the warm-up begins, in [0, 1]; Goyal et al. 2017
            (arXiv 1706.02677) begin at local batch / global batch.
        reference_batch: See `Schedule`.
    """

    warmup_epochs: float
    milestones: list[float]
    gamma: float = 0.1
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, ">= 0")
        _check(self.gamma > 0, "gamma", self.gamma, "> 0")
        _check(0 <= self.warmup_start <= 1, "warmup_start", self.warmup_start, "0 to 1")
        after = all(milestone > self.warmup_epochs for milestone in self.milestones)
        _check(after, "milestones", self.milestones, f"> warmup_epochs ({self.warmup_epochs}), or no step has the peak")

    def shape(self, step: int, run: RunLength) -> float:
        """Warm-up times the decays that have begun."""
        warmup = _capped(round(self.warmup_epochs * run.steps_per_epoch), run)
        decays = sum(step >= milestone * run.steps_per_epoch for milestone in self.milestones)
        return _warmup(step, warmup, self.warmup_start) * self.gamma**decays


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Warm-up, then half a cosine down to `final` at the end of the run.

    Args:
        warmup_epochs: Length of the warm-up in epochs, >= 0; this or `warmup_steps`.
        warmup_steps: Length of the warm-up in optimizer steps, >= 0.
        warmup_start: Fraction of the peak at which the warm-up begins, in [0, 1].
        final: Fraction of the peak at which the run ends, in [0, 1].
        reference_batch: See `Schedule`.
    """

    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    warmup_start: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, ">= 0")
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, ">= 0")
        _check(0 <= self.warmup_start <= 1, "warmup_start", self.warmup_start, "0 to 1")
        _check(0 <= self.final <= 1, "final", self.final, "0 to 1")
        _check(
            not (self.warmup_epochs and self.warmup_steps),
            "warmup_steps",
            self.warmup_steps,
            "0 with warmup_epochs",
        )

    def shape(self, step: int, run: RunLength) -> float:
        """Linear rise, then the cosine of the remaining steps."""
        warmup = _capped(self.warmup_steps or round(self.warmup_epochs * run.steps_per_epoch), run)
        if step < warmup:
            return _warmup(step, warmup, self.warmup_start)
        progress = min((step - warmup) / (run.total_steps - warmup), 1.0)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class HyperRuleSchedule(Schedule):
    """The BiT-HyperRule: the size of the training set decides the run's length, its schedule and its mixup.

    A run, or a phase of it, that is shorter than its table gets the table in proportion.

    Args:
        length: Steps to which the rule is scaled; null = the table's own last boundary.
        sizes: Smallest training sets of the second table, the third, ..., ascending.
        boundaries: A table for each size, one more than `sizes`: the end of the warm-up, the decays, the end, in steps.
        gamma: Factor at each decay, > 0.
        mixup_alpha: Beta parameter of mixup, >= 0; 0 = none.
        mixup_from: Smallest training set that is mixed.
        reference_batch: See `Schedule`.
    """

    length: int | None = None
    sizes: tuple[int, ...] = SIZES
    boundaries: tuple[tuple[int, ...], ...] = BOUNDARIES
    gamma: float = 0.1
    mixup_alpha: float = 0.1
    mixup_from: int = 20_000

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        if self.length is not None:
            _check(self.length >= 1, "length", self.length, ">= 1, or null")
        _check(list(self.sizes) == sorted(self.sizes), "sizes", list(self.sizes), "ascending")
        tables, wanted = len(self.boundaries), len(self.sizes) + 1
        _check(tables == wanted, "number of boundaries' tables", tables, f"{wanted}, one more than sizes")
        _check(self.gamma > 0, "gamma", self.gamma, "> 0")
        _check(self.mixup_alpha >= 0, "mixup_alpha", self.mixup_alpha, ">= 0")
        for size in (1, *self.sizes):
            self._rule(size)

    def plan(self, train_size: int) -> HyperRule:
        """The rule at the schedule's length."""
        rule = self._rule(train_size)
        return rule if self.length is None else rule.scaled(self.length)

    def shape(self, step: int, run: RunLength) -> float:
        """The rule's factor, its warm-up capped as everywhere."""
        rule = self._rule(run.train_size)
        total = min(rule.total if self.length is None else self.length, run.total_steps)
        rule = rule if total == rule.total else rule.scaled(total)
        return replace(rule, warmup=_capped(rule.warmup, run)).factor(step)

    def _rule(self, train_size: int) -> HyperRule:
        return bit_hyperrule(
            train_size,
            sizes=self.sizes,
            boundaries=self.boundaries,
            gamma=self.gamma,
            mixup_alpha=self.mixup_alpha,
            mixup_from=self.mixup_from,
        )


def _warmup(step: int, warmup: int, start: float) -> float:
    return start + (1.0 - start) * step / warmup if step < warmup else 1.0


def _capped(warmup: int, run: RunLength) -> int:
    return min(warmup, run.total_steps // 2)


def _check(fits: bool, name: str, value: object, valid: str) -> None:
    if not fits:
        raise ModelError(f"{name} is {value}", valid=valid)
