"""Hidden features and the labels they make, for a source and a target task that share a set part of them.

After the correlated hidden manifold model (Gerace et al., arXiv 2106.05418). A task has latent features with their
statistics, a generative direction for each, and a label rule; a dial for each of the three says what the target shares
with the source. Here are latents and labels; `datamodules.generator` turns them into images.
"""

from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError, closest
from datamodules.random_numbers import Floats, Ints, uniform

Task = Literal["multiclass", "binary", "multilabel"]
Role = Literal["source", "target"]
Bools = NDArray[np.bool_]

CODE = 4  # latent features that are on in a class
FLIP = 0.03  # chance that a latent feature differs from its class's code
STRAY = 0.12  # chance of a latent feature that no label uses
TROUPE = 4  # features that come and go together in statistics of the target's own, on average
PREVALENCE = (0.4, 0.1)  # of the first and the last label
DIALS = {"similarity": 1.0, "shared_features": 1.0, "shared_directions": None, "shared_rule": 0.0}  # with defaults


@dataclass(frozen=True)
class HiddenManifold:
    """Labels and latent features of an endless data set: image i is a pure function of the arguments and i.

    Multi-class: a class is a code of 4 latent features, each feature of an image may flip. Binary (one label) and
    multi-label: a label is the presence of one latent feature, with prevalences from 40 % (first label) to 10 %
    (last); the other features come and go.

    Source and target of one `seed` belong together. Three dials in [0, 1] say what the target shares: of its features'
    statistics, of its generative directions and of its label rule. Each is a share of the parts, the first ones first;
    the rest is the target's own. A more similar target keeps what a less similar one shares, and labels, places and
    noise depend on no dial, so comparisons are paired. With all three at 1 the target is the source's task, from other
    draws: all layers of a source's network are useful as they are. With all at 0 the tasks share only what every image
    of a look has (patches, colours, scene, noise): the first layers are useful, the last ones are not.

    Args:
        num_classes: Classes, at least 2 for multi-class; labels for multi-label; 1 for binary. The first classes of a
            larger source are those of a smaller one.
        task: The kind of labels.
        seed: Which world.
        role: The source task, or the target task. A source takes no dial.
        similarity: The dial of the generative directions, where `shared_directions` is not given.
        shared_features: Share of the latent features with the source's statistics: each flips or strays alone, all
            equally often. The others have a rate of their own, 0 to 2 times the source's, and come and go in troupes
            of about 4. A label's own presence never changes.
        shared_directions: Share of the generative directions that are the source's; null = `similarity`.
        shared_rule: Share of the classes or labels with the source's code.
        num_features: Latent features D of the task.

    Raises:
        DataError: An argument out of range.
    """

    num_classes: int = 10
    task: Task = "multiclass"
    seed: int = 0
    role: Role = "source"
    similarity: float = 1.0
    shared_features: float = 1.0
    shared_directions: float | None = None
    shared_rule: float = 0.0
    num_features: int = 20

    def __post_init__(self) -> None:
        check_choice("task", self.task, get_args(Task))
        check_choice("role", self.role, get_args(Role))
        for name, default in DIALS.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise DataError(f"{name} {value} is out of range", where=name, valid="0 to 1")
            if self.role == "source" and value != default:
                raise DataError(
                    f"a source task has no {name} {value}: it shares everything with itself",
                    where=name,
                    valid=f"{default} for role 'source', 0 to 1 for role 'target'",
                    hint="set role: target",
                )
        if self.num_features < CODE + 1:
            raise DataError(
                f"num_features {self.num_features} is too small",
                where="num_features",
                valid=f"{CODE + 1} or more",
            )
        low, high = {
            "multiclass": (2, comb(self.num_features, CODE) // 2),
            "binary": (1, 1),
            "multilabel": (1, self.num_features),
        }[self.task]
        if not low <= self.num_classes <= high:
            noun = "classes" if self.task == "multiclass" else "labels"
            raise DataError(
                f"{self.num_classes} {noun} do not suit a {self.task} task with {self.num_features} latent features",
                where=f"the number of {noun}",
                valid=f"{low} to {high}",
            )

    @property
    def source_features(self) -> Bools:
        """Which latent features have the source's statistics: bool (D,)."""
        return _first(self.num_features, self.shared_features)

    @property
    def source_directions(self) -> Bools:
        """Which generative directions are the source's: bool (D,)."""
        share = self.similarity if self.shared_directions is None else self.shared_directions
        return _first(self.num_features, share)

    @property
    def source_codes(self) -> Bools:
        """Which classes or labels have the source's code: bool (num_classes,)."""
        return _first(self.num_classes, 1.0 if self.role == "source" else self.shared_rule)

    @cached_property
    def codes(self) -> Bools:
        """Which latent features are on in a class or for a label: bool (num_classes, D), the label rule.

        Codes are distinct. Where a code of the target's own is one of the shared ones, its class takes the own code
        that the shared one has displaced, so all other classes keep theirs.
        """
        source, own = self._codes("source"), self._codes(self.role)
        shared = source[self.source_codes]
        codes = np.where(self.source_codes[:, None], source, own)
        for row in np.flatnonzero(~self.source_codes):
            while (taken := (shared == codes[row]).all(1)).any():
                codes[row] = own[taken.argmax()]
        return codes

    def _codes(self, role: Role) -> Bools:
        """Codes of a task that shares none: bool (num_classes, D); those of the first classes never depend on more."""
        classes, features = self.num_classes, self.num_features
        if self.task != "multiclass":
            order = uniform(self.seed, f"{role} code", np.arange(1), features)[0].argsort(kind="stable")
            findings: Bools = order[:classes, None] == np.arange(features)
            return findings
        codes = np.zeros((classes, features))  # as floats, whose matrix products are fast
        rank = uniform(self.seed, f"{role} code", np.arange(classes), 64, features).argsort(-1, kind="stable")
        candidates = np.zeros(rank.shape)
        np.put_along_axis(candidates, rank[..., :CODE], 1, axis=-1)
        for row in range(classes):  # take the candidate least like any earlier class, then least like all
            overlap = candidates[row] @ codes[:row].T
            likeness = overlap.max(-1, initial=0) * (CODE * row + 1) + overlap.sum(-1)
            codes[row] = candidates[row, likeness.argmin()]
        return codes > 0

    @cached_property
    def occurrence(self) -> tuple[Ints, Floats]:
        """Law of the latent features that flip or stray: with whom, int64 (D,), and how often, float64 (D,).

        Feature d does where uniform draw number `with whom[d]` of the image is below its rate: features with one draw
        come and go together.
        """
        features, base = np.arange(self.num_features), FLIP if self.task == "multiclass" else STRAY
        own = self._uniform("occurrence", features, 2)
        troupe = (own[:, 0] * -(-self.num_features // TROUPE)).astype(np.int64)
        rate = np.where(self.source_features, base, 2 * base * own[:, 1])
        if self.task != "multiclass":
            rate[self.codes.any(0)] = 0
        return np.where(self.source_features, features, troupe), rate

    def labels(self, index: Ints) -> Ints | NDArray[np.float32]:
        """Labels of the images, without rendering them.

        Classes are balanced exactly: every num_classes images, counted from image 0, hold each class once.

        Args:
            index: Which images, int64 (n,), 0 or more.

        Returns:
            int64 (n,) for multi-class; float32 (n, num_classes) of 1 / 0 for binary and multi-label.

        Raises:
            DataError: An index that is negative or no integer, or an array that is not flat.
        """
        index = checked_index(index)
        if self.task == "multiclass":
            block, place = np.divmod(index, self.num_classes)
            turn = self._uniform("label", block, 1)[:, 0] * self.num_classes
            return (place + turn.astype(np.int64)) % self.num_classes
        prevalence = np.linspace(*PREVALENCE, self.num_classes)
        return (self._uniform("label", index, self.num_classes) < prevalence).astype(np.float32)

    def latents(self, index: Ints) -> NDArray[np.float32]:
        """Latent features of the images: float32 (n, D), 0 = absent, else the strength, 0.7 to 1.3.

        Args and errors as for `labels`.
        """
        index = checked_index(index)
        labels = self.labels(index)
        coded = self.codes[labels.astype(np.int64)] if self.task == "multiclass" else labels @ self.codes > 0
        draws = self._uniform("latent", index, 2, self.num_features)
        troupe, rate = self.occurrence
        return ((coded ^ (draws[:, 0, troupe] < rate)) * (0.7 + 0.6 * draws[:, 1])).astype(np.float32)

    def _uniform(self, purpose: str, index: Ints, *shape: int) -> Floats:
        return uniform(self.seed, f"{self.role} {purpose}", index, *shape)


def _first(count: int, share: float) -> Bools:
    return np.arange(count) < round(share * count)


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Check that a word is one of the valid ones.

    Raises:
        DataError: It is not; the error names the nearest.
    """
    if value not in valid:
        raise DataError(
            f"{value!r} is no {name}",
            where=name,
            valid=valid,
            hint=f"did you mean {closest(value, valid)!r}?",
        )


def checked_index(index: Ints) -> Ints:
    """Return the index as int64 (n,).

    Raises:
        DataError: An index that is negative or no integer, or an array that is not flat.
    """
    index = np.asarray(index)
    if index.ndim != 1 or not (np.issubdtype(index.dtype, np.integer) or index.size == 0):
        raise DataError(
            f"index of type {index.dtype} and shape {index.shape}",
            where="index",
            valid="integers of shape (n,)",
        )
    if (index < 0).any():
        raise DataError(f"image {index.min()} does not exist", where="index", valid="0 or more")
    return index.astype(np.int64)
