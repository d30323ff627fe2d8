"""Headline intervals: coverage where pre-training, seeds and patients vary; t tests, slow versions, scikit-learn."""

import json
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import ndtr, ndtri
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from datamodules.errors import DataError
from studies.headline import difference, headline
from studies.measured import Measured, Runs, from_rows, measure, read_runs
from studies.patient_bootstrap import patient_strata, patient_weights
from studies.report import make_tables
from studies.results import rows_to_frame
from studies.sections.claims import claims
from studies.sections.material import Material
from studies.variance_components import between_runs, over_runs, standard_error


def facts_of(pretrainings=1, seeds=5, source="a"):
    grid = [(p, s) for p in range(pretrainings) for s in range(seeds)]
    names = [f"{source}-{p}-{s}" for p, s in grid]
    return pd.DataFrame(
        {"run": names, "source": source, "pretrain_seed": [p for p, _ in grid], "seed": [s for _, s in grid]}
    )


def measured_of(values, draws=None, facts=None, patients=200):
    values = np.asarray(values, dtype=float)
    metrics = tuple(("accuracy", str(number)) for number in range(values.shape[1]))
    return Measured(facts, metrics, values, draws, np.full(values.shape[1], patients - 1.0), patients, "")


def runs_of(logits, labels, groups, task, facts=None):
    names = tuple("abcdefgh"[: logits[0].shape[1]])
    return Runs(facts_of(1, len(logits)) if facts is None else facts, logits, labels, np.asarray(groups), task, names)


# Coverage ------------------------------------------------------------------------------------------------------------


def simulate(pretrainings, seeds, patients, of_pretraining, of_seed, tests=800):
    """Accuracies of runs in many experiments: patients' difficulties, pre-trainings and seeds on the probit scale."""
    rng = np.random.default_rng(pretrainings + patients)
    shift = of_pretraining * rng.normal(size=(pretrainings, 1, tests)) + of_seed * rng.normal(size=(1, seeds, tests))
    difficulty = np.sqrt(0.6) * rng.standard_normal((tests, patients), dtype=np.float32)
    level = ndtri(0.8)
    weights = np.concatenate(list(patient_weights(np.zeros(patients, dtype=int), 200)), axis=1) / patients
    values, draws = [], []
    for run in shift.reshape(-1, tests):
        noise = np.sqrt(0.4) * rng.standard_normal((tests, patients), dtype=np.float32)
        correct = (level + run[:, None] + difficulty + noise > 0).astype(np.float32)
        values.append(correct.mean(axis=1))
        draws.append(correct @ weights.astype(np.float32))
    truth = ndtr(level / np.sqrt(1 + of_pretraining**2 + of_seed**2))
    measured = measured_of(np.array(values), np.array(draws, float), facts_of(pretrainings, seeds), patients)
    return measured, truth


@pytest.mark.parametrize(
    ("pretrainings", "patients", "of_pretraining", "of_seed"),
    [(1, 100, 0.0, 0.15), (1, 400, 0.0, 0.15), (1, 1000, 0.0, 0.05), (3, 150, 0.15, 0.15), (3, 400, 0.15, 0.1)],
)
def test_intervals_cover(pretrainings, patients, of_pretraining, of_seed):
    measured, truth = simulate(pretrainings, 5, patients, of_pretraining, of_seed)
    table = headline(measured)
    covered = ((table["low"] <= truth) & (truth <= table["high"])).mean()
    assert 0.93 <= covered <= 0.975  # 800 experiments: 0.95 is known to ± 0.015


