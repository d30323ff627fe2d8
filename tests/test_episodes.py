"""Episodes are nested and equal for all; their statistics against scipy, and the coverage of the intervals."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from datamodules.errors import DataError
from studies.episodes import CANDIDATE, SETTING, draw_episodes, paired_differences, summarise_episodes
from studies.results import rows_to_frame
from studies.statistics import holm

NAMES = ["cat", "dog", "emu"]


def labels_of(n=120):
    return np.arange(n) % 3


def rows_of(values, source="A", **facts):
    """Result rows, one a seed, as the probe writes them."""
    common = {"source": source, "target": "T", "protocol": "probe ridge", "shots": "5", "metric": "accuracy", **facts}
    return [{**common, "seed": seed, "value": value} for seed, value in enumerate(values)]


def frame_of(values, source="A", **facts):
    return rows_to_frame(rows_of(values, source, **facts))


# Draws ---------------------------------------------------------------------------------------------------------------


def test_episodes_are_balanced_nested_and_repeatable():
    labels, groups = labels_of(), np.arange(120) // 6
    episodes = draw_episodes(labels, groups, ["1", 5, "full"], range(4), NAMES)
    assert [(e.shots, e.seed) for e in episodes] == [("1", s) for s in range(4)] + [("5", s) for s in range(4)] + [
        ("full", 0)
    ]
    by = {(e.shots, e.seed): e.rows for e in episodes}
    for seed in range(4):
        assert (np.bincount(labels[by["5", seed]]) == 5).all()
        assert set(by["1", seed]) < set(by["5", seed])
        assert len(set(groups[by["5", seed]])) == 15  # a patient once
    assert len({tuple(by["5", seed]) for seed in range(4)}) == 4
    again = draw_episodes(labels, groups, [5], [2], NAMES)
    assert (again[0].rows == by["5", 2]).all()


def test_full_is_every_labelled_row():
    labels = np.where(np.arange(120) % 10 == 0, -1, labels_of())
    (episode,) = draw_episodes(labels, None, ["full"], [3, 4])
    assert episode.seed == 3
    assert (episode.rows == np.flatnonzero(labels >= 0)).all()
    known = np.array([[1, np.nan], [np.nan, np.nan], [0, 1], [np.nan, 0]])
    assert draw_episodes(known, None, ["full"], [0])[0].rows.tolist() == [0, 2, 3]


def test_draws_that_cannot_be():
    labels = np.append(np.zeros(50, dtype=int), [1, 1, 1])
    with pytest.raises(DataError, match=r"(?s)dog has 3.*1 to 3 shots"):
        draw_episodes(labels, None, [1, 5], range(3), NAMES[:2])
    with pytest.warns(UserWarning, match="dog has 3"):
        (episode,) = draw_episodes(labels, None, [5], [0], NAMES[:2], on_small="warn")
    assert np.bincount(labels[episode.rows]).tolist() == [5, 3]
    with pytest.raises(DataError, match=r"shots are 5, 5"):
        draw_episodes(labels, None, [5, "5"], [0])
    with pytest.raises(DataError, match=r"seeds are none"):
        draw_episodes(labels, None, [1], [])


# Means ---------------------------------------------------------------------------------------------------------------


def test_summary_is_the_t_interval_of_each_head_shots_and_metric():
    keys = ["shots", "protocol", "metric", "class_name", "transfer_depth"]
    names = [("mean_auroc", None), ("auroc", "cat")]
    cells = list(product(("10", "full", "1", "5"), ("probe knn", "probe ridge"), names, (4, 5)))
    cells = [(shots, head, *name, depth) for shots, head, name, depth in cells]
    values = dict(zip(cells, np.random.default_rng(0).uniform(size=(len(cells), 7)), strict=True))
    rows = [row for cell, value in values.items() for row in rows_of(value, **dict(zip(keys, cell, strict=True)))]
    table = summarise_episodes(rows_to_frame(rows))
    assert len(table) == len(cells)
    for row in table.to_dict("records"):
        value = values[tuple(None if pd.isna(row[key]) else row[key] for key in keys)]
        low, high = stats.t.interval(0.95, 6, value.mean(), stats.sem(value))
        found = [row[name] for name in ("n", "mean", "sd", "low", "high")]
        assert found == pytest.approx([7, value.mean(), value.std(ddof=1), low, high])
    one = table[(table["transfer_depth"] == 5) & (table["protocol"] == "probe knn") & (table["metric"] == "auroc")]
    assert one["shots"].tolist() == ["1", "5", "10", "full"]


def test_summary_of_other_columns_and_of_one_seed():
    frame = pd.DataFrame({"weights": ["A", "A", "B"], "shots": "1", "seed": [0, 1, 0], "value": [0.4, 0.6, 0.3]})
    table = summarise_episodes(frame, by=("weights", "shots"))
    assert table["mean"].tolist() == [0.5, 0.3]
    assert table["n"].tolist() == [2, 1]
    assert np.isnan(table["low"].iloc[1])


# Differences ---------------------------------------------------------------------------------------------------------


def test_differences_are_the_paired_t_test_on_common_seeds():
    rng = np.random.default_rng(1)
    draw = rng.normal(size=12)
    a, b, c = (draw + rng.normal(scale=0.2, size=12) + shift for shift in (0.0, 0.3, 0.02))
    b[3] = np.nan
    frame = pd.concat([frame_of(a), frame_of(b, "B"), frame_of(c[:9], "C")], ignore_index=True)
    table = paired_differences(frame.sample(frac=1, random_state=0), "A").set_index("source")
    assert table["n"].to_dict() == {"B": 11, "C": 9}
    for source, ours, theirs in (("B", np.delete(b, 3), np.delete(a, 3)), ("C", c[:9], a[:9])):
        test = stats.ttest_rel(ours, theirs)
        assert table.loc[source, "p"] == pytest.approx(test.pvalue)
        interval = test.confidence_interval(0.95)
        assert table.loc[source, ["low", "high"]].tolist() == pytest.approx([interval.low, interval.high])
        assert table.loc[source, "difference"] == pytest.approx((ours - theirs).mean())
    p = table["p"]
    assert table["p_holm"].to_dict() == pytest.approx({"B": min(1, 2 * p["B"]), "C": max(2 * p["B"], p["C"])})


def test_layer_groups_are_paired_from_the_last():
    short, long = [0.1, 0.3], [0.5, 0.6, 0.7]
    frame = pd.concat(
        [frame_of([v, v + 0.1], "A", transfer_depth=4 + i, architecture="bit") for i, v in enumerate(short)]
        + [frame_of([v, v + 0.1], "B", transfer_depth=11 + i, architecture="vit") for i, v in enumerate(long)]
    )
    table = paired_differences(frame, "A")
    assert table["transfer_depth"].tolist() == [12, 13]
    assert table["difference"].tolist() == pytest.approx([0.5, 0.4])
    assert paired_differences(frame[frame["source"] == "A"], "A").empty


def test_differences_without_spread():
    frame = pd.concat(
        [frame_of([1.0, 1.0]), frame_of([1.0, 1.0], "B"), frame_of([0.5, 0.5], "C"), frame_of([1.0], "D")]
    )
    table = paired_differences(frame, "A").set_index("source")
    for name in ("p", "p_holm"):
        assert table[name].to_dict() == pytest.approx({"B": 1.0, "C": np.nan, "D": np.nan}, nan_ok=True)
    assert table.loc["C", ["difference", "low", "high"]].tolist() == pytest.approx([-0.5, np.nan, np.nan], nan_ok=True)
    values = np.array([0.35, 0.45, 0.6])  # differences of 0.1 but for their last digits
    rounded = paired_differences(pd.concat([frame_of(values), frame_of(values + 0.1, "B")]), "A")
    assert rounded[["low", "p", "p_holm"]].isna().all(axis=None)


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(2)
    for _ in range(50):
        p = rng.uniform(size=8) ** 4
        corrected = holm(np.append(p, np.nan))
        assert np.isnan(corrected[-1])
        for level in (0.01, 0.05, 0.2):
            rejected = np.zeros(8, dtype=bool)
            for step, place in enumerate(np.argsort(p)):
                if p[place] > level / (8 - step):
                    break
                rejected[place] = True
            assert ((corrected[:-1] <= level) == rejected).all()


def test_frames_that_cannot_be_read():
    frame = frame_of([0.1, 0.2])
    with pytest.raises(DataError, match=r"(?s)no results of 'Bit'.*did you mean 'bit'"):
        paired_differences(frame.assign(source="bit"), "Bit")
    with pytest.raises(DataError, match=r"(?s)4 result rows share an episode.*source A.*seed 0"):
        summarise_episodes(pd.concat([frame, frame]))
    with pytest.raises(DataError, match="lack the column shots"):
        summarise_episodes(frame.drop(columns="shots"))
    two = pd.concat([frame.assign(architecture="x"), frame.assign(architecture="y"), frame.assign(source="B")])
    with pytest.raises(DataError, match="'A' is more than one network"):
        paired_differences(two, "A")


# Coverage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [5, 20])
def test_intervals_cover_the_truth_in_95_of_100_studies(seeds):
    """4,000 studies with accuracies of a skewed distribution and a draw that both weights share."""
    studies, rng = 4000, np.random.default_rng(seeds)
    draw = rng.normal(scale=0.08, size=(studies, seeds))
    shape = (6.0, 3.0)
    accuracy = {"A": 0.3 * rng.beta(*shape, size=draw.shape) + 0.4 + draw}
    accuracy["B"] = 0.3 * rng.beta(*shape, size=draw.shape) + 0.45 + draw
    place = np.indices(draw.shape).reshape(2, -1)
    frame = pd.concat(
        pd.DataFrame({"weights": name, "study": place[0], "shots": "5", "seed": place[1], "value": values.ravel()})
        for name, values in accuracy.items()
    )
    means = summarise_episodes(frame, by=("weights", "study", "shots"))
    truth = means["weights"].map({"A": 0.3 * 2 / 3 + 0.4, "B": 0.3 * 2 / 3 + 0.45})
    assert 0.93 <= ((means["low"] <= truth) & (truth <= means["high"])).mean() <= 0.97
    gains = paired_differences(frame, "A", candidate=("weights",), setting=("study", "shots"))
    assert len(gains) == studies
    assert 0.93 <= ((gains["low"] <= 0.05) & (0.05 <= gains["high"])).mean() <= 0.97
    assert (gains["high"] - gains["low"]).mean() < 0.9 * (means["high"] - means["low"]).mean()
    assert ((gains["low"] > 0) | (gains["high"] < 0)).equals(gains["p"] < 0.05)


def test_default_columns_are_those_of_result_rows():
    assert set(CANDIDATE + SETTING) < set(frame_of([0.5]).columns)
