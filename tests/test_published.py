"""Published results: the tables as they are, the papers' headline numbers, and our cells held against theirs."""

import csv
import hashlib
import math
import statistics
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from studies import overlay, published
from studies.overlay_figures import KEYS, overlay_figure
from studies.results import COLUMNS, DTYPES, check_unique

FOLDER = Path(published.__file__).parent
LARGE, SMALL = "resnetv2_152x4_bit", "resnetv2_50x1_bit"
FOUR = "chexpert+mimic+nih+padchest"


@pytest.fixture(scope="module")
def theirs():
    return overlay.published_rows()


def runs(target, source, architecture, shots, metric="accuracy"):
    """Values in percent straight from the file, without pandas."""
    with (FOLDER / "cherti2022.csv").open(newline="") as file:
        wanted = {"target": target, "source": source, "architecture": architecture, "shots": shots}
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]
    return [100 * float(row[metric]) for row in rows]


def cell(rows, **wanted):
    """Mean and SD in percent of the matching result rows."""
    chosen = rows[np.logical_and.reduce([rows[name].eq(value).fillna(False) for name, value in wanted.items()])]
    return 100 * chosen["value"].mean(), 100 * chosen["value"].std()


# The files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "digest"),
    [
        ("cherti2022", 1440, "eca73bcfb0a025f35081d9602fdc327edd6c3d720a84005aa5e9cbde04cb27bc"),
        ("entezari2023", 908, "3bb70ec763220a61e246192882beeebc6024b04aed19732794acbe5132973f5b"),
    ],
)
def test_tables_are_the_published_files(name, rows, digest):
    content = (FOLDER / f"{name}.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    frame = published.load(name)
    header, *lines = csv.reader(content.decode().splitlines())
    assert (list(frame.columns), len(frame), len(lines)) == (header, rows, rows)
    shots = frame["shots" if name == "cherti2022" else "shot"]
    assert shots.map(type).eq(str).all()
    assert {"1", "5", "10", "full"} <= set(shots)
    assert frame.notna().all(axis=None)
    for line, values in zip(lines[::97], frame.iloc[::97].itertuples(index=False), strict=True):
        assert [str(value) if isinstance(value, str | bool) else float(value) for value in values] == [
            text if isinstance(value, str | bool) else float(text) for text, value in zip(line, values, strict=True)
        ]


def test_unknown_tables_are_named_with_the_known_ones():
    with pytest.raises(DataError, match="cherti2021") as error:
        published.load("cherti2021")
    assert "cherti2022, entezari2023" in str(error.value)
    assert "did you mean 'cherti2022'?" in str(error.value)


def test_only_five_of_paper_as_runs_are_unpublished():
    frame = published.load("cherti2022")
    seeds = frame.groupby(["target", "source", "architecture", "shots"])["seed"].agg(set)
    assert len(seeds) == 289
    short = {key: value for key, value in seeds.items() if value != {0, 1, 2, 3, 4}}
    pets = {("oxford_pets", "imagenet1k", SMALL, shots) for shots in ("1", "5", "10", "full")}
    assert set(short) == pets | {("padchest", "chexpert+mimic", SMALL, "10")}
    assert all(value == {0, 1, 2, 3} for value in short.values())
    assert frame.groupby(["source", "architecture"]).ngroups == 15


# Result rows ----------------------------------------------------------------------------------------------------------


def test_rows_are_result_rows_of_names_that_data_modules_have(theirs):
    assert tuple(theirs.columns) == COLUMNS
    assert {name: str(kind) for name, kind in theirs.dtypes.items()} == {
        name: str(pd.Series(dtype=kind).dtype) for name, kind in DTYPES.items()
    }
    check_unique(theirs)
    assert theirs["value"].between(0, 1).all()
    assert theirs["study"].value_counts().to_dict() == {"cherti2022": 3 * 1440, "entezari2023": 908 - 150}
    known = {"domainnet_real", "domainnet_clipart"} | _names()  # DomainNet's name follows its domain
    assert set(theirs["target"]) <= known
    a, b = (theirs[theirs["study"] == name] for name in ("cherti2022", "entezari2023"))
    assert {part for name in set(a["source"]) for part in name.split("+")} <= known
    assert {"imagenet1k", "scratch"} <= set(b["source"])


def _names():
    for package in ("natural", "chest_xray"):
        folder = Path(import_module(f"datamodules.{package}").__file__).parent
        for path in folder.glob("[a-z]*.py"):
            import_module(f"datamodules.{package}.{path.stem}")
    found, waiting = set(), [BaseDataModule]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        found |= {kind.__dict__["name"]} if "name" in kind.__dict__ else set()
    return found


def test_architectures_are_timms():
    timm = pytest.importorskip("timm")
    assert set(overlay.published_rows()["architecture"]) <= set(timm.list_models())


def test_rows_hold_the_files_values(theirs):
    for target, ours, source, architecture, shots, metric in [
        ("padchest", "padchest_cl", "chexpert+mimic", SMALL, "10", "mean_average_precision"),
        ("covidx_cxr2", "covidx", FOUR, LARGE, "500", "mean_auroc"),
    ]:
        values = runs(target, source, architecture, shots, metric)
        wanted = {"target": ours, "source": source, "architecture": architecture, "shots": shots, "metric": metric}
        expected = (statistics.fmean(values), statistics.stdev(values))
        assert cell(theirs, **wanted) == pytest.approx(expected, abs=1e-9)
    wanted = {"target": "domainnet_real", "source": "imagenet1k", "architecture": "resnet50", "shots": "full"}
    assert cell(theirs, **wanted, method="supervised")[0] == pytest.approx(85.1)


# Golden values --------------------------------------------------------------------------------------------------------


def test_natural_to_natural(theirs):
    common = {"metric": "accuracy", "source": "imagenet21k"}
    one_shot = cell(theirs, **common, target="cifar100", architecture=LARGE, shots="1", method="supervised")
    assert one_shot == pytest.approx((41.63, 2.85), abs=0.006)
    for target, few, full in [
        ("cifar100", 15.2, 6.1),
        ("cifar10", 15.5, 2.0),
        ("oxford_pets", 19.4, 6.0),
        ("oxford_flowers102", 16.2, 1.3),
    ]:
        large, small = (
            [cell(theirs, **common, target=target, architecture=name, shots=shots)[0] for shots in ("1", "full")]
            for name in (LARGE, SMALL)
        )
        assert np.subtract(large, small) == pytest.approx([few, full], abs=0.051)
    more_data = {
        (target, shots): cell(theirs, **common, target=target, architecture=LARGE, shots=shots)[0]
        - cell(theirs, metric="accuracy", source="imagenet1k", target=target, architecture=LARGE, shots=shots)[0]
        for target in ("cifar10", "cifar100", "oxford_flowers102", "oxford_pets")
        for shots in ("1", "full")
    }
    pets = [more_data.pop(("oxford_pets", shots)) for shots in ("1", "full")]
    assert pets == pytest.approx([-3.2, -0.1], abs=0.051)
    assert min(more_data.values()) > 0


def test_medical_targets(theirs):
    growing = ["chexpert", "chexpert+mimic", "chexpert+mimic+nih", FOUR]
    common = {"architecture": LARGE, "shots": "full"}
    tuberculosis = [
        cell(theirs, **common, target="tuberculosis", metric="accuracy", source=name)[0] for name in growing
    ]
    assert tuberculosis == pytest.approx([79.01, 84.63, 87.93, 90.91], abs=0.006)

    padchest = {"target": "padchest_cl", "architecture": LARGE, "metric": "mean_auroc"}
    assert cell(theirs, **padchest, shots="full", source="imagenet21k") == pytest.approx((84.02, 0.24), abs=0.006)
    medical = {name: cell(theirs, **padchest, shots="full", source=name) for name in growing[:3]}
    assert max(medical.values()) == pytest.approx((83.14, 0.04), abs=0.006)
    few = [
        max(cell(theirs, **padchest, shots=shots, source=name)[0] for name in growing[:3])
        - cell(theirs, **padchest, shots=shots, source="imagenet21k")[0]
        for shots in ("1", "5", "10", "100")
    ]
    assert (min(few), max(few)) == pytest.approx((2.28, 5.53), abs=0.006)  # "2 to 5.5 points"

    covidx = {
        (source, metric): cell(theirs, **common, target="covidx", source=source, metric=metric)[0]
        for source in (FOUR, "imagenet21k")
        for metric in ("accuracy", "mean_auroc")
    }
    assert list(covidx.values()) == pytest.approx([83.0, 97.6, 78.9, 98.8], abs=0.051)


def test_few_shot_on_small_medical_targets_is_too_noisy_to_compare(theirs):
    rows = theirs[theirs["target"].isin(["tuberculosis", "covidx"]) & theirs["shots"].isin(["1", "5", "10"])]
    rows = rows[rows["metric"] == "accuracy"]
    place, p_values, spreads = ["target", "architecture", "shots"], [], []
    for _, group in rows.groupby(place):
        values = [part["value"].to_numpy() for _, part in group.groupby("source")]
        spreads += [100 * np.std(part, ddof=1) for part in values]
        p_values += [
            stats.ttest_ind(one, other, equal_var=False).pvalue
            for i, one in enumerate(values)
            for other in values[i + 1 :]
        ]
    assert 6 < np.median(spreads) < 18
    assert min(p_values) * len(p_values) > 0.05  # Bonferroni, which Holm's first step is


def test_sources_of_paper_b_differ_less_with_more_images(theirs):
    rows = theirs[(theirs["study"] == "entezari2023") & (theirs["target"] == "cifar100") & (theirs["method"] == "clip")]
    seven = [
        f"clip_{name}"
        for name in ("cc12m", "cc3m", "laion2.7m", "redcaps2.7m", "shutterstock2.7m", "wit2.7m", "yfcc2.7m")
    ]
    rows = rows[rows["source"].isin(seven) & (rows["protocol"] == "finetune") & (rows["architecture"] == "resnet50")]
    spread = 100 * rows.groupby("shots")["value"].agg(lambda values: values.max() - values.min())
    assert spread[["1", "20", "100", "full"]].tolist() == pytest.approx([12.6, 10.2, 6.0, 2.1], abs=0.051)


# Differences ----------------------------------------------------------------------------------------------------------


def ours(values, **columns):
    """Our result rows: one a value, with seeds in order."""
    facts = {
        **{"study": "mine", "source": "imagenet21k", "architecture": LARGE, "method": "supervised"},
        **{
            "target": "cifar100",
            "protocol": "finetune",
            "shots": "1",
            "metric": "accuracy",
            "split_policy": "official",
        },
        **columns,
    }
    rows = pd.DataFrame({"seed": range(len(values)), "value": values}).assign(**facts)
    return rows.reindex(columns=list(COLUMNS)).astype(DTYPES)


def test_differences_are_in_pooled_sds(theirs):
    own = np.array([0.40, 0.42, 0.45])
    (row,) = overlay.standardised_differences(ours(own, metric="test/accuracy"), theirs).to_dict("records")
    other = np.array(runs("cifar100", "imagenet21k", LARGE, "1")) / 100
    pooled = math.sqrt((2 * own.var(ddof=1) + 4 * other.var(ddof=1)) / 6)
    assert (row["n"], row["published_n"], row["unit"], row["caveats"]) == (3, 5, "pooled SD", "")
    assert row["mean"], row["sd"] == pytest.approx((own.mean(), own.std(ddof=1)))
    assert row["published_mean"] == pytest.approx(0.4163)
    assert row["difference"] == pytest.approx(own.mean() - other.mean())
    assert row["standardised"] == pytest.approx(row["difference"] / pooled)
    interval = stats.ttest_ind(own, other).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))