def test_what_covers_too_little():
    """A percentile bootstrap of seeds and patients, and an interval over seeds alone, on the same experiments."""
    measured, truth = simulate(1, 5, 400, 0.0, 0.3)
    rng = np.random.default_rng(0)
    resampled = rng.integers(5, size=(5, 200))
    means = np.stack([measured.draws[chosen, :, draw].mean(axis=0) for draw, chosen in enumerate(resampled.T)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    assert ((low <= truth) & (truth <= high)).mean() < 0.92
    few_patients, truth = simulate(1, 5, 100, 0.0, 0.05)
    seeds_only = headline(measured_of(few_patients.values, None, few_patients.facts))
    assert ((seeds_only["low"] <= truth) & (truth <= seeds_only["high"])).mean() < 0.9


def test_differences_reject_5_percent_of_equal_sources():
    rng = np.random.default_rng(1)
    tests, patients = 1000, 200
    difficulty = rng.normal(size=(tests, patients))
    weights = np.concatenate(list(patient_weights(np.zeros(patients, dtype=int), 200)), axis=1) / patients
    sides = []
    for source in "ab":
        shift = 0.1 * rng.normal(size=(5, tests, 1))
        correct = (0.8 + shift + difficulty + rng.normal(size=(5, tests, patients)) > 0).astype(np.float32)
        draws = (correct @ weights.astype(np.float32)).astype(float)
        sides.append(measured_of(correct.mean(axis=2), draws, facts_of(1, 5, source), patients))
    table = difference(*sides)
    assert 0.02 <= (table["p"] <= 0.05).mean() <= 0.07
    assert ((table["p"] <= 0.05) == ((table["low"] > 0) | (table["high"] < 0))).all()
    single = headline(sides[0])["se"]
    assert (table["se"] < np.sqrt(2) * single).mean() > 0.95  # the patients' difficulty cancels


# Parts ---------------------------------------------------------------------------------------------------------------


def test_seeds_alone_are_the_t_interval():
    rng = np.random.default_rng(2)
    ours, theirs = rng.uniform(0.4, 0.6, size=(2, 5, 1))
    t = stats.t.interval(0.95, 4, ours.mean(), stats.sem(ours[:, 0]))
    table = headline(measured_of(ours, None, facts_of())).iloc[0]
    assert (table["low"], table["high"]) == pytest.approx(t, abs=0.01)  # the logit bends it a little
    assert table["covers"] == "seeds only: no predictions"
    found = difference(measured_of(ours, None, facts_of()), measured_of(theirs, None, facts_of(1, 5, "b"))).iloc[0]
    test = stats.ttest_rel(ours[:, 0], theirs[:, 0])
    interval = test.confidence_interval(0.95)
    assert (found["low"], found["high"], found["p"]) == pytest.approx((interval.low, interval.high, test.pvalue))


def test_mean_squares_of_a_grid():
    rng = np.random.default_rng(3)
    P, S = 3, 5
    for of_pretraining, of_seed in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 2)):
        y = rng.normal(size=(P, S)) + of_pretraining * rng.normal(size=(P, 1)) + of_seed * rng.normal(size=(1, S))
        rows = S * sum((y[p].mean() - y.mean()) ** 2 for p in range(P)) / (P - 1)
        columns = P * sum((y[:, s].mean() - y.mean()) ** 2 for s in range(S)) / (S - 1)
        rest = sum((y[p, s] - y[p].mean() - y[:, s].mean() + y.mean()) ** 2 for p in range(P) for s in range(S)) / (
            (P - 1) * (S - 1)
        )
        if min(rows, columns) > rest:
            expected = (rows + columns - rest) / (P * S)
            freedom = (rows + columns - rest) ** 2 / (rows**2 / 2 + columns**2 / 4 + rest**2 / 8)
        else:
            expected, freedom = max(rows, columns) / (P * S), 2 if rows > columns else 4
        variance, found = between_runs(y[:, :, None])
        assert (variance[0], found[0]) == pytest.approx((expected, max(freedom, 1)))
        long = facts_of(P, S).assign(group=0, value=y.ravel())
        table = over_runs(long, "value").iloc[0]
        assert (table["se"] ** 2, table["freedom"]) == pytest.approx((expected, max(freedom, 1)))
        assert (table["n"], table["pretrainings"], table["seeds"]) == (15, 3, 5)
        with_gap = over_runs(long.iloc[1:], "value").iloc[0]
        means = long.iloc[1:].groupby("pretrain_seed")["value"].mean(), long.iloc[1:].groupby("seed")["value"].mean()
        assert with_gap["se"] == pytest.approx(max(side.sem() for side in means))


