"""Few-shot probes of frozen features: features once, then hundreds of episodes on the same draws for all weights."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from datamodules.base import BaseDataModule
from datamodules.errors import DataError, shorten
from lightning_modules.backbones.checkpoints import read_weights
from lightning_modules.metrics import ranking
from studies import guard
from studies.episodes import Episode, draw_episodes, labelled
from studies.features import FeatureSet, choose_device, extract_features
from studies.outcome import source_facts
from studies.probe_heads import HEADS, Head
from studies.runs import code_version

RANDOM = "scratch"
"""Name of a network without weights: random features, the baseline of all gains."""


@dataclass(frozen=True)
class Plan:
    """What is probed.

    Attributes:
        heads: Keys of `HEADS`.
        shots: Shots per class, "full" for the whole training set.
        seeds: Number of episodes a shot level; "full" has one.
        groups: Layer groups whose features are probed; None = the last.
        backbone: timm name of weights that do not say of which network they are.
        split: Where the heads are judged. "validation" keeps the test set for the end.
        batch_size: Images a forward pass.
        device: Of the forward passes and the heads; None = the GPU if there is one.
    """

    heads: Sequence[str] = ("ridge",)
    shots: Sequence[str] = ("1", "5", "10", "full")
    seeds: int = 20
    groups: Sequence[str] | None = None
    backbone: str | None = None
    split: Literal["test", "validation"] = "test"
    batch_size: int = 64
    device: str | None = None


def run_probe(
    data: BaseDataModule,
    weights: Mapping[str, str | None],
    plan: Plan,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Probe every candidate; yields result rows (see `studies.results`), one a metric and episode.

    A row's `protocol` is "probe HEAD", its `transfer_depth` the number of layer groups below the features, its `seed`
    the episode's draw. All candidates see the same episodes, so that differences can be paired.

    Args:
        data: The target, without shots of its own.
        weights: Weights by the name that they have in the rows; None = random.
        plan: What is probed.
        tell: Takes a line on each thing that begins.

    Raises:
        DataError: The data set draws a few-shot set itself, a head is unknown, a class has too few images, nothing can
            be judged, a source has seen test images, or an architecture is not known.
        ModelError: Weights cannot be read.
    """
    unknown = [name for name in plan.heads if name not in HEADS]
    if unknown or len(set(plan.heads)) < len(plan.heads):
        raise DataError(f"heads are {shorten(plan.heads)}", where="--heads", valid=f"different ones of {list(HEADS)}")
    on = choose_device(plan.device)
    episodes, train, judged = _draw(data, plan)
    table = data.read_table()
    labels, truth = torch.from_numpy(table.labels[train]), table.labels[judged]
    patients = torch.from_numpy(pd.factorize(table.groups[train])[0]) if table.grouped else None
    candidates = [(name, source, *_examine(source, data, plan)) for name, source in weights.items()]
    for name, source, backbone, note in candidates:
        tell(f"{name}: {len(train) + len(judged)} images")
        net: Any = {"backbone": backbone, "groups": plan.groups, "batch_size": plan.batch_size, "device": plan.device}
        fitted, held_out = (extract_features(source, data, rows, **net) for rows in (train, judged))
        for group, features in fitted.items():
            common = {
                **_columns(data, name, source, plan),
                "architecture": features.architecture,
                "weights_hash": features.weights_hash if source is not None else None,
                "transfer_depth": features.depth,
                "granularity": "block" if group.startswith("block") else "coarse",
                "guard": note,
                "n_test": len(judged),
            }
            pool, test = (_tensor(found[group], on) for found in (fitted, held_out))
            for head in plan.heads:
                tell(f"{name}, {group}, {head}: {len(episodes)} episodes")
                for episode in episodes:
                    scores = _score(HEADS[head], episode, pool, labels, test, patients, data)
                    facts = {"shots": episode.shots, "seed": episode.seed, "n_train": len(episode.rows)}
                    values = probe_metrics(scores, truth, data.task, data.class_names)
                    for (metric, class_name), value in values.items():
                        row = {"protocol": f"probe {head}", "metric": metric, "class_name": class_name, "value": value}
                        yield {**common, **facts, **row}


def _examine(source: str | None, data: BaseDataModule, plan: Plan) -> tuple[str | None, str]:
    """Architecture that a candidate needs to be told, and what the guard says: all mistakes before the first image."""
    stated = read_weights(source).architecture if source is not None else None
    if stated is None and plan.backbone is None:
        raise DataError(
            f"the weights {source} do not say which net they belong to" if source else f"{RANDOM} needs a net",
            where="--backbone",
            hint="name the timm model, such as --backbone resnet50; `python cli.py list models` shows the tested ones",
        )
    return None if stated else plan.backbone, guard.guard(source, data)