def test_one_seed_uses_the_other_sides_spread_and_none_says_why(theirs):
    b = {"source": "imagenet1k", "architecture": "resnet50", "target": "dtd", "shots": "20"}
    (row,) = overlay.standardised_differences(ours([0.60, 0.64], **b), theirs).to_dict("records")
    assert (row["paper"], row["unit"]) == ("entezari2023", "our SD")
    assert row["standardised"] == pytest.approx((0.62 - 0.65053) / np.std([0.60, 0.64], ddof=1))
    assert row["caveats"] == "one published seed; published: epoch chosen on the test set"

    (row,) = overlay.standardised_differences(ours([0.60], **b), theirs).to_dict("records")
    assert math.isnan(row["standardised"])
    assert math.isnan(row["low"])
    assert (row["unit"], row["difference"]) == ("none: one run on each side", pytest.approx(-0.05053))

    (row,) = overlay.standardised_differences(ours([0.60, 0.60], **b), theirs).to_dict("records")
    assert (math.isnan(row["standardised"]), row["unit"]) == (True, "none: the runs do not differ")

    (row,) = overlay.standardised_differences(ours([0.40]), theirs).to_dict("records")
    spread = np.std(runs("cifar100", "imagenet21k", LARGE, "1"), ddof=1) / 100
    assert (row["unit"], row["standardised"]) == ("published SD", pytest.approx((0.40 - 0.4163) / spread))