def test_spread_of_the_test_set_counts_once():
    """Runs that differ only in what a test set does to them: the interval is that of the patients, not twice it."""
    rng = np.random.default_rng(4)
    draws = 0.8 + rng.normal(scale=0.05, size=(1, 5, 1, 4000))  # each run has its own luck with the patients
    values = 0.8 + rng.normal(scale=0.05, size=(1, 5, 2000))
    se, _ = standard_error(values, np.broadcast_to(draws, (1, 5, 2000, 4000))[..., :50], np.full(2000, 100.0))
    assert 0.05 / np.sqrt(5) <= np.sqrt((se**2).mean()) < 1.15 * 0.05 / np.sqrt(5)  # twice would be 1.41


def test_few_defined_draws_have_no_interval():
    draws = np.random.default_rng(5).uniform(size=(5, 2, 100))
    draws[:, 0, :10] = np.nan
    draws[:, 1, :3] = np.nan
    table = headline(measured_of(np.full((5, 2), 0.5), draws, facts_of()))
    assert table["low"].isna().tolist() == [True, False]


def test_a_test_set_without_errors_has_no_interval():
    table = headline(measured_of(np.ones((5, 1)), np.ones((5, 1, 50)), facts_of()))
    assert table["value"].iloc[0] == 1
    assert table[["se", "low", "high"]].isna().all(axis=None)


def test_equal_values_have_no_interval_whatever_their_last_digits():
    values = np.array([[0.1 + 0.2], [0.3], [0.3]])
    assert headline(measured_of(values, None, facts_of(1, 3)))[["se", "low", "high"]].isna().all(axis=None)
    ours = np.array([[0.35], [0.45], [0.6]])
    found = difference(measured_of(ours + 0.1, None, facts_of(1, 3)), measured_of(ours, None, facts_of(1, 3, "b")))
    assert found["value"].tolist() == pytest.approx([0.1])
    assert found[["low", "high", "p"]].isna().all(axis=None)


# Patients ------------------------------------------------------------------------------------------------------------


def test_strata_keep_rare_labels():
    rng = np.random.default_rng(6)
    patient = rng.permutation(np.repeat(np.arange(150), 2))
    labels = (rng.random((300, 3)) < [0.3, 0.05, 0.01]).astype(float)
    labels[rng.random(labels.shape) < 0.1] = np.nan
    strata = patient_strata(labels, patient)
    assert np.bincount(strata).min() > 1
    for weights in patient_weights(strata, 200):
        for column in labels.T:
            positive = np.isin(np.arange(150), patient[column == 1])
            assert positive.sum() > 1
            assert (weights[positive].sum(axis=0) > 0).all()
        assert weights.sum(axis=0) == pytest.approx(150)
    classes = rng.integers(4, size=300)
    assert len(np.unique(patient_strata(classes, np.arange(300)) * 4 + classes)) == 4  # one image each: the classes
    assert set(patient_strata(np.array([[1.0], [0], [0]]), np.arange(3))) == {0}  # a single positive has no stratum
    assert set(patient_strata(np.array([[1.0], [1], [0]]), np.arange(3))) == {0}


def test_variance_is_that_of_stratified_samples():
    """Small strata included: the textbook's variance of a stratified mean."""
    rng = np.random.default_rng(7)
    strata = np.repeat([0, 1, 2], [2, 5, 40])
    values = rng.normal(size=47) + strata
    expected = sum((sum(strata == h) / 47) ** 2 * values[strata == h].var(ddof=1) / sum(strata == h) for h in range(3))
    means = np.concatenate([values @ weights for weights in patient_weights(strata, 20_000)]) / 47
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.var() == pytest.approx(expected, rel=0.05)


