"""Our result rows beside published ones: one vocabulary, matched cells, differences in SDs over seeds."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from studies import published
from studies.results import COLUMNS, DTYPES
from studies.statistics import CONFIDENCE, summarise, varying

CELL = ("target", "source", "architecture", "shots", "metric")
"""What a published and an own cell have in common. Methods have to agree where both are known."""

NOTE = (
    "Differences are ours minus published, in units of the SD over fine-tuning seeds. This SD and the intervals leave "
    "out pre-training, of which the papers have one run a source: even a difference of many SDs can lie within what "
    "another pre-training run would change."
)

# Names of the papers → names of our data modules and of timm; other names are the same or unknown to us.
TARGETS = {
    "padchest": "padchest_cl",  # paper A's target is the single-label variant
    "covidx_cxr2": "covidx",
    "CALTECH101": "caltech101",
    "CIFAR100": "cifar100",
    "CLIPART": "domainnet_clipart",
    "REAL": "domainnet_real",
    "CameraTraps": "camera_traps",
    "CassavaLeafDisease": "cassava",
    "DTD": "dtd",
    "EuroSAT": "eurosat",
    "PETS": "oxford_pets",
}
SOURCES = {"IN1K": "imagenet1k", "Scratch": "scratch"}
ARCHITECTURES = {"RN50": "resnet50", "VITB32": "vit_base_patch32_clip_224"}
METHODS = {  # paper B's methods → method and protocol
    "CLIP": ("clip", "finetune"),
    "CLIP_LP-FT": ("clip", "lp_ft"),
    "SimCLR_LP-FT": ("simclr", "lp_ft"),
    "Supervised": ("supervised", "finetune"),
}
SAME_METRICS = ["accuracy", "mean_auroc", "mean_average_precision"]
"""Paper A's metrics that mean the same as ours; its class-0 columns follow a class order of its own."""

#: Columns of our rows that make a comparison of its own, and those that do so where they vary.
KIND = ("method", "protocol", "source_dials", "dials", "split_policy", "label_policy")
SETTINGS = ("study", "source_n", "transfer_depth", "frozen_depth", "granularity", "image_size", "selection")


def cherti2022_rows() -> pd.DataFrame:
    """Paper A's runs as result rows: three metrics each, five seeds, fine-tuning, last step."""
    table = published.load("cherti2022").rename(columns={"last_step": "step"})
    run = ["target", "source", "architecture", "shots", "seed", "step"]
    rows = table.melt(run, SAME_METRICS, var_name="metric", value_name="value")
    splits = {"oxford_flowers102": "train and test reversed", "padchest": "by image, patients on both sides"}
    rows = rows.assign(split_policy=rows["target"].map(splits), method="supervised", protocol="finetune")
    return _result_rows(rows.assign(study="cherti2022", selection="last"))


def entezari2023_rows() -> pd.DataFrame:
    """Paper B's cells as result rows: accuracy of one unnamed seed, chosen on the test set; without "zero" shots."""
    table = published.load("entezari2023")
    rows = table[table["shot"] != "zero"].rename(columns={"arch": "architecture", "shot": "shots", "n_grid": "trials"})
    method, protocol = (rows["method"].map({name: pair[i] for name, pair in METHODS.items()}) for i in range(2))
    scratch = rows["source"].eq("Scratch")
    labelled = scratch | method.eq("supervised")
    rows = rows.assign(
        # A source is data and method, as in configs/studies/entezari2023.yaml: clip_cc12m, simclr_cc12m.
        source=rows["source"].where(labelled, method + "_" + rows["source"].str.lower()),
        study="entezari2023",
        method=method.mask(scratch),
        protocol=protocol,
        metric="accuracy",
        value=rows["acc"] / 100,
        selection="best test/accuracy",
        split_policy=rows["test_subsampled"].map({True: "test set subsampled"}),
    )
    return _result_rows(rows)


def published_rows() -> pd.DataFrame:
    """All published values as result rows: column "study" names the paper, values are fractions."""
    return pd.concat([cherti2022_rows(), entezari2023_rows()], ignore_index=True)


def _result_rows(rows: pd.DataFrame) -> pd.DataFrame:
    names = {"target": TARGETS, "source": SOURCES, "architecture": ARCHITECTURES}
    own = {column: rows[column].map(lambda name, table=table: table.get(name, name)) for column, table in names.items()}
    return rows.assign(**own).reindex(columns=list(COLUMNS)).astype(DTYPES).reset_index(drop=True)


