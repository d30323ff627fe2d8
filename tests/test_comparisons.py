"""All pairs on equal seeds: against scipy's paired t test, by hand, and what may not be claimed."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from datamodules.errors import DataError
from studies.comparisons import compare
from studies.results import rows_to_frame
from studies.statistics import holm


def rows_of(values, source="a", **facts):
    """Result rows, one a seed."""
    common = {"study": "s", "source": source, "target": "t", "architecture": "net", "protocol": "finetune",
              "shots": "5", "metric": "accuracy", **facts}  # fmt: skip
    return [{**common, "seed": seed, "value": value, "run": f"{source}{seed}"} for seed, value in enumerate(values)]


def test_pairs_are_the_paired_t_test_on_common_seeds():
    rng = np.random.default_rng(0)
    draw = rng.normal(size=8)
    a, b, c = (draw + rng.normal(scale=0.2, size=8) + shift for shift in (0.0, 0.8, 0.02))
    b[2] = np.nan
    frame = rows_to_frame([*rows_of(a), *rows_of(b, "b"), *rows_of(c[:6], "c")]).sample(frac=1, random_state=0)
    table = compare(frame)
    assert list(zip(table["source"], table["source_reference"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    without = np.delete(np.arange(8), 2)
    for row, ours, theirs, seeds in ((0, a, b, without), (1, a, c, np.arange(6)), (2, b, c, [0, 1, 3, 4, 5])):
        test = stats.ttest_rel(ours[seeds], theirs[seeds])
        interval, found = test.confidence_interval(0.95), table.iloc[row]
        assert found["n"] == len(seeds)
        assert found[["difference", "low", "high", "p"]].tolist() == pytest.approx(
            [(ours - theirs)[seeds].mean(), interval.low, interval.high, test.pvalue]
        )
        assert (found["mean"], found["mean_reference"]) == pytest.approx((ours[seeds].mean(), theirs[seeds].mean()))
    assert table["p_holm"].to_numpy() == pytest.approx(holm(table["p"].to_numpy()))
    assert table["verdict"].tolist() == ["lower", "not distinguishable", "higher"]
    assert set(table["unit"]) == {"seed"}


def test_what_is_no_claim():
    frame = rows_to_frame(
        [*rows_of([0.5]), *rows_of([0.9], "b"),
         *rows_of([0.5, 0.6], target="u"), *rows_of([0.6, 0.7], "b", target="u"), *rows_of([0.5, 0.6], "c", target="u")]
    )  # fmt: skip
    table = compare(frame).set_index(["target", "source", "source_reference"])
    assert table["verdict"].to_dict() == {
        ("t", "a", "b"): "one pair: no claim",
        ("u", "a", "b"): "no spread: no claim",
        ("u", "a", "c"): "not distinguishable",
        ("u", "b", "c"): "no spread: no claim",
    }
    assert table[["low", "high", "p", "p_holm"]].isna().all(axis=None)
    assert compare(frame[frame["source"] == "a"]).empty
    assert compare(frame.iloc[:0]).empty


def test_settings_stay_apart_and_folds_are_averaged():
    rng = np.random.default_rng(1)
    values = {(source, shots, fold): rng.uniform(size=4) for source in "ab" for shots in "15" for fold in range(3)}
    rows = [row for (s, shots, fold), v in values.items() for row in rows_of(v, s, shots=shots, fold=fold)]
    rows = [row for row in rows if (row["source"], row["fold"]) != ("b", 2)]  # a fold that only one of both has
    table = compare(rows_to_frame(rows)).set_index("shots")
    assert table.index.tolist() == ["1", "5"]
    for shots in "15":
        mean = {s: np.mean([values[s, shots, fold] for fold in range(2)], axis=0) for s in "ab"}
        assert table.loc[shots, "p"] == pytest.approx(stats.ttest_rel(mean["a"], mean["b"]).pvalue)
        assert table.loc[shots, "n"] == 4
        assert table.loc[shots, "unit"] == "seed, mean over folds"


def test_any_column_is_compared():
    rng = np.random.default_rng(2)
    rows = [
        row
        for source in ("a", "b")
        for net in ("large", "small")
        for row in rows_of(rng.uniform(size=3), source, architecture=net, method="clip" if source == "a" else "sup")
    ]
    by_net = compare(rows_to_frame(rows), "architecture")
    assert by_net[["source", "architecture", "architecture_reference"]].to_numpy().tolist() == [
        ["a", "large", "small"], ["b", "large", "small"],
    ]  # fmt: skip
    assert compare(rows_to_frame(rows), "method").empty  # no source has two methods
    assert len(compare(rows_to_frame(rows), ["source", "architecture"])) == 6
    protocols = [*rows_of([0.1, 0.3], transfer_depth=None), *rows_of([0.2, 0.3], protocol="depth", transfer_depth=2)]
    assert len(compare(rows_to_frame(protocols), "protocol")) == 1


def test_training_from_scratch_stands_beside_every_protocol_and_depth():
    rows = [
        *rows_of([0.1, 0.2, 0.4], "scratch", protocol="scratch", transfer_depth=0),
        *rows_of([0.3, 0.3, 0.5], protocol="finetune"),
        *rows_of([0.3, 0.4, 0.5], protocol="depth", transfer_depth=1, frozen_depth=1),
        *rows_of([0.4, 0.4, 0.5], protocol="depth", transfer_depth=2, frozen_depth=1),
    ]
    table = compare(rows_to_frame(rows))
    assert set(table["source_reference"]) == {"scratch"}
    assert sorted(table["difference"].round(6)) == [0.133333, 0.166667, 0.2]


def test_pretrainings_pair_where_both_have_several():
    rng = np.random.default_rng(3)
    own = {p: rng.uniform(size=4) for p in range(3)}
    other = {p: rng.uniform(size=4) for p in range(3)}
    rows = [row for p in own for row in rows_of(own[p], pretrain_seed=p)]
    both = rows_to_frame([*rows, *(row for p in other for row in rows_of(other[p], "b", pretrain_seed=p))])
    found = compare(both).iloc[0]
    assert (found["n"], found["pretrainings"], found["seeds"]) == (12, 3, 4)
    assert found["unit"] == "pre-training and seed"
    assert found["difference"] == pytest.approx(np.mean(list(own.values())) - np.mean(list(other.values())))
    scratch = compare(rows_to_frame([*rows, *rows_of(other[0], "scratch", protocol="scratch")])).iloc[0]
    assert (scratch["n"], scratch["pretrainings"]) == (12, 3)
    assert scratch["mean_reference"] == pytest.approx(other[0].mean())
    # Few pre-trainings that differ: the three means are what is known, not twelve values.
    shifted = [row for p in own for row in rows_of(own[p] * 0.01 + p, pretrain_seed=p)]
    table = compare(rows_to_frame([*shifted, *rows_of(other[0] * 0.01, "b", pretrain_seed=0)])).iloc[0]
    assert table["high"] - table["low"] == pytest.approx(2 * stats.t.ppf(0.975, 2) / np.sqrt(3), rel=0.05)
    assert table["verdict"] == "not distinguishable"


def test_rows_that_cannot_be_told_apart():
    frame = rows_to_frame(
        [*rows_of([0.1, 0.2], method="clip"), *rows_of([0.1, 0.2], method="sup"), *rows_of([0.1], "b")]
    )
    with pytest.raises(DataError, match=r"(?s)4 rows share .*source a, seed 0: 2 rows, unequal in method.*'method'"):
        compare(frame)
    assert len(compare(frame, ["source", "method"])) == 3
    with pytest.raises(DataError, match=r"(?s)lack the column sorce.*did you mean 'source'"):
        compare(frame, "sorce")


def test_100_000_rows_take_seconds():
    rng = np.random.default_rng(4)
    grid = pd.MultiIndex.from_product(
        [[f"s{i}" for i in range(10)], [f"t{i}" for i in range(20)], ["1", "5", "10", "full"], range(125)],
        names=["source", "target", "shots", "seed"],
    ).to_frame(index=False)
    template = rows_to_frame(rows_of([0.0])).drop(columns=["source", "target", "shots", "seed", "value"])
    frame = grid.merge(template, how="cross").assign(value=rng.uniform(size=len(grid)))
    frame = frame.astype({"source": "string[pyarrow]", "target": "string[pyarrow]", "shots": "string[pyarrow]"})
    start = time.process_time()
    table = compare(frame)
    assert time.process_time() - start < 4  # 1.3 s on an idle core
    assert len(table) == 45 * 80
    assert (table["verdict"] == "not distinguishable").mean() > 0.999


def test_comparisons_with_the_baseline_are_corrected_by_themselves():
    values = {"a": [0.5, 0.6, 0.7], "b": [0.52, 0.61, 0.75], "c": [0.4, 0.55, 0.6], "scratch": [0.3, 0.35, 0.5]}
    frame = rows_to_frame([row for name, numbers in values.items() for row in rows_of(numbers, name)])
    table = compare(frame, "source", "scratch")
    asked = (table["source"] == "scratch") | (table["source_reference"] == "scratch")
    assert (int(asked.sum()), int((~asked).sum())) == (3, 3)
    for family in (asked, ~asked):
        assert table.loc[family, "p_holm"].tolist() == pytest.approx(holm(table.loc[family, "p"].to_numpy()).tolist())
    assert compare(frame)["p_holm"].tolist() == pytest.approx(holm(table["p"].to_numpy()).tolist())