# From predictions ----------------------------------------------------------------------------------------------------


def test_metrics_under_draws_are_those_of_scikit_learn():
    rng = np.random.default_rng(8)
    groups = rng.integers(25, size=80)
    labels, logits = rng.integers(3, size=80), [rng.normal(size=(80, 3)).astype(np.float32) for _ in range(2)]
    measured = measure(runs_of(logits, labels, groups, "multiclass"), draws=60, seed=3)
    patient, names = pd.factorize(groups)
    weights = np.concatenate(list(patient_weights(patient_strata(labels, patient), 60, 3)), axis=1)[patient]
    assert (measured.values.shape, measured.draws.shape, measured.patients) == ((2, 7), (2, 7, 60), len(names))
    place = {metric: number for number, metric in enumerate(measured.metrics)}
    for run, scores in enumerate(logits):
        probability = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        for draw in (0, 55):
            weight = weights[:, draw]
            expected = {
                ("accuracy", ""): accuracy_score(labels, scores.argmax(axis=1), sample_weight=weight),
                ("balanced_accuracy", ""): balanced_accuracy_score(labels, scores.argmax(axis=1), sample_weight=weight),
                ("auroc", "b"): roc_auc_score(labels == 1, probability[:, 1], sample_weight=weight),
            }
            for metric, value in expected.items():
                assert measured.draws[run, place[metric], draw] == pytest.approx(value, abs=1e-6)
        assert measured.values[run, place["accuracy", ""]] == pytest.approx((labels == scores.argmax(axis=1)).mean())


def test_a_mean_over_classes_is_as_unsure_as_its_rarest_class():
    """Eight positives: the mean over one label is that label, and its intervals cover; (114 of 120: 0.95 ± 0.04)."""
    rng = np.random.default_rng(10)
    labels = (np.arange(80) < 8).astype(np.float32)[:, None]
    covered = 0
    for _ in range(120):
        logits = (labels + rng.normal(size=(80, 1))).astype(np.float32)
        table = headline(measure(runs_of([logits], labels, range(80), "binary"), draws=50)).set_index("metric")
        assert table.loc["mean_auroc", "high"] == pytest.approx(table.loc["auroc", "high"])
        covered += table.loc["mean_auroc", "low"] <= ndtr(1 / np.sqrt(2)) <= table.loc["mean_auroc", "high"]
    assert covered > 106
    three = np.stack([np.arange(80) < count for count in (8, 20, 40)], axis=1).astype(np.float32)
    measured = measure(runs_of([rng.normal(size=(80, 3)).astype(np.float32)], three, range(80), "multilabel"), draws=9)
    share = np.array([1 / 7, 1 / 19, 1 / 39])
    combined = share.sum() ** 2 / (share**3).sum()
    expected = {"mean_auroc": [combined], "mean_average_precision": [combined], "auroc": [7, 19, 39]}
    for metric, freedom in expected.items():
        found = [f for f, (name, _) in zip(measured.freedom, measured.metrics, strict=True) if name == metric]
        assert found == pytest.approx(freedom)


def write_run(folder, order, logits, labels, source="a", seed=0, pretrain_seed=None, split="test"):
    folder.mkdir(parents=True)
    frame = pd.DataFrame(
        {
            "id": [f"{number:03}.png" for number in order],
            "group": [f"p{number // 2}" for number in order],
            "split": split,
            **{f"label/{name}": labels[order, column] for column, name in enumerate("ab")},
            **{f"logit/{name}": logits[order, column] for column, name in enumerate("ab")},
        }
    )
    frame.to_parquet(folder / "predictions.parquet")
    run = {"source": source, "seed": seed, "pretrain_seed": pretrain_seed}
    (folder / "summary.json").write_text(json.dumps({"run": run, "rows": []}))
    return folder


