import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from studies.results import (
    COLUMNS,
    DTYPES,
    ResultsError,
    check_unique,
    read_csv,
    rows_to_frame,
    write_csv,
)
from studies.statistics import SHARED, gain_over, spread_baseline, summarise, varying
from studies.store import collect


def row(**facts):
    base = {"study": "s", "cell": "c", "target": "cifar10", "architecture": "a", "protocol": "finetune"}
    return {**base, "metric": "test/accuracy", **facts}


def random_frame(seed=0, drop=0.3, folds=(None,), sources=("nih", "imagenet1k", "scratch")):
    rng = np.random.default_rng(seed)
    rows = [
        row(cell=f"{t}-{s}-{k}", target=t, source=s, shots=k, seed=e, fold=f, value=rng.random())
        for t in ("cifar10", "pets")
        for s in sources
        for k in ("1", "full")
        for e in range(4)
        for f in folds
        if rng.random() > drop
    ]
    return rows_to_frame(rows)


def test_frame_has_the_schema_and_fills_what_is_missing():
    frame = rows_to_frame([{"seed": 3, "shots": 5, "value": 0.5}, {"class_name": "", "n_test": None}])
    assert tuple(frame.columns) == COLUMNS
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
        name: str(pd.Series(dtype=DTYPES[name]).dtype) for name in COLUMNS
    }
    assert frame["shots"].tolist()[0] == "5"
    assert frame["seed"].tolist() == [3, pd.NA]
    assert frame["class_name"].isna().all()
    assert math.isnan(frame["value"].iloc[1])
    assert tuple(rows_to_frame([]).columns) == COLUMNS


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"valeu": 1.0}, r"valeu[\s\S]*did you mean 'value'"),
        ({"seed": 1.5}, "seed.*whole numbers"),
        ({"value": "high"}, "value.*numbers"),
        ({"shots": 5.0}, r"5\.0.*no number of shots"),
        ({"shots": "all"}, "all.*no number of shots"),
    ],
)
def test_unfit_rows_are_errors(facts, message):
    with pytest.raises(ResultsError, match=message) as caught:
        rows_to_frame([facts])
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)


def test_a_cell_that_ran_twice_is_an_error_that_names_the_runs():
    once = [row(run="r1", seed=0, value=0.1), row(run="r1", seed=1, value=0.2), row(run="r1", fold=1, seed=0)]
    check_unique(rows_to_frame([*once, row(run="r1", seed=0, class_name="cat")]))
    with pytest.raises(ResultsError, match=r"1 results.*2 rows[\s\S]*rows 0, 3 \(runs r1, r2\).*seed 0"):
        check_unique(rows_to_frame([*once, row(run="r2", seed=0, value=0.1)]))
    no_seed = [row(run="r1", value=0.1), row(run="r2", value=0.1)]
    with pytest.raises(ResultsError, match="rows 0, 1"):
        check_unique(rows_to_frame(no_seed))


def test_csv_round_trip_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    names = [
        "None",
        "NA",
        "nan",
        "null",
        "True",
        "1.0",
        " padded ",
        'quo"te, comma',
        "line\nbreak",
        "naïve £",
        "-",
    ]
    rows = [
        row(class_name=name, value=value, seed=i, shots=shots, energy=math.inf, fraction=None)
        for i, (name, value) in enumerate(zip(names, [*rng.random(len(names) - 1) * 1e-7, math.nan], strict=True))
        for shots in ("1", "10", "full", None)
    ]
    rows.append(row(source_n=2**62 + 1, pretrain_seed=None))
    frame = rows_to_frame(rows)
    write_csv(frame, tmp_path / "results.csv")
    pd.testing.assert_frame_equal(read_csv(tmp_path / "results.csv"), frame, check_exact=True)
    write_csv(rows_to_frame([]), tmp_path / "results.csv")
    pd.testing.assert_frame_equal(read_csv(tmp_path / "results.csv"), rows_to_frame([]))
    assert os.listdir(tmp_path) == ["results.csv"]


