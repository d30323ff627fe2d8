"""Scale near and far: against polynomial fits by hand, error rates on simulated rows, and what is too few."""

import numpy as np
import pytest
from scipy import stats

from datamodules.errors import DataError
from studies.interaction import Scale, interaction
from studies.results import rows_to_frame

DOMAINS = {"in1k": "natural", "in21k": "natural", "chex": "x-ray", "chexmimic": "x-ray",
           "cifar": "natural", "pets": "natural", "nih": "x-ray"}  # fmt: skip
SIZES = {"in1k": 1_200_000, "in21k": 14_000_000, "chex": 200_000, "chexmimic": 500_000}


def study(rng, near=0.1, far=0.02, seeds=5, noise=0.02, targets=("cifar", "pets", "nih"), **facts):
    """Rows whose metric rises by `near` and `far` per decade of the source."""
    seed_effects = rng.normal(scale=0.1, size=(len(targets), seeds))
    rows = []
    for place, target in enumerate(targets):
        for source, size in SIZES.items():
            slope = near if DOMAINS[source] == DOMAINS[target] else far
            for seed in range(seeds):
                value = 0.3 + slope * np.log10(size / 1e5) + seed_effects[place, seed] + noise * rng.normal()
                rows.append({"source": source, "source_n": size, "target": target, "architecture": "net",
                             "protocol": "finetune", "shots": "5", "metric": "accuracy", "seed": seed,
                             "value": value, **facts})  # fmt: skip
    return rows


def slow(rows, targets=("cifar", "pets", "nih"), seeds=5):
    """Near and far slope of each seed, by numpy's polynomial fit of each line."""
    lines = {True: [], False: []}
    for target in targets:
        for domain in ("natural", "x-ray"):
            points = [[(np.log10(r["source_n"]), r["value"]) for r in rows
                       if (r["target"], DOMAINS[r["source"]], r["seed"]) == (target, domain, seed)]
                      for seed in range(seeds)]  # fmt: skip
            slopes = [np.polyfit(*np.transpose(of_seed), 1)[0] for of_seed in points]
            lines[DOMAINS[target] == domain].append(slopes)
    return {near: np.mean(slopes, axis=0) for near, slopes in lines.items()}


