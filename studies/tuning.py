"""Settings that are chosen on validation images, so that only the chosen ones see test images."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from datamodules.errors import DataError, closest
from studies.layers import Place, StudyError, check_keys, nest, read_grid

KEYS = ("settings", "metric", "folds")


class UndecidedError(DataError):
    """Trials that cannot choose: a metric that is missing or undefined in all of them. Exit code 2."""


@dataclass(frozen=True)
class Candidate:
    """One combination of settings and the cells that try it: one, or one for each inner fold.

    Attributes:
        settings: Dotted setting → value.
        trials: Names of the trial cells.
    """

    settings: dict[str, Any]
    trials: tuple[str, ...]


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen.

    Attributes:
        axes: Dotted setting → the values to try.
        metric: Validation metric that decides: "accuracy", "mean_auroc", "loss" ...
        folds: Cross-validation within the training draw with so many parts; None: the data set's validation split.
    """

    axes: dict[str, list[Any]]
    metric: str
    folds: int | None

    def settings(self) -> list[dict[str, Any]]:
        """All combinations of the values."""
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    def trials(self, settings: Mapping[str, Any]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
        """Yield the words and the layers of each trial of some settings."""
        layers = [nest(key, value) for key, value in settings.items()]
        words = [f"{key.rpartition('.')[2]}={value}".replace("/", "_") for key, value in settings.items()]
        if self.folds is None:
            yield words, layers
            return
        for fold in range(self.folds):
            part = {"data": {"init_args": {"inner_folds": self.folds, "inner_fold": fold}}}
            yield [*words, f"inner{fold}"], [*layers, part]

    def describe(self) -> dict[str, Any]:
        """Plain values of all that decides the choice."""
        return {"axes": self.axes, "metric": self.metric, "folds": self.folds}

    @property
    def selection(self) -> str:
        """How the settings were chosen, for result rows."""
        way = f"{self.folds} folds within the draw" if self.folds is not None else "validation"
        return f"settings by {self.metric} on {way}, weights last"


def read_tuning(value: Any, where: Place) -> Tuning:
    """Read `tune: {settings: {dotted: [values]}, metric: accuracy, folds: 5}`.

    Raises:
        StudyError: Unknown keys, no settings, a value that stands twice, or no metric.
    """
    check_keys(value, KEYS, where)
    example = "settings: {model.init_args.optimizer.init_args.lr: [0.01, 0.1]}"
    axes, folds = read_grid(value.get("settings"), where.at("settings"), "settings", example), value.get("folds")
    if not axes:
        raise StudyError("no settings to choose among", where=str(where.at("settings")), valid=example)
    if not value.get("metric"):
        raise StudyError("no metric to choose by", where=str(where), valid="accuracy, mean_auroc, loss, ...")
    if folds is not None and (not isinstance(folds, int) or folds < 2):
        raise StudyError(
            f"folds: {folds!r}", where=str(where.at("folds")), valid="2 or more, or none for the validation split"
        )
    return Tuning(axes, str(value["metric"]), folds)


def choose(
    tuning: Tuning, candidates: tuple[Candidate, ...], evaluations: Mapping[str, list[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Choose the settings with the best mean of the metric over their trials; of equal ones the first.

    Args:
        tuning: The metric.
        candidates: The settings and their trials.
        evaluations: Trial → its validation metrics, as `summary.json` has them ("name", "class_name", "value").

    Returns:
        The chosen settings, dotted.

    Raises:
        UndecidedError: No candidate has a value in all of its trials.
    """
    sign = -1.0 if tuning.metric in ("loss", "ece") else 1.0
    means: list[tuple[float, dict[str, Any]]] = []
    known: set[str] = set()
    for candidate in candidates:
        values = []
        for trial in candidate.trials:
            overall = {row["name"]: row["value"] for row in evaluations[trial] if not row["class_name"]}
            known |= set(overall)
            values.append(overall.get(tuning.metric))
        defined = [value for value in values if value is not None and math.isfinite(value)]
        if len(defined) == len(values):
            means.append((sign * sum(defined) / len(defined), candidate.settings))
    if not means:
        near = closest(tuning.metric, known)
        problem, hint = f"no trial has a validation {tuning.metric}", "tune by one of these; what was tried is kept"
        if tuning.metric in known:
            problem = f"no settings have a validation {tuning.metric} that is defined in all of their trials"
            hint = "too few images to judge by: draw more, take fewer folds, or tune by loss or accuracy"
        elif not known:
            hint = "give the target a validation split (val_fraction), or tune with folds"
        elif near:
            problem += f"; did you mean {near}?"
        raise UndecidedError(
            problem, where=f"{candidates[0].trials[0]} and others", valid=sorted(known) or None, hint=hint
        )
    best = max(score for score, _ in means)
    return next(settings for score, settings in means if score == best)
