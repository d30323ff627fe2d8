"""Depth of transfer from result rows: known curves give known best depths and regrets."""

import numpy as np
import pandas as pd
import pytest

from studies.depth import best_depths, depth_curves, depth_values, left_out, regrets
from studies.depth_report import depth_section, depth_table
from studies.report import write_report
from studies.results import rows_to_frame

TRUE = {("near", "frozen"): [30, 40, 50, 60, 70, 80], ("near", "trained"): [30, 40, 50, 60, 70, 75]}
TRUE |= {("far", "frozen"): [50, 60, 55, 40, 30, 20], ("far", "trained"): [50, 61, 60, 59, 58, 57]}


def rows(seeds=8, noise=0.02, groups=5, budgets=("5", "50")):
    """Rows of a sweep whose means are `TRUE` (percent), a little higher at the larger budget."""
    random = np.random.default_rng(0)
    found = []
    for (target, mode), means in TRUE.items():
        for depth, mean in enumerate(means):
            if depth == 0 and mode == "trained":
                continue  # from scratch is run once
            for place, shots in enumerate(budgets):
                for seed in range(seeds):
                    row = {"source": "scratch", "protocol": "scratch", "frozen_depth": 0}
                    if depth:
                        row = {"source": "source", "protocol": f"{mode} {depth}", "transfer_depth": depth}
                        row["frozen_depth"] = depth if mode == "frozen" else 0
                        if (mode, depth) == ("trained", groups):
                            row["protocol"] = "finetune"
                    value = mean / 100 + 0.05 * place + noise * random.normal()
                    row |= {
                        "run": f"{target}{mode}{depth}{shots}{seed}",
                        "target": target,
                        "shots": shots,
                        "seed": seed,
                    }
                    found.append({**row, "architecture": "net", "metric": "accuracy", "value": value, "study": "s"})
    return rows_to_frame(found)


def test_values_stand_at_their_depth_and_mode():
    values = depth_values(rows(noise=0))
    for (target, mode), means in TRUE.items():
        part = values[(values["target"] == target) & (values["mode"] == mode) & (values["shots"] == "5")]
        curve = part.groupby("depth")["value"].mean()
        np.testing.assert_allclose(100 * curve, means)
    assert len(values) == 2 * 2 * 2 * 6 * 8


def test_partly_frozen_runs_are_no_point_of_a_curve():
    frame = rows()
    partly = frame[frame["transfer_depth"].eq(3).fillna(False)].assign(frozen_depth=1, value=0.99)
    both = pd.concat([frame, partly.astype(frame.dtypes.to_dict())])
    pd.testing.assert_frame_equal(depth_values(both), depth_values(frame))


def test_a_study_without_a_sweep_has_no_depths():
    frame = rows()
    assert depth_values(frame[frame["transfer_depth"].isna()]).empty


def test_the_best_depth_is_found_and_its_interval_shrinks_with_noise():
    best = best_depths(depth_values(rows())).set_index(["target", "mode", "shots"]).sort_index()["depth"]
    assert best["near", "frozen"].tolist() == best["near", "trained"].tolist() == [5, 5]
    assert best["far", "frozen"].tolist() == [1, 1]
    noisy = best_depths(depth_values(rows(noise=0.2)))
    quiet = best_depths(depth_values(rows(noise=0.001)))
    assert (quiet["low"] == quiet["high"]).all()
    assert ((noisy["high"] - noisy["low"]) >= (quiet["high"] - quiet["low"])).all()
    assert (noisy["high"] > noisy["low"]).any()
    one = best_depths(depth_values(rows(seeds=1)))
    assert one["low"].isna().all()


def test_regret_of_fixed_policies():
    lost = regrets(depth_values(rows(noise=0.002))).set_index(["target", "policy", "shots"]).sort_index()
    assert lost.loc[("near", "freeze all")]["regret"].abs().max() < 0.003
    np.testing.assert_allclose(lost.loc[("near", "fine-tune all")]["regret"], 0.05, atol=0.005)
    np.testing.assert_allclose(lost.loc[("far", "freeze all")]["regret"], 0.41, atol=0.005)
    np.testing.assert_allclose(lost.loc[("far", "from scratch")]["regret"], 0.11, atol=0.005)
    assert (lost["low"] <= lost["regret"]).all()


def test_a_sweep_of_noise_has_no_regret_on_average():
    found = []
    for world in range(60):
        random = np.random.default_rng(world)
        frame = rows(seeds=6, budgets=("5",))
        lost = regrets(depth_values(frame.assign(value=random.normal(0.5, 0.1, len(frame)))))
        found += lost["regret"].tolist()
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_curves_and_the_report(tmp_path):
    frame = rows()
    curves = depth_curves(depth_values(frame))
    assert (curves["n"] == 8).all()
    report = write_report(frame, tmp_path, title="Depth")
    text = report.report.read_text()
    assert "## Depth of transfer" in text
    assert "| near | source | 5 | 5 [5, 5] |" in text
    figure = tmp_path / "depth_source_net_accuracy.png"
    assert figure.is_file()
    assert figure.name in text
    for name in ("depth", "best_depth", "depth_regret"):
        assert len(pd.read_csv(tmp_path / f"{name}.csv"))