def test_a_csv_with_fewer_columns_is_read_and_a_foreign_one_refused(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("value,shots\n0.25,1\n0.5,full\n")
    frame = read_csv(path)
    pd.testing.assert_frame_equal(
        frame, rows_to_frame([{"value": 0.25, "shots": "1"}, {"value": 0.5, "shots": "full"}])
    )
    path.write_text("value,colour\n0.25,red\n")
    with pytest.raises(ResultsError, match=r"colour[\s\S]*some\.csv"):
        read_csv(path)
    path.write_text("value\nhigh\n")
    with pytest.raises(ResultsError, match=r"some\.csv"):
        read_csv(path)
    with pytest.raises(ResultsError, match=r"missing\.csv"):
        read_csv(tmp_path / "missing.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    write_csv(rows_to_frame([row(value=0.5)]), path)
    before = path.read_bytes()

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_csv(rows_to_frame([row(value=0.75)] * 9), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.csv"]


def write_summary(folder, rows):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"rows": rows, "status": "done"}))


def test_collect_reads_finished_runs_and_skips_the_others(tmp_path):
    write_summary(tmp_path / "b", [row(run="b", seed=1, value=math.nan)])
    write_summary(tmp_path / "a", [row(run="a", seed=0, value=0.5, shots="1"), row(run="a", metric="test/loss")])
    (tmp_path / "running").mkdir()
    assert collect(tmp_path)["run"].tolist() == ["a", "a", "b"]
    assert collect(tmp_path / "running").empty
    write_summary(tmp_path / "again", [row(run="again", seed=0, value=0.5, shots="1")])
    with pytest.raises(ResultsError, match=r"more than once[\s\S]*a, again"):
        collect(tmp_path)
    with pytest.raises(ResultsError, match="nowhere"):
        collect(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    ['{"rows": [', "[]", '{"rows": [3]}', '{"rows": [{"valeu": 1}]}', '{"rows": [{"seed": "x"}]}'],
)
def test_collect_names_the_broken_file(tmp_path, text):
    write_summary(tmp_path / "good", [row(value=0.5)])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "summary.json").write_text(text)
    with pytest.raises(ResultsError, match=r"bad/summary\.json"):
        collect(tmp_path)


def test_summary_of_a_golden_frame():
    # 0.2, 0.4, 0.6: mean 0.4, SD 0.2, t(0.975; 2) = 4.302653, half width 4.302653 * 0.2 / sqrt(3) = 0.496828
    rows = [row(source="nih", shots="1", seed=s, value=v) for s, v in enumerate((0.2, 0.4, 0.6))]
    rows += [row(source="nih", shots="full", seed=0, value=0.9), row(source="empty", seed=0, value=math.nan)]
    table = summarise(rows_to_frame(rows), ["source", "shots"]).set_index("source")
    assert table["n"].tolist() == [0, 3, 1]
    few = table.iloc[1]
    assert few[["mean", "sd"]].tolist() == pytest.approx([0.4, 0.2])
    assert few[["low", "high"]].tolist() == pytest.approx([0.4 - 0.496828, 0.4 + 0.496828], abs=1e-6)
    assert table["mean"].iloc[2] == 0.9
    assert table.iloc[2][["sd", "low", "high"]].isna().all()
    assert math.isnan(table["mean"].iloc[0])


def test_folds_of_one_seed_are_one_unit():
    rows = [row(seed=s, fold=f, value=v) for s, f, v in ((0, 0, 0.1), (0, 1, 0.3), (1, 0, 0.5), (1, 1, 0.9))]
    table = summarise(rows_to_frame(rows), ["target"])
    assert table["n"].item() == 2
    assert table["mean"].item() == pytest.approx(0.45)
    assert table["sd"].item() == pytest.approx(np.std([0.2, 0.7], ddof=1))