def test_slopes_are_those_of_fits_by_hand():
    rows = study(np.random.default_rng(0))
    scratch = [{**row, "source": "scratch", "source_n": 0} for row in rows[:5]]
    found = interaction(rows_to_frame([*rows[::-1], *scratch]), DOMAINS, Scale("source_n")).iloc[0]
    expected = slow(rows)
    for name, near in (("near", True), ("far", False)):
        low, high = stats.t.interval(0.95, 4, expected[near].mean(), stats.sem(expected[near]))
        assert found[[name, f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(
            [expected[near].mean(), low, high]
        )
        assert (found[f"{name}_lines"], found[f"{name}_scales"]) == (3, 2)
    test = stats.ttest_rel(expected[True], expected[False])
    interval = test.confidence_interval(0.95)
    assert found[["difference", "low", "high", "p"]].tolist() == pytest.approx(
        [(expected[True] - expected[False]).mean(), interval.low, interval.high, test.pvalue]
    )
    assert (found["verdict"], found["unit"], found["n"]) == ("larger slope near", "decade", 5)


def test_architectures_and_orders_are_scales_too():
    rng = np.random.default_rng(1)
    rows = [
        {**row, "architecture": net, "value": row["value"] + gain * (DOMAINS[row["source"]] == DOMAINS[row["target"]])}
        for net, gain in (("small", 0.0), ("large", 0.2))
        for row in study(rng, near=0.0, far=0.0, noise=0.01)
    ]
    frame = rows_to_frame(rows)
    value = {(r["source"], r["target"], r["architecture"], r["seed"]): r["value"] for r in rows}
    gains = [
        np.mean([value[s, t, "large", seed] - value[s, t, "small", seed]
                 for s in SIZES for t in ("cifar", "pets", "nih") if DOMAINS[s] == DOMAINS[t]])
        for seed in range(5)
    ]  # fmt: skip
    ordered = interaction(frame, DOMAINS, Scale("architecture", order=("small", "large"))).iloc[0]
    assert ordered["near"] == pytest.approx(np.mean(gains))
    assert (ordered["unit"], ordered["near_lines"]) == ("smallest to largest", 6)
    sized = interaction(frame, DOMAINS, Scale("architecture", {"small": 1e6, "large": 1e8})).iloc[0]
    assert sized["near"] == pytest.approx(np.mean(gains) / 2)  # two decades
    assert sized["p"] == pytest.approx(ordered["p"])


def test_equal_slopes_are_called_equal():
    rng = np.random.default_rng(2)
    rows = [row for test in range(250) for row in study(rng, 0.05, 0.05, study=f"{test}")]
    table = interaction(rows_to_frame(rows), DOMAINS, Scale("source_n"), by=("study", "metric"))
    assert len(table) == 250
    assert 0.01 <= (table["p"] <= 0.05).mean() <= 0.09
    assert ((table["low"] <= 0) & (0 <= table["high"]) == (table["p"] > 0.05)).all()
    assert (table["verdict"] == "not distinguishable").mean() > 0.99  # Holm's correction over 250 rows


def test_far_may_gain_more():
    table = interaction(rows_to_frame(study(np.random.default_rng(3), 0.0, 0.2)), DOMAINS, Scale("source_n"))
    assert table["verdict"].tolist() == ["larger slope far"]


def test_pretrainings_count_where_all_have_several():
    rng = np.random.default_rng(4)
    rows = [
        row for p, near in enumerate((0.0, 0.2, 0.4)) for row in study(rng, near, 0.0, noise=0.001, pretrain_seed=p)
    ]
    found = interaction(rows_to_frame(rows), DOMAINS, Scale("source_n")).iloc[0]
    assert (found["n"], found["pretrainings"]) == (15, 3)
    assert found["high"] - found["low"] == pytest.approx(2 * stats.t.ppf(0.975, 2) * 0.2 / np.sqrt(3), rel=0.1)
    assert found["verdict"] == "not distinguishable"
    single = [row for row in rows if row["pretrain_seed"] == 0 or row["source"] != "chex"]
    assert interaction(rows_to_frame(single), DOMAINS, Scale("source_n")).iloc[0]["pretrainings"] == 1


def test_too_few():
    def verdict(keep, **options):
        rows = [row for row in study(np.random.default_rng(5), **options) if keep(row)]
        table = interaction(rows_to_frame(rows), DOMAINS, Scale("source_n"))
        assert table[["low", "high", "p"]].isna().all(axis=None)
        return table["verdict"].item()

    def natural(row):
        return DOMAINS[row["source"]] == "natural"

    assert verdict(lambda row: True, seeds=1) == "too few: one seed"
    assert verdict(lambda row: row["source"] in ("in1k", "chex")) == "too few: fewer than two scales near"
    far_only = verdict(lambda row: natural(row) and row["target"] == "nih")
    assert far_only == "too few: no source and target of one domain"
    near_only = verdict(lambda row: natural(row) and row["target"] != "nih")
    assert near_only == "too few: no source and target of two domains"
    gaps = verdict(lambda row: (row["source"] in ("in1k", "chex")) == (row["seed"] < 2))
    assert gaps == "too few: no seed with all scales near and far"
    assert interaction(rows_to_frame([]), DOMAINS, Scale("source_n")).empty


def test_names_without_domain_or_place():
    frame = rows_to_frame(study(np.random.default_rng(6)))
    with pytest.raises(DataError, match=r"(?s)no domain: in1k.*source"):
        interaction(frame, {name: domain for name, domain in DOMAINS.items() if name != "in1k"}, Scale("source_n"))
    with pytest.raises(DataError, match="no place on the scale of architecture: net"):
        interaction(frame, DOMAINS, Scale("architecture", {"nets": 1e6}))
    with pytest.raises(DataError, match="an order of 1 names"):
        interaction(frame, DOMAINS, Scale("architecture", order=("net",)))