@pytest.mark.parametrize("column", ["transfer_depth", "frozen_depth"])
def test_rows_without_depths_are_no_error(column, tmp_path):
    frame = rows()
    frame[column] = pd.array([None] * len(frame), dtype="Int64")
    assert set(depth_values(frame)["mode"]) <= {"frozen", "trained"}


def typed(frame, **columns):
    return frame.assign(**columns).astype(frame.dtypes.to_dict())


@pytest.mark.parametrize(
    "column", ["architecture", "granularity", "source_n", "source_dials", "method", "image_size", "dials", "study"]
)
def test_runs_that_differ_are_never_averaged(column):
    text = column not in ("source_n", "image_size")
    first, second = (typed(rows(seeds=2, noise=0), **{column: value}) for value in (("a", "b") if text else (1, 2)))
    both = pd.concat([first, typed(second, value=second["value"] / 2, run="2" + second["run"])], ignore_index=True)
    if column in ("granularity", "source_n", "source_dials", "method"):  # of the source: from scratch is run once
        both = both[(both["source"] != "scratch") | (both[column] == first[column].iloc[0])]
    values = depth_values(both)
    assert len(values) == 2 * len(depth_values(rows(seeds=2)))
    curves = depth_curves(values)
    assert (curves["sd"] < 1e-9).all()
    assert curves[curves["depth"] > 0].groupby(column)["mean"].max().tolist() == pytest.approx([0.85, 0.425])
    table = depth_table(best_depths(values), regrets(values), [column])
    assert table.count("\n| near | source |") == table.count("\n| far | source |") == 4  # two budgets each


def test_folds_and_pre_training_seeds():
    folds = pd.concat([typed(rows(seeds=3, noise=0), fold=fold) for fold in (0, 1)], ignore_index=True)
    folds.loc[folds["fold"] == 1, "value"] += 0.1
    lost = folds[~((folds["fold"] == 1) & folds["transfer_depth"].eq(5).fillna(False))]  # an unfinished fold
    best = best_depths(depth_values(lost)).set_index(["target", "mode", "shots"])
    assert best.loc[("near", "frozen", "5"), "n"] == 3
    assert (
        best_depths(depth_values(folds)).set_index(["target", "mode", "shots"]).loc[("near", "frozen", "5"), "depth"]
        == 5
    )
    one_by_one = rows()
    moved = one_by_one["source"] != "scratch"
    one_by_one.loc[moved, "pretrain_seed"] = one_by_one.loc[moved, "seed"]
    assert len(best_depths(depth_values(one_by_one))) == len(best_depths(depth_values(rows())))
    crossed = pd.concat([one_by_one, typed(one_by_one[moved], pretrain_seed=9)], ignore_index=True)
    assert set(depth_values(crossed)["pretrain_seed"].dropna()) == {*range(8), 9}


def test_what_no_curve_can_take_is_left_out_and_named(tmp_path):
    frame = rows(noise=0)
    full = frame[frame["protocol"] == "finetune"]
    unknown = typed(full, transfer_depth=pd.NA, protocol="all of it", value=0.1)
    slow = typed(full, protocol="finetune_slow", value=0.1)
    probe = typed(full, frozen_depth=pd.NA, protocol="probe ridge", value=0.1)
    lp_ft = typed(full, protocol="lp_ft", value=0.1)
    pd.testing.assert_frame_equal(depth_values(pd.concat([frame, unknown, probe, lp_ft])), depth_values(frame))
    assert left_out(frame) == []
    both = pd.concat([frame, unknown, slow], ignore_index=True)
    values = depth_values(both)
    assert not ((values["mode"] == "trained") & (values["depth"] == 5)).any()
    first, second = left_out(both)
    assert "all of it" in first
    assert "trained 5 (finetune, finetune_slow)" in second
    assert {first, second} <= set(depth_section(both, tmp_path))
    assert left_out(unknown) == []  # no sweep


def test_depth_zero_of_a_source_and_studies_without_trained_runs():
    frame = rows(noise=0)
    own = frame[frame["source"] == "scratch"]
    own = typed(own, source="source", transfer_depth=0, protocol="trained 0", value=0.01)
    values = depth_values(pd.concat([frame, own], ignore_index=True))
    assert set(values.loc[values["depth"] == 0, "value"]) == {0.01}
    frozen = frame[(frame["source"] == "scratch") | frame["frozen_depth"].gt(0)]
    assert set(regrets(depth_values(frozen))["policy"]) == {"freeze all", "from scratch"}