@pytest.mark.parametrize("folds", [(None,), (0, 1)])
def test_paired_gains_equal_a_slow_loop(folds):
    from scipy import stats

    frame = random_frame(folds=folds)
    table = gain_over(frame)
    found = {(r.target, r.source, r.shots): r for r in table.itertuples()}
    rows = frame.to_dict("records")
    expected = 0
    for target in ("cifar10", "pets"):
        for source in ("nih", "imagenet1k"):
            for shots in ("1", "full"):
                by_seed = {}
                for a in rows:
                    for b in rows:
                        same = (target, shots) == (a["target"], a["shots"]) == (b["target"], b["shots"])
                        same = same and a["seed"] == b["seed"] and (a["fold"] is b["fold"] or a["fold"] == b["fold"])
                        if same and a["source"] == source and b["source"] == "scratch":
                            by_seed.setdefault(a["seed"], []).append((a["value"], b["value"]))
                if not by_seed:
                    assert (target, source, shots) not in found
                    continue
                means = np.array([np.mean(pairs, axis=0) for pairs in by_seed.values()])
                difference = means[:, 0] - means[:, 1]
                result = found[target, source, shots]
                assert result.n == len(difference)
                assert result.gain == pytest.approx(difference.mean())
                assert [result.mean, result.baseline_mean] == pytest.approx(means.mean(0).tolist())
                if len(difference) > 1:
                    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
                    assert [result.low, result.high] == pytest.approx([interval.low, interval.high])
                    assert result.sd == pytest.approx(means[:, 0].std(ddof=1))
                else:
                    assert math.isnan(result.low)
                    assert math.isnan(result.high)
                expected += 1
    assert expected == len(table) >= 6


def test_what_differs_is_not_paired():
    scratch = row(source="scratch", shots="5", seed=0, value=0.2)
    for facts in (
        {"seed": 1},
        {"shots": "10"},
        {"target": "pets"},
        {"architecture": "b"},
        {"protocol": "linear_probe"},
    ):
        other = row(**{"source": "nih", "shots": "5", "seed": 0, "value": 0.5, **facts})
        assert gain_over(rows_to_frame([scratch, other])).empty
    assert gain_over(rows_to_frame([row(source="nih", seed=0, value=0.5)])).empty
    assert set(SHARED) <= set(gain_over(rows_to_frame([scratch])).columns)


def test_a_run_from_scratch_is_the_partner_of_every_protocol():
    rows = [row(source="nih", protocol=p, seed=0, value=v) for p, v in (("finetune", 0.5), ("linear_probe", 0.4))]
    rows.append(row(source="scratch", protocol="scratch", seed=0, value=0.3))
    table = gain_over(rows_to_frame(rows))
    assert dict(zip(table["protocol"], table["gain"].round(6), strict=True)) == {
        "finetune": 0.2,
        "linear_probe": 0.1,
    }
    rows.append(row(source="scratch", protocol="linear_probe", seed=0, value=0.1))  # its own partner comes first
    table = gain_over(rows_to_frame(rows))
    assert dict(zip(table["protocol"], table["gain"].round(6), strict=True)) == {
        "finetune": 0.2,
        "linear_probe": 0.3,
    }
    alone = rows_to_frame(rows[2:3])
    pd.testing.assert_frame_equal(spread_baseline(alone), alone)


def test_settings_that_vary_inside_a_group_are_found():
    rows = [row(source="nih", shots="1", method=m, image_size=64) for m in ("clip", "simclr")]
    rows.append(row(source="scratch", shots="1", image_size=96))
    frame = rows_to_frame(rows)
    assert varying(frame, ["source", "shots"], ["method", "image_size", "selection"]) == ["method"]
    assert varying(frame, ["shots"], ["method", "image_size"]) == ["method", "image_size"]


def test_importing_the_report_loads_no_heavy_library():
    code = "import sys, studies.report; print(*{'matplotlib', 'torch', 'scipy.stats'}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