@pytest.mark.parametrize(
    ("columns", "caveats"),
    [
        (
            {"target": "oxford_flowers102", "shots": "full"},
            ["trained on the 6,149 images that the literature tests on", "rare classes oversampled"],
        ),
        ({"target": "oxford_flowers102", "split_policy": "cherti2022: train and test reversed, official"}, []),
        ({"shots": "500"}, ["500 shots are the full training set"]),
        (
            {"target": "padchest_cl", "shots": "10", "source": "chexpert+mimic", "architecture": SMALL},
            ["4 of 5 seeds", "split by image", "labels by substring search"],
        ),
        (
            {
                **{"target": "padchest_cl", "split_policy": "cherti2022: by image, patients on both sides"},
                "label_policy": "ontology 1, cherti2022 labels",
            },
            [],
        ),
        (
            {"target": "tuberculosis", "source": FOUR, "metric": "mean_average_precision"},
            ["end at step 400, not 500: 4", "mean over both classes"],
        ),
        ({"target": "covidx", "source": FOUR}, ["negatives are NIH images"]),
        ({"protocol": "linear_probe"}, ["our protocol is linear_probe, theirs finetune"]),
        ({"dials": "label noise 0.2"}, ["our target is changed: label noise 0.2"]),
        ({"method": None}, ["our source's method is unknown"]),
        ({"split_policy": "5 folds by group"}, ["tested on other images, our split: 5 folds by group"]),
        ({"target": "tuberculosis", "shots": "full", "split_policy": "hash"}, ["our split: hash"]),
        (
            {"target": "domainnet_clipart", "shots": "5", "source": "clip_laion2b"}
            | {"architecture": "vit_base_patch32_clip_224", "method": "clip"},
            ["one published seed", "chosen on the test set", "on a part of the test set", "mix architectures"],
        ),
        (
            {"source": "scratch", "architecture": "resnet50", "protocol": "scratch", "shots": "full"},
            ["one published seed", "best of 3 grid points chosen on the test set", "CLIP's variant of ResNet-50"],
        ),
    ],
)
def test_caveats_are_those_of_the_cell(theirs, columns, caveats):
    (row,) = overlay.standardised_differences(ours([0.5, 0.6], **columns), theirs).to_dict("records")
    said = row["caveats"].split("; ") if row["caveats"] else []
    if columns.get("metric") == "mean_average_precision":
        said = [*said[:-2], "; ".join(said[-2:])] if said[-1].startswith("ours:") else said
    assert len(said) == len(caveats), row["caveats"]
    assert all(words in text for words, text in zip(caveats, said, strict=True)), row["caveats"]