def test_stored_runs(tmp_path):
    rng = np.random.default_rng(9)
    labels = (rng.random((60, 2)) < 0.4).astype(np.float32)
    labels[3, 0] = np.nan
    logits = [(labels == 1) + rng.normal(size=(60, 2)).astype(np.float32) for _ in range(6)]
    folders = [
        write_run(tmp_path / f"{source}{seed}", rng.permutation(60), logits[3 * (source == "b") + seed], labels,
                  source, seed, 0 if source == "b" else None)
        for source in ("scratch", "b") for seed in range(3)
    ]  # fmt: skip
    runs = read_runs(folders)
    assert runs.task == "multilabel"
    np.testing.assert_array_equal(runs.labels, labels)
    np.testing.assert_array_equal(runs.logits[1], logits[1])
    measured = measure(runs, draws=50)
    assert measured.patients == 30
    single = headline(measured.of("b"))
    assert set(single["scope"]) == {"these weights only"}
    assert set(single["covers"]) == {"seeds and patients"}
    assert set(headline(measured.of("scratch"))["scope"]) == {"no pre-training"}
    table = difference(measured.of("b"), measured.of("scratch"))
    assert (table["scope"] == "these weights only").all()
    assert (table["runs"] == 3).all()
    assert set(difference(measured.of("b"), measured.of("b"))["value"]) == {0}

    with pytest.raises(DataError, match="there are no runs from 'c'"):
        measured.of("c")
    with pytest.raises(DataError, match="not measured on the same test set"):
        difference(measured.of("b"), measure(runs, draws=50, seed=1).of("scratch"))
    with pytest.raises(DataError, match="runs from 2 sources have no common mean"):
        headline(measured)
    changed = labels.copy()
    changed[5, 1] = 1 - changed[5, 1]
    for name, order, other in (("images", np.arange(59), labels), ("labels", np.arange(60), changed)):
        odd = write_run(tmp_path / f"odd-{name}", order, logits[0], other)
        with pytest.raises(DataError, match=f"run 'odd-{name}' has other test {name} than run 'scratch0'"):
            read_runs([*folders, odd])
    with pytest.raises(DataError, match="run 'scratch0': there are no predictions of validation"):
        read_runs(folders, "validation")
    (folders[1] / "predictions.parquet").unlink()
    with pytest.raises(DataError, match="run 'scratch1': cannot read predictions"):
        read_runs(folders)
    with pytest.raises(DataError, match="no runs to read"):
        read_runs([])


def test_what_an_interval_says_of_itself():
    def said(pretrainings, seeds, predictions=True):
        rng, runs = np.random.default_rng(10), pretrainings * seeds
        draws = rng.uniform(0.4, 0.6, size=(runs, 1, 50)) if predictions else None
        table = headline(measured_of(rng.uniform(0.4, 0.6, size=(runs, 1)), draws, facts_of(pretrainings, seeds)))
        return table.loc[0, "covers"], table.loc[0, "scope"], bool(np.isfinite(table.loc[0, "low"]))

    assert said(1, 1) == ("patients only: one seed", "these weights only", True)
    assert said(1, 1, predictions=False) == ("nothing: one seed, no predictions", "these weights only", False)
    assert said(3, 1) == ("pre-training and patients: one seed", "this pre-training procedure", True)
    assert said(3, 2) == ("pre-training, seeds and patients", "this pre-training procedure", True)
    assert said(2, 2, predictions=False) == (
        "pre-training and seeds: no predictions", "this pre-training procedure", True,
    )  # fmt: skip