def _draw(data: BaseDataModule, plan: Plan) -> tuple[list[Episode], np.ndarray, np.ndarray]:
    """Episodes, the labelled table rows that they are drawn from, and the rows that the heads are judged on."""
    if data.shots not in (None, "full") or data.num_images is not None or data.fraction is not None:
        raise DataError(
            "the data set draws a part of its training images, and a probe draws its episodes itself",
            where="data.init_args.shots, num_images, fraction",
            hint="leave them out and give --shots to the probe",
        )
    data.setup()
    train, judged = data.rows("train"), data.rows(plan.split)
    if not len(judged):
        raise DataError(f"{data.name} has no {plan.split} images", valid="a split that is not empty")
    table = data.read_table()
    if not probe_metrics(np.zeros((len(judged), data.num_classes)), table.labels[judged], data.task, data.class_names):
        wanted = "known labels" if data.task == "multiclass" else "a label that is both 0 and 1"
        raise DataError(
            f"nothing can be judged on the {len(judged)} {plan.split} images of {data.name}: they lack {wanted}",
            where="--split",
            hint="choose the other of test and validation, or a larger one (--data.val_fraction, --data.test_fraction)",
        )
    groups = table.groups[train] if table.grouped else None
    rules: Any = {"one_per_group": data.one_per_group, "on_small": data.on_small}
    drawn = draw_episodes(table.labels[train], groups, plan.shots, range(plan.seeds), data.class_names, **rules)
    # Unlabelled images are in no episode: their features need no place. The draws stay those of a training run.
    used = labelled(table.labels[train])
    return [replace(one, rows=np.searchsorted(used, one.rows)) for one in drawn], train[used], judged


def _score(
    head: Head,
    episode: Episode,
    pool: Tensor,
    labels: Tensor,
    test: Tensor,
    patients: Tensor | None,
    data: BaseDataModule,
) -> np.ndarray:
    """Fit a head on an episode and score the test images, (m, C)."""
    chosen = torch.from_numpy(episode.rows)
    mine = pool if len(chosen) == len(pool) else pool[chosen]  # no copy of a pool that may not fit twice
    groups = None if patients is None else patients[chosen]
    result = head(mine, labels[chosen], test, num_classes=data.num_classes, task=data.task, groups=groups)
    scores: np.ndarray = result.scores.cpu().numpy()
    return scores


def probe_metrics(
    scores: np.ndarray, labels: np.ndarray, task: str, class_names: Sequence[str]
) -> dict[tuple[str, str | None], float]:
    """Metrics that need an order of the scores only: a head's scores are no logits.

    Args:
        scores: (m, C) or (m, L).
        labels: int64 (m,), −1 = not judged; or float32 (m, L) with 1 / 0 / NaN.
        task: multiclass, binary or multilabel.
        class_names: Names of the outputs.

    Returns:
        (metric, class or None) → value: for multi-class "accuracy" and "balanced_accuracy"; for labels "mean_auroc",
        "mean_average_precision" and both of each label. Undefined values are left out.
    """
    if task == "multiclass":
        known = labels >= 0
        if not known.any():
            return {}
        right = scores[known].argmax(axis=1) == labels[known]
        sizes = np.bincount(labels[known], minlength=len(class_names))
        hits = np.bincount(labels[known], right, minlength=len(class_names))
        recall = hits[sizes > 0] / sizes[sizes > 0]
        return {("accuracy", None): float(right.mean()), ("balanced_accuracy", None): float(recall.mean())}
    found: dict[tuple[str, str | None], float] = {}
    for place, name in enumerate(class_names):
        known = ~np.isnan(labels[:, place])
        values = ranking(labels[known, place] == 1, scores[known, place].astype(np.float64))
        for metric, value in zip(("auroc", "average_precision"), values, strict=True):
            if np.isfinite(value):
                found[metric, name] = value
    for metric in ("auroc", "average_precision"):
        each = [value for (kind, _), value in found.items() if kind == metric]
        if each:
            found[f"mean_{metric}", None] = float(np.mean(each))
    return found


def name_weights(weights: Sequence[str]) -> dict[str, str | None]:
    """Short, different names of weights: a run's or file's name, with as much of its path as tells them apart."""
    names: dict[str, str | None] = {}
    seen: set[str] = set()
    for text in weights:
        path = Path(text)
        place, choices = text, [text]
        if text != RANDOM and path.exists():
            place = str(path.resolve())
            short = [*path.parts[:-1], path.name if path.is_dir() else path.stem]
            choices = ["/".join(short[-count:]) for count in range(1, len(short) + 1)] + [text]
        if place in seen:
            raise DataError(f"weights {text!r} are given twice", where="--weights")
        seen.add(place)
        name = next(name for name in choices if name not in names and (name != RANDOM or text == RANDOM))
        names[name] = None if text == RANDOM else text
    return names


def _columns(data: BaseDataModule, name: str, source: str | None, plan: Plan) -> dict[str, Any]:
    """Columns of the rows that data and candidate decide."""
    return {
        **source_facts(source),
        "study": "probe",
        "run": name,
        "source": name,  # different for all candidates
        "target": data.name,
        "fold": data.fold if data.folds is not None else None,
        "selection": f"judged on {plan.split}",
        "image_size": data.image_size,
        "split_policy": data.split_policy,
        "label_policy": data.label_policy,
        "dials": data.dials.describe(),
        "code_version": code_version(),
    }


def _tensor(features: FeatureSet, device: torch.device) -> Tensor:
    """Features on the device; on the CPU without a copy, however large the file is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(features.values).to(device)