def test_what_does_not_match_is_left_out(theirs):
    others = [
        *({"target": "cifar10", "architecture": "resnet50"}, {"source": "nih"}, {"shots": "20"}, {"method": "simclr"}),
        *({"class_name": "apple"}, {"subgroup": "sex=F"}, {"num_images": 100, "shots": None}, {"fraction": 0.5}),
        {"metric": "loss"},
    ]
    own = pd.concat([ours([0.4, 0.5], **columns) for columns in others])
    assert overlay.standardised_differences(own, theirs).empty
    assert overlay.standardised_differences(ours([]), theirs).empty
    whole = pd.concat([own, ours([0.3, 0.2, np.nan])])
    table = overlay.standardised_differences(whole, theirs)
    assert (table["n"].tolist(), table["mean"].tolist()) == ([2], pytest.approx([0.25]))


def test_kinds_of_our_runs_are_not_averaged(theirs):
    b = {"source": "clip_cc12m", "architecture": "resnet50", "method": "clip", "target": "cifar100", "shots": "10"}
    own = pd.concat(
        [
            *(ours([0.4, 0.5], **b, protocol=name) for name in ("finetune", "lp_ft")),
            *(ours([0.3, 0.4], **b, protocol="depth", transfer_depth=depth) for depth in (1, 2)),
        ]
    )
    table = overlay.standardised_differences(own, theirs)
    pairs = table[["protocol", "published_protocol", "transfer_depth"]].fillna(0).itertuples(index=False, name=None)
    # A protocol that the paper has meets itself; one that it has not meets both, with a caveat.
    both = [("depth", name, depth) for name in ("finetune", "lp_ft") for depth in (1, 2)]
    assert sorted(pairs) == sorted([("finetune", "finetune", 0), ("lp_ft", "lp_ft", 0), *both])
    published_means = table.drop_duplicates("published_protocol").set_index("published_protocol")["published_mean"]
    assert published_means.to_dict() == pytest.approx({"finetune": 0.4506, "lp_ft": 0.5004})


