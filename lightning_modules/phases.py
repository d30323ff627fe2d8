"""A run in two phases, decided by the step alone: first what is new trains, then everything (LP-FT).

Method: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
arXiv 2202.10054.
"""

from dataclasses import replace

from lightning_modules.errors import ModelError
from lightning_modules.schedules import RunLength


def probe_length(total_steps: int, fraction: float) -> int:
    """Steps of the first phase: `fraction` of the run, rounded; each phase has at least one step.

    Args:
        total_steps: Optimizer steps of the whole run.
        fraction: Share of the first phase, 0–1.

    Raises:
        ModelError: The run has fewer than two steps.
    """
    if total_steps < 2:
        raise ModelError(
            f"a run of {total_steps} step has no room for two phases",
            valid=">= 2 steps",
            hint="lengthen the run, or leave probe_fraction out",
        )
    return min(max(round(fraction * total_steps), 1), total_steps - 1)


def within_phase(step: int, probe: int, run: RunLength) -> tuple[int, RunLength]:
    """Turn a step of the run into the step of its phase, and the length of that phase, for a schedule.

    Args:
        step: Optimizer step of the run, counted from 0.
        probe: Steps of the first phase.
        run: Length of the whole run.
    """
    if step < probe:
        return step, replace(run, total_steps=probe)
    return step - probe, replace(run, total_steps=run.total_steps - probe)