def test_grids_with_gaps_and_pairs():
    rng = np.random.default_rng(11)
    facts, values = facts_of(2, 4), rng.uniform(0.4, 0.6, size=(8, 1))
    table = headline(measured_of(values[:7], None, facts.iloc[:7])).iloc[0]
    assert (table["runs"], table["left_out"], table["seeds"]) == (6, 1, 3)
    assert table["value"] == pytest.approx(values[[0, 1, 2, 4, 5, 6]].mean())
    own = facts.assign(seed=np.arange(8))  # seeds of their own: the pre-trainings are the units
    table = headline(measured_of(values, None, own)).iloc[0]
    assert (table["runs"], table["freedom"]) == (8, 1)
    assert table["se"] == pytest.approx(stats.sem(values.reshape(2, 4).mean(axis=1)))
    scratch = facts_of(1, 4, "scratch").assign(pretrain_seed=pd.NA)
    base = rng.uniform(0.3, 0.4, size=(4, 1))
    table = difference(measured_of(values, None, facts), measured_of(base, None, scratch)).iloc[0]
    assert (table["runs"], table["pretrainings"], table["scope"]) == (8, 2, "this pre-training procedure")
    assert table["value"] == pytest.approx(values.mean() - base.mean())
    with pytest.raises(DataError, match="2 runs have the seed 0 and the pre-training seed 1"):
        headline(measured_of(values, None, facts.assign(seed=[0, 1, 2, 3, 0, 0, 1, 2])))
    other = measured_of(values, None, facts_of(2, 4, "b").assign(pretrain_seed=np.repeat([7, 8], 4)))
    with pytest.raises(DataError, match="no runs to pair"):
        difference(measured_of(values, None, facts), other)


def test_rows_without_predictions():
    rows = pd.DataFrame(
        [
            {"run": f"r{seed}{fold}", "source": "a", "pretrain_seed": None, "seed": seed, "metric": metric,
             "class_name": class_name, "fold": fold, "value": 0.1 * seed + 0.01 * fold + 0.2}
            for seed in range(3) for fold in range(2) for metric, class_name in (("accuracy", None), ("auroc", "x"))
        ]
    )  # fmt: skip
    table = headline(from_rows(rows))
    assert table[["metric", "class_name"]].to_numpy().tolist() == [["accuracy", ""], ["auroc", "x"]]
    assert table["value"].tolist() == pytest.approx([0.305, 0.305])
    assert (table["runs"] == 3).all()
    assert all(low < value for low, value in pairwise(table.loc[0, ["low", "value", "high"]]))
    with pytest.raises(DataError, match=r"(?s)runs from 'a' have seed 0, .* in common\n.*r00, x"):
        from_rows(pd.concat([rows, rows.iloc[:1].assign(run="x")]))


def test_section_keeps_settings_apart_and_says_what_has_no_headline(tmp_path):
    """A target with noisy and with clean labels has two headlines; weights that nothing tells apart have none."""
    rng = np.random.default_rng(11)
    labels = (rng.random((60, 2)) < 0.4).astype(np.float32)
    rows = []
    for target, column in (("t", "dials"), ("u", "weights_hash")):
        for source, setting, seed in product(("near", "scratch"), ("x", "y"), range(2)):
            cell = f"{target}-{source}-{setting}-{seed}"
            logits = labels + rng.normal(size=(60, 2)).astype(np.float32)
            write_run(tmp_path / "s" / cell, np.arange(60), logits, labels, source, seed)
            rows.append({"study": "s", "cell": cell, "run": cell, "source": source, "target": target,
                         "architecture": "net", "protocol": "finetune", "shots": "5", "seed": seed, column: setting,
                         "metric": "mean_auroc", "value": 0.6 + 0.1 * rng.random()})  # fmt: skip
    frame = rows_to_frame(rows)
    tables = make_tables(frame, {"t": "mean_auroc", "u": "mean_auroc"})
    study = SimpleNamespace(name="s")
    section = claims(Material(study, tmp_path, tmp_path, frame, frame, tables, "scratch", []))
    table, notes = section.blocks
    assert table.frame[["target", "dials", "source"]].to_numpy().tolist() == [
        ["t", "x", "near"], ["t", "x", "scratch"], ["t", "y", "near"], ["t", "y", "scratch"],
    ]  # fmt: skip
    assert set(table.frame["interval covers"]) == {"seeds and patients"}
    assert notes.text == "- u at 5 shots: no headline: 2 runs have the seed 0 and no pre-training seed"