def test_the_papers_against_themselves_differ_by_nothing(theirs):
    table = overlay.standardised_differences(theirs.assign(study="mine"), theirs)
    assert len(table) == 3 * 289 + 758
    assert table["difference"].abs().max() == 0
    assert (table["standardised"].dropna() == 0).all()


# The figure -----------------------------------------------------------------------------------------------------------


def test_figure_has_a_panel_for_each_target_and_architecture(theirs):
    own = pd.concat(
        ours([0.3, 0.35, 0.4], target=target, architecture=architecture, source=source, shots=shots)
        for target in ("cifar10", "cifar100")
        for architecture in (LARGE, SMALL)
        for source in ("imagenet21k", "imagenet1k")
        for shots in ("1", "10", "full")
    )
    own = pd.concat([own, ours([0.1, 0.2], target="cifar10", architecture="test_resnet")])  # nothing to stand on
    colours = {"imagenet21k": "#112233", "imagenet1k": "#445566", "scratch": "#777777"}
    figure = overlay_figure(own, theirs, colours=colours)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"{target}\n{name}" for target in ("cifar10", "cifar100") for name in (LARGE, SMALL)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["imagenet1k", "imagenet21k", *list(KEYS)[:2]]
    used = {line.get_color() for axes in figure.axes for line in axes.lines} - {"C0"}
    assert {"#112233", "#445566"} <= used
    solid = [line for line in figure.axes[2].lines if line.get_linestyle() == "-" and line.get_color() == "#112233"]
    assert [list(line.get_ydata()) for line in solid] == [pytest.approx([35.0, 35.0])]  # "full" is across the break
    dashed = [line for line in figure.axes[2].lines if line.get_linestyle() == "--" and line.get_color() == "#112233"]
    assert dashed[0].get_ydata()[0] == pytest.approx(41.63)
    bands = [one.get_paths()[0].vertices[:, 1] for one in figure.axes[2].collections if one.get_alpha()]
    assert any(41.63 + 2.8549 == pytest.approx(y, abs=1e-3) for band in bands for y in band)


def test_figure_shows_other_sources_in_grey_and_needs_a_match(theirs, tmp_path):
    own = ours([0.8, 0.82], target="tuberculosis", source="chexpert", shots="full")
    figure = overlay_figure(own, theirs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chexpert", *KEYS]
    grey = [line for line in figure.axes[0].lines if line.get_color() == KEYS["published: others"]["color"]]
    assert len({tuple(line.get_ydata()) for line in grey if line.get_linestyle() == "-"}) == 8
    figure.savefig(tmp_path / "overlay.png")
    with pytest.raises(DataError, match="no cell of these results is published"):
        overlay_figure(ours([0.5], architecture="test_resnet"), theirs)