def comparable(ours: pd.DataFrame) -> pd.DataFrame:
    """Our values that could meet a published one: in shots, over all classes and images; metrics without "test/"."""
    whole = ours["class_name"].isna() & ours["subgroup"].isna() & ours["num_images"].isna()
    rows = ours[whole & ours["shots"].notna() & ours["fraction"].fillna(1).eq(1)]
    return rows.assign(metric=rows["metric"].str.removeprefix("test/")).dropna(subset=["value"])


def standardised_differences(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Hold our cells against the published ones of the same target, source, architecture, shots and metric.

    Methods have to agree where both are known. Where a published cell has our protocol, published cells under other
    protocols are left out; otherwise they are compared, and the caveats say so.

    Args:
        ours: Result rows. Architectures and data sets match by name: timm's, and `name` of the data modules.
        theirs: From `published_rows`.

    Returns:
        One row a pair of cells, sorted: `CELL`, `KIND` and varying settings of ours; "n", "mean", "sd" over our
        seeds; "paper", "published_method", "published_protocol", "published_n", "published_mean", "published_sd";
        "difference" (ours − published), "low" and "high", its 95 % t interval if both spread alike; "standardised":
        the difference over the pooled SD, with one published seed over our SD; "unit": which SD that is, or why there
        is none; "caveats": what else tells the two apart, or "". Metrics are fractions. Empty where nothing matches.
    """
    pairs = _pairs(own_cells(comparable(ours)), published_cells(theirs))
    free = (pairs["n"] - 1).clip(lower=0), (pairs["published_n"] - 1).clip(lower=0)
    degrees = (free[0] + free[1]).to_numpy(dtype=float)
    squares = sum(part * pairs[name].fillna(0) ** 2 for part, name in zip(free, ("sd", "published_sd"), strict=True))
    pooled = np.sqrt(np.asarray(squares, dtype=float) / np.where(degrees > 0, degrees, np.nan))
    spread = pooled > 1e-9  # else runs that do not differ, up to rounding
    difference = (pairs["mean"] - pairs["published_mean"]).to_numpy(dtype=float)
    units = np.where(free[1] == 0, "our SD", np.where(free[0] == 0, "published SD", "pooled SD"))
    why = np.where(degrees > 0, "none: the runs do not differ", "none: one run on each side")
    error = pooled * np.sqrt((1 / pairs["n"] + 1 / pairs["published_n"]).to_numpy(dtype=float))
    half = np.where(spread, stdtrit(np.maximum(degrees, 1), (1 + CONFIDENCE) / 2) * error, np.nan)
    pairs = pairs.assign(
        difference=difference,
        low=difference - half,
        high=difference + half,
        standardised=np.divide(difference, pooled, out=np.full(len(pairs), np.nan), where=spread),
        unit=np.where(spread, units, why),
        caveats=_caveats(pairs),
    )
    hidden = ["published_split", "published_selection", "published_trials", "short_runs"]
    return pairs.drop(columns=hidden)


def own_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and SDs over seeds of the rows of `comparable`; settings that vary inside a cell stay apart.

    Returns:
        `CELL`, `KIND`, the columns of `SETTINGS` (and "pretrain_seed") that vary, "n", "mean", "sd", "low", "high".
    """
    by = [*CELL, *KIND]
    by += varying(rows, by, SETTINGS)
    by += varying(rows, [*by, "seed", "fold"], ["pretrain_seed"])
    return summarise(rows, by)


def published_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and SDs over seeds of `published_rows`, and the facts that caveats speak of.

    Returns:
        "paper", `CELL`, and with the prefix "published_": "method", "protocol", "n", "mean", "sd", "split",
        "selection", "trials"; "short_runs": how many of paper A's runs end early.
    """
    by = ["study", *CELL, "method", "protocol"]
    cells = summarise(rows, by)
    groups = rows.assign(short=rows["step"].eq(400)).groupby(by, dropna=False)
    facts = groups.agg(
        published_split=("split_policy", "first"),
        published_selection=("selection", "first"),
        published_trials=("trials", "first"),
        short_runs=("short", "sum"),
    )
    cells = cells.drop(columns=["low", "high"]).merge(facts.reset_index(), on=by)
    renamed = {name: f"published_{name}" for name in ("method", "protocol", "n", "mean", "sd")}
    return cells.rename(columns={"study": "paper", **renamed})


def _pairs(own: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Our cells with the published ones they stand beside."""
    pairs = own.drop(columns=["low", "high"]).assign(cell=range(len(own))).merge(theirs, on=list(CELL))
    unknown = pairs["method"].isna() | pairs["published_method"].isna()
    pairs = pairs[unknown | pairs["method"].eq(pairs["published_method"]).fillna(False).astype(bool)]
    same = pairs["protocol"].eq(pairs["published_protocol"]).fillna(False).astype(bool)
    found = same.groupby([pairs["cell"], pairs["paper"]]).transform("any").astype(bool)
    pairs = pairs[same | ~found].drop(columns="cell")
    pairs = pairs.assign(order=pd.to_numeric(pairs["shots"], errors="coerce"))  # "full" comes last
    order = ["paper", "metric", "target", "source", "architecture", "order", "protocol"]
    return pairs.sort_values(order, ignore_index=True).drop(columns="order")


def _caveats(pairs: pd.DataFrame) -> pd.Series:
    """What tells our cell and the published one apart besides chance, in words."""
    texts = pd.Series("", index=pairs.index, dtype=object)
    for holds, text in _rules(pairs):
        chosen = holds.fillna(False).astype(bool)
        words = pd.Series(text, index=pairs.index, dtype=object)[chosen]
        texts[chosen] = texts[chosen] + np.where(texts[chosen] == "", "", "; ") + words
    return texts


def _rules(pairs: pd.DataFrame) -> Iterator[tuple[pd.Series, str | pd.Series]]:
    """Caveats: the pairs for which each holds, and its words, for all of them or one by one."""
    number = {name: pairs[name].astype("string") for name in ("published_n", "published_trials", "short_runs")}
    yield pairs["n"] == 1, "one seed of ours"
    yield pairs["published_n"] == 1, "one published seed"
    other = "our protocol is " + pairs["protocol"] + ", theirs " + pairs["published_protocol"]
    same = pairs["protocol"].eq(pairs["published_protocol"])
    # A single run from scratch says so where a study names the recipe.
    same |= pairs["source"].eq("scratch") & pairs["protocol"].isin(["scratch", "finetune"])
    yield ~same, other
    yield pairs["method"].isna() & pairs["source"].ne("scratch"), "our source's method is unknown"
    yield pairs["dials"].notna(), "our target is changed: " + pairs["dials"]
    yield pairs["source_dials"].notna(), "our source is changed: " + pairs["source_dials"]
    yield (pairs["target"] == "cifar100") & (pairs["shots"] == "500"), "500 shots are the full training set"

    a, flowers, covidx, padchest = (
        *(pairs["paper"] == "cherti2022",),
        *(pairs["target"] == name for name in ("oxford_flowers102", "covidx", "padchest_cl")),
    )
    # Folds and hashes test on images of their own; the papers' other splits are official, or named below.
    other_split = pairs["split_policy"].str.contains("fold|hash").fillna(False).astype(bool)
    yield other_split, "tested on other images, our split: " + pairs["split_policy"]
    own_split = ~pairs["split_policy"].str.startswith("cherti2022").fillna(False).astype(bool)
    own_labels = ~pairs["label_policy"].str.contains("cherti2022").fillna(False).astype(bool)
    reversed_split = "published: reversed split, trained on the 6,149 images that the literature tests on"
    yield a & (pairs["published_n"] < 5), "published: " + number["published_n"] + " of 5 seeds"
    yield a & (pairs["short_runs"] > 0), "published: runs that end at step 400, not 500: " + number["short_runs"]
    yield a & flowers & own_split, reversed_split
    yield a & padchest & own_split, "published: split by image, patients on both sides"
    yield a & padchest & own_labels, "published: labels by substring search"
    yield a & (pairs["shots"] == "full") & (flowers | covidx), "published: rare classes oversampled"
    yield a & covidx & pairs["source"].str.contains("nih"), "negatives are NIH images, which the source may hold"
    binary = covidx | (pairs["target"] == "tuberculosis")
    positive = "published: mean over both classes; ours: the positive class"
    yield a & binary & (pairs["metric"] == "mean_average_precision"), positive

    b, clip = pairs["paper"] == "entezari2023", pairs["published_method"].eq("clip") | pairs["source"].eq("scratch")
    chosen = "published: epoch and best of " + number["published_trials"] + " grid points chosen on the test set"
    chosen = chosen.mask(pairs["published_trials"] == 1, "published: epoch chosen on the test set")
    yield b & (pairs["published_selection"] == "best test/accuracy"), chosen
    yield b & (pairs["published_split"] == "test set subsampled"), "published: tested on a part of the test set"
    yield b & clip & (pairs["architecture"] == "resnet50"), "published: CLIP's variant of ResNet-50"
    yield b & pairs["source"].isin(["clip_laion2b", "clip_laion0m"]), "published: rows of this source mix architectures"
