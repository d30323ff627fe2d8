"""Can the source be guessed from the image? A linear probe on tiny grey images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from datamodules.errors import UnreadableImageError

if TYPE_CHECKING:
    from datamodules.base import BaseDataModule

SIDE = 32  # pixels: borders, brightness and framing remain, and most disease does not
FOLDS = 5
MIN_IMAGES = 20  # of a source, from at least FOLDS patients: fewer cannot be cross-validated
MAX_VALUES = 10  # the most frequent sources: more make each too small, and the fit slow
REGULARISATION = 0.01  # of LogisticRegression: 1,024 correlated pixels and about as many images need a strong penalty
RESAMPLES = 200  # bootstrap over patients: the ends of a 95 % interval then lie on 5 resamples each
READABLE = 0.75
"""AUROC from which a network is taken to be able to use the source: the line of `studies.provenance.FLAG_AUROC`."""


@dataclass(frozen=True)
class Probe:
    """How well a linear probe tells the source of an image that it has not seen, nor another of its patient.

    Attributes:
        provenance: What kind of source: site, scanner, view, ... or set.
        values: The sources, the most frequent first.
        images: Images of the probe.
        balanced_accuracy: Mean recall over the sources; `chance` is what guessing gives.
        auroc: Mean over the sources, each against the rest; 0.5 is chance.
        low: Lower end of its 95 % interval, by bootstrap over patients.
        high: Upper end.
    """

    provenance: str
    values: tuple[str, ...]
    images: int
    balanced_accuracy: float
    auroc: float
    low: float
    high: float

    @property
    def chance(self) -> float:
        """Balanced accuracy of a guess."""
        return 1 / len(self.values)

    @property
    def readable(self) -> bool:
        """Whether images tell their source well enough to be used."""
        return self.auroc >= READABLE and self.low > 0.5


def choose_rows(values: np.ndarray, groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose about `count` rows, the same number of every source where there are enough, at random.

    Args:
        values: Source of every row, texts (N,); "" takes no part.
        groups: Patients (N,).
        count: Rows to choose at most.
        seed: Seed of the draw.

    Returns:
        int64, ascending; empty where fewer than two sources have `MIN_IMAGES` images of `FOLDS` patients.
    """
    frame = pd.DataFrame({"value": np.asarray(values, dtype=object), "group": np.asarray(groups, dtype=object)})
    frame = frame[frame["value"] != ""]
    sizes = frame.groupby("value")["group"].agg(["size", "nunique"])
    sizes = sizes[(sizes["size"] >= MIN_IMAGES) & (sizes["nunique"] >= FOLDS)].nlargest(MAX_VALUES, "size")
    if len(sizes) < 2:
        return np.zeros(0, dtype=np.int64)
    rng = np.random.default_rng(seed)
    share = max(MIN_IMAGES, count // len(sizes))
    parts = [frame.index[frame["value"] == value].to_numpy() for value in sizes.index]
    return np.sort(np.concatenate([rng.permutation(part)[:share] for part in parts]))


def thumbnails(datamodule: "BaseDataModule", rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read images and average them to uint8 (N, 32, 32), grey; and bool (N,), false where one cannot be read.

    Unlike the fingerprints of copies, nothing is cropped or stretched: borders and brightness tell the source.
    """
    import cv2

    small = np.zeros((len(rows), SIDE, SIDE), dtype=np.uint8)
    readable = np.ones(len(rows), dtype=bool)
    for place, row in enumerate(rows.tolist()):
        try:
            image = datamodule.images([row])[0]
        except UnreadableImageError:
            readable[place] = False
            continue
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image[:, :, 0]
        small[place] = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return small, readable


def probe_source(
    provenance: str, images: np.ndarray, values: np.ndarray, groups: np.ndarray, seed: int = 0
) -> Probe | None:
    """Cross-validate a logistic regression on standardised pixels, patients held together.

    Args:
        provenance: What kind of source it is.
        images: uint8 (N, 32, 32).
        values: Source of every image, texts (N,).
        groups: Patients (N,).
        seed: Seed of the folds and of the bootstrap.

    Returns:
        None where fewer than two sources have an image in every fold.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = pd.Series(np.asarray(values, dtype=object)).value_counts().index.tolist()
    target = pd.Categorical(values, categories=names).codes.astype(np.int64)
    patients = pd.factorize(np.asarray(groups, dtype=object))[0]
    if len(names) < 2 or min(len(np.unique(patients[target == code])) for code in range(len(names))) < FOLDS:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=500))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    pixels = images.reshape(len(images), -1).astype(np.float64)
    scores = cross_val_predict(model, pixels, target, groups=patients, cv=folds, method="predict_proba")
    low, high = _interval(scores, target, patients, seed)
    return Probe(
        provenance,
        tuple(str(name) for name in names),
        len(images),
        float(balanced_accuracy_score(target, scores.argmax(axis=1))),
        _mean_auroc(scores, target),
        low,
        high,
    )


def _mean_auroc(scores: np.ndarray, target: np.ndarray) -> float:
    """Mean AUROC of every source against the rest; sources that the sample lacks, or that fill it, are left out."""
    from scipy.stats import rankdata

    found = []
    for code in range(scores.shape[1]):
        mine = target == code
        n, others = int(mine.sum()), int((~mine).sum())
        if n and others:
            rank_sum = rankdata(scores[:, code])[mine].sum()
            found.append((rank_sum - n * (n + 1) / 2) / (n * others))
    return float(np.mean(found)) if found else np.nan


def _interval(scores: np.ndarray, target: np.ndarray, patients: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean AUROC, patients drawn with replacement."""
    rng = np.random.default_rng(seed)
    order = np.argsort(patients, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(patients[order])) + 1)
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(members), len(members))
        rows = np.concatenate([members[one] for one in drawn.tolist()])
        found.append(_mean_auroc(scores[rows], target[rows]))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
