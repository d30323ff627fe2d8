"""Scores of transferability against slow definitions, library oracles and limits; orderings and their judgement."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.stats import kendalltau, multivariate_normal
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from datamodules.errors import DataError
from studies.ranking import achievements, judge, orderings, setting_name
from studies.results import ResultsError, rows_to_frame
from studies.transferability import _folds, knn_score, leep, logme, n_leep, probe_score


def clusters(n=120, d=6, classes=3, spread=1.0, seed=0):
    """Features in clusters, one a class: float32 (n, d), int64 (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = rng.normal(size=(classes, d))
    return (centres[labels] + spread * rng.normal(size=(n, d))).astype(np.float32), labels


def slow_evidence(features, y):
    """Largest log density per image of y ~ N(0, I/β + FFᵀ/α), by a general optimiser over log α and log β."""
    kernel = features.astype(np.float64) @ features.T.astype(np.float64)

    def minus(logs):
        covariance = np.exp(-logs[1]) * np.eye(len(y)) + np.exp(-logs[0]) * kernel
        return -multivariate_normal.logpdf(y, cov=covariance) / len(y)

    return -min(
        minimize(minus, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 2000}).fun
        for start in ([0, 0], [2, 2])
    )


@pytest.mark.parametrize(("n", "d"), [(40, 5), (24, 60)])
def test_logme_is_the_largest_evidence(n, d):
    features, labels = clusters(n, d, spread=1.5)
    slow = np.mean([slow_evidence(features, (labels == c).astype(float)) for c in range(3)])
    assert logme(features, labels) == pytest.approx(slow, abs=1e-5)


def test_logme_of_one_direction_is_analytic():
    """F = (1, ..., 1)ᵀ and y in {0, 1}: evidence of a mean m = 1/2 and a variance that α and β fit exactly.

    FFᵀ has one eigenvalue n, along which y has n/4; elsewhere the mean square is n/4 / (n - 1).
    """
    n = 400
    labels = np.arange(n) % 2
    along, across = n / 4, n / 4 / (n - 1)
    exact = -0.5 * (np.log(along) + (n - 1) * np.log(across) + n + n * np.log(2 * np.pi)) / n
    assert logme(np.ones((n, 1), dtype=np.float32), labels) == pytest.approx(exact, abs=1e-7)


def test_logme_of_features_that_are_copies_changes_nothing():
    features, labels = clusters()
    value = logme(features, labels)
    assert logme(np.hstack([features, np.zeros_like(features)]), labels) == pytest.approx(value, abs=1e-9)
    assert logme(7 * features, labels) == pytest.approx(value, abs=1e-6)  # α takes up the scale
    assert logme(features, labels + 5 * (labels > 1)) == pytest.approx(
        value, abs=1e-12
    )  # names of classes do not count


def test_multilabel_logme_uses_the_known_rows_of_each_label():
    features, labels = clusters(90)
    table = np.stack([labels == 0, labels == 1, labels == 2, np.zeros(90)], axis=1).astype(np.float32)
    full = logme(features, table)
    assert full == pytest.approx(logme(features, labels), abs=1e-12)  # the label without positives is left out
    table[::3, 1] = np.nan
    known = np.arange(90) % 3 > 0
    assert known.sum() == 60
    table[:, 1] = np.where(known, np.arange(90) % 2, np.nan)
    single = [logme(features[rows], table[rows][:, [c]]) for c, rows in enumerate((known | True, known, known | True))]
    assert logme(features, table) == pytest.approx(np.mean(single), abs=1e-12)


def test_logme_stays_finite_at_its_limits():
    features, labels = clusters(60, 5)
    targets = np.eye(3, dtype=np.float32)[labels]
    assert np.isfinite(logme(targets, labels))  # a perfect fit
    assert logme(targets, labels) > logme(features, labels) + 1
    assert np.isfinite(logme(np.zeros((60, 2), dtype=np.float32), labels))  # nothing to fit with
    assert np.isfinite(logme(clusters(30, 200)[0], labels[:30]))  # fewer images than features


def slow_leep(theta, labels):
    values = []
    n, classes = theta.shape
    names = sorted(set(labels.tolist()))
    joint = {(y, z): sum(theta[i, z] for i in range(n) if labels[i] == y) / n for y in names for z in range(classes)}
    for i in range(n):
        p = 0.0
        for z in range(classes):
            marginal = sum(joint[y, z] for y in names)
            p += joint[labels[i], z] / marginal * theta[i, z] if marginal else 0.0
        values.append(np.log(p))
    return np.mean(values)


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def test_leep_is_its_definition():
    features, labels = clusters(50, 7)
    theta = softmax(features)
    theta[:, 3] = 0  # a source class that no image has
    theta /= theta.sum(axis=1, keepdims=True)
    assert leep(theta, labels * 4) == pytest.approx(slow_leep(theta, labels), abs=1e-6)
    table = np.stack([labels == 0, labels == 1], axis=1).astype(np.float32)
    table[:10, 1] = np.nan
    both = [slow_leep(theta, table[:, 0]), slow_leep(theta[10:], table[10:, 1])]
    assert leep(theta, table) == pytest.approx(np.mean(both), abs=1e-6)


def test_leep_at_its_limits():
    labels = np.arange(60) % 3
    assert leep(np.eye(5, dtype=np.float32)[labels], labels) == pytest.approx(0, abs=1e-9)
    assert leep(np.full((60, 4), 0.25, dtype=np.float32), labels) == pytest.approx(-np.log(3), abs=1e-6)
    with pytest.raises(DataError, match=r"do not sum to 1(.|\n)*image 0"):
        leep(np.full((60, 4), 0.3), labels)
    with pytest.raises(DataError, match="negative"):
        leep(np.tile([1.5, -0.5], (60, 1)), labels)


def test_n_leep_knows_clusters_from_noise():
    labels = np.arange(300) % 3
    noise = np.random.default_rng(1).normal(size=(300, 40)).astype(np.float32)
    apart, near = (clusters(300, 40, spread=spread)[0] for spread in (0.2, 2.0))
    values = [n_leep(x, labels) for x in (noise, near, apart)]
    assert values == sorted(values)
    assert values[2] == pytest.approx(0, abs=0.01)  # every component holds one class
    assert n_leep(apart * 1000 + 5, labels) == pytest.approx(values[2], abs=1e-3)
    assert n_leep(np.ones((300, 3), dtype=np.float32), labels) == pytest.approx(-np.log(3), abs=1e-6)
    table = np.stack([labels == 0, labels == 1], axis=1).astype(np.float32)
    assert n_leep(apart, table) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("k", [1, 5])
def test_knn_is_leave_one_out_of_scikit_learn(k):
    features, labels = clusters(90, spread=1.3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    correct, tied = [], []
    for i in range(len(labels)):
        others = np.arange(len(labels)) != i
        model = KNeighborsClassifier(k).fit(unit[others], labels[others])
        votes = model.predict_proba(unit[i : i + 1])[0]
        winners = votes == votes.max()
        correct.append(winners[labels[i]] / winners.sum())
        tied.append(winners.sum() > 1)
    assert knn_score(features, labels, k=k) == pytest.approx(np.mean(correct), abs=1e-12)
    assert any(tied) == (k == 5)
    assert knn_score(features * np.arange(1, 91)[:, None], labels, k=k) == pytest.approx(np.mean(correct), abs=1e-12)


def test_knn_of_labels_is_the_auroc_of_the_share():
    features, labels = clusters(80, spread=1.3)
    table = np.stack([labels == 0, labels == 1, np.ones(80)], axis=1).astype(np.float32)
    table[: 80 - 12, 1] = np.nan
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(np.linalg.norm(unit[:, None] - unit, axis=2) + 9 * np.eye(80), axis=1)[:, :5]
    found, lonely = [], []
    for column in table[:, :2].T:
        share = [np.nanmean(column[near]) if np.isfinite(column[near]).any() else np.nanmean(column) for near in order]
        known = np.isfinite(column)
        lonely.append(any(np.isnan(column[near]).all() for near in order[known]))
        found.append(roc_auc_score(column[known], np.array(share)[known]))
    assert lonely == [False, True]  # no label of any neighbour is known: prevalence
    assert knn_score(features, table) == pytest.approx(np.mean(found), abs=1e-12)


def test_another_image_of_the_patient_does_not_help():
    """Noise without a signal, where every patient has several nearly equal images of one class."""
    rng = np.random.default_rng(0)
    patients = np.arange(400) // 4
    labels = rng.integers(0, 2, 100)[patients]
    features = (rng.normal(size=(100, 90))[patients] + 0.01 * rng.normal(size=(400, 90))).astype(np.float32)
    assert knn_score(features, labels, k=3) == 1
    assert knn_score(features, labels, patients, k=3) == pytest.approx(0.5, abs=0.15)
    assert probe_score(features, labels) > 0.65
    assert probe_score(features, labels, patients) == pytest.approx(0.5, abs=0.15)


def test_folds_hold_patients_together_and_spread_classes():
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 60, 200) * 7
    labels = (patients % 3).astype(np.int64)
    folds = _folds(labels, patients, 5, 0)
    assert sorted(np.concatenate(folds)) == list(range(200))
    assert sum(len(np.unique(patients[fold])) for fold in folds) == len(np.unique(patients))
    for one in range(3):
        counts = [len(np.unique(patients[fold][labels[fold] == one])) for fold in folds]
        assert max(counts) - min(counts) <= 1
    with pytest.raises(DataError, match="2 patients cannot make 5 folds"):
        _folds(labels, patients % 2, 5, 0)


def test_probe_scores_what_ridge_gets_right():
    """Against scikit-learn's ridge with the same folds: easy data, where penalties make no difference."""
    from sklearn.linear_model import RidgeClassifierCV

    features, labels = clusters(200, 10, spread=0.8)
    scores = []
    for test in _folds(labels, None, 5, 0):
        train = np.setdiff1d(np.arange(200), test)
        model = RidgeClassifierCV(np.logspace(-2, 3, 11)).fit(features[train], labels[train])
        scores.append(model.score(features[test], labels[test]))
    assert probe_score(features, labels) == pytest.approx(np.mean(scores), abs=0.02)
    table = np.stack([labels == 0, labels == 1], axis=1).astype(np.float32)
    assert probe_score(features, table) > 0.9
    table[:40] = np.nan  # unknown rows are neither learnt from nor counted
    assert probe_score(features, table) > 0.9
    assert probe_score(features, table[:, :1]) > 0.9  # binary
    noise = np.random.default_rng(0).normal(size=(200, 10)).astype(np.float32)
    assert probe_score(noise, table) == pytest.approx(0.5, abs=0.12)


def test_a_class_of_one_image_is_an_error_of_its_fold_alone():
    features, labels = clusters(100, spread=0.1)
    labels += 1
    labels[7] = 0
    assert probe_score(features, labels) == pytest.approx(0.99)


def test_bad_input_is_an_error():
    features, labels = clusters()
    broken = features.copy()
    broken[3, 1] = np.inf
    for score in (logme, n_leep, knn_score, probe_score):
        with pytest.raises(DataError, match=r"NaN or infinite(.|\n)*image 3 of 120"):
            score(broken, labels)
        with pytest.raises(DataError, match="119 labels for 120 images"):
            score(features, labels[1:])
        with pytest.raises(DataError, match="no label with two values"):
            score(features, np.zeros(120, dtype=np.int64))
        with pytest.raises(DataError, match="no label with two values"):
            score(features, np.full((120, 2), np.nan, dtype=np.float32))
        with pytest.raises(DataError, match="without a class"):
            score(features, labels - 1)


SCORES = pd.DataFrame(
    {"good": [1.0, 2.0, 3.0, 4.0], "bad": [4.0, 3.0, 2.0, 1.0], "tied": [1, 1, 2, 2], "partly": [9, np.nan, 5, 6]},
    index=list("abcd"),
)


def test_orderings_and_their_judgement():
    places = orderings(SCORES)
    assert places["good"].tolist() == [4, 3, 2, 1]
    assert places["tied"].tolist() == [3.5, 3.5, 1.5, 1.5]
    assert places["partly"].isna().tolist() == [False, True, False, False]
    achieved = pd.Series({"d": 0.9, "a": 0.5, "b": 0.6, "c": 0.8})  # in another order
    found = judge(SCORES, achieved).set_index("measure")
    assert found["tau"][["good", "bad"]].tolist() == pytest.approx([1, -1])
    assert found["tau"]["tied"] == pytest.approx(kendalltau([1, 1, 2, 2], [0.5, 0.6, 0.8, 0.9]).statistic)
    assert found["tau"]["tied"] == pytest.approx(4 / np.sqrt(4 * 6))  # τ-b: 4 concordant pairs, 2 ties of 6
    assert found["regret"]["good"] == 0
    assert found["regret"]["bad"] == pytest.approx(0.4)
    assert found["regret"]["tied"] == pytest.approx(0.05)  # c or d
    assert found["regret"]["partly"] == pytest.approx(0.4)  # a, against the best of all
    assert found["regret"]["random pick"] == pytest.approx(0.9 - 0.7)
    assert found["n"].tolist() == [4, 4, 4, 3, 4]
    assert found["pick"].tolist() == ["d", "a", "c, d", "a", ""]


def test_judgement_leaves_out_candidates_without_a_result():
    found = judge(SCORES, pd.Series({"b": 0.6})).set_index("measure")
    assert found["tau"].isna().all()
    assert found["regret"]["good"] == 0
    assert np.isnan(found["regret"]["partly"])
    assert judge(SCORES, pd.Series(dtype=float))["regret"].isna().all()


def test_achievements_are_means_over_seeds_of_each_setting():
    shared = {"target": "far", "metric": "test/accuracy", "study": "s"}
    rows = [
        {
            **shared,
            "weights_hash": name,
            "protocol": "finetune",
            "shots": shots,
            "seed": seed,
            "value": value + seed / 10,
        }
        for name, value in (("h1", 0.2), ("h2", 0.4), ("other", 0.8))
        for shots in ("5", "full")
        for seed in (0, 1)
    ]
    rows += [
        {
            **shared,
            "weights_hash": "h1",
            "protocol": "depth",
            "transfer_depth": 2,
            "shots": "5",
            "seed": 0,
            "value": 0.1,
        },
        {**rows[0], "target": "near", "value": 0.9},
        {**rows[0], "class_name": "cat", "value": 0.9},
        {**rows[0], "metric": "test/mean_auroc", "value": 0.7},
    ]
    found = achievements(rows_to_frame(rows), "far", ["h1", "h2", "h3"])
    assert found["shots"].tolist() == ["5", "full"]  # only one candidate has a result in the other setting
    assert found["h1"].tolist() == pytest.approx([0.25, 0.25])
    assert found["h2"].tolist() == pytest.approx([0.45, 0.45])
    assert found["h3"].isna().all()
    assert [setting_name(row) for _, row in found.iterrows()] == ["finetune, shots 5", "finetune, full"]
    assert achievements(rows_to_frame(rows), "elsewhere", ["h1", "h2"]).empty


def test_training_from_scratch_is_a_candidate_in_every_protocol():
    shared = {"target": "far", "metric": "accuracy", "shots": "5", "seed": 0, "architecture": "r"}
    rows = [
        {**shared, "source": "scratch", "protocol": "scratch", "value": 0.3},
        {**shared, "source": "near", "protocol": "finetune", "weights_hash": "h1", "value": 0.5},
        {**shared, "source": "near", "protocol": "depth", "weights_hash": "h1", "value": 0.4, "transfer_depth": 2},
    ]
    found = achievements(rows_to_frame(rows), "far", ["scratch", "h1"]).set_index("protocol")
    assert found.loc["finetune", ["scratch", "h1"]].tolist() == [0.3, 0.5]


def test_scratch_is_a_candidate_at_every_depth_and_nets_with_other_numbers_of_groups_meet():
    shared = {"target": "far", "metric": "accuracy", "shots": "5", "seed": 0, "study": "s", "granularity": "coarse"}
    rows = [
        {**shared, "architecture": net, "source": "scratch", "protocol": "scratch", "frozen_depth": 0, "value": value}
        for net, value in (("r", 0.1), ("v", 0.2))
    ]
    for net, name, groups, value in (("r", "h1", 5, 0.3), ("v", "h2", 13, 0.4)):
        own = {**shared, "architecture": net, "source": net, "weights_hash": name, "value": value}
        rows += [{**own, "protocol": "linear_probe", "frozen_depth": groups}]
        rows += [{**own, "protocol": f"frozen {k}", "transfer_depth": k, "frozen_depth": k} for k in (1, 2)]
    frame = rows_to_frame(rows)
    found = achievements(frame, "far", ["scratch", "h1", "h2"], backbone="r").set_index("protocol")
    assert sorted(found.index) == ["frozen 1", "frozen 2", "linear_probe"]
    assert found[["scratch", "h1", "h2"]].to_numpy().tolist() == [[0.1, 0.3, 0.4]] * 3
    with pytest.raises(ResultsError, match=r"by architecture: r, v(.|\n)*--backbone"):
        achievements(frame, "far", ["scratch", "h1", "h2"])
    blocks = frame.assign(granularity="block", value=0.9)
    mixed = achievements(pd.concat([frame, blocks]), "far", ["h1", "h2"])
    assert len(mixed) == 6
    assert "transfer depth 1 blocks, frozen depth 1 blocks" in " ".join(
        setting_name(row) for _, row in mixed.iterrows()
    )


def test_candidates_are_compared_on_the_seeds_they_share_and_nothing_is_averaged_that_differs():
    shared = {"target": "far", "metric": "accuracy", "shots": "5", "protocol": "finetune", "source": "x", "cell": "c"}
    rows = [
        {**shared, "weights_hash": name, "seed": seed, "value": value + seed / 10}
        for name, value, seeds in (("h1", 0.2, 4), ("h2", 0.3, 2))
        for seed in range(seeds)
    ]
    found = achievements(rows_to_frame(rows), "far", ["h1", "h2"])
    assert found[["h1", "h2"]].iloc[0].tolist() == pytest.approx([0.25, 0.35])
    with pytest.raises(ResultsError, match=r"2 results of one candidate(.|\n)*by cell: c, d(.|\n)*seed 0"):
        achievements(rows_to_frame([*rows, {**rows[0], "cell": "d", "value": 0.9}]), "far", ["h1", "h2"])


def test_soft_labels_count_from_one_half():
    features, labels = clusters(90)
    hard = np.stack([labels == 0, labels == 1], axis=1).astype(np.float32)
    soft = np.where(hard > 0, 0.7, 0.0).astype(np.float32)
    soft[4] = hard[4]
    for score in (logme, n_leep, knn_score, probe_score):
        assert score(features, soft) == pytest.approx(score(features, hard), abs=1e-9)


def test_logme_finds_the_global_maximum_at_any_scale():
    """Fewer images than features, where a fixed point from α = β = 1 ends in lower maxima, or nowhere."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(8, 30)), int(rng.integers(40, 120))
        features = (np.maximum(rng.normal(size=(n, d)), 0) * np.geomspace(1, 0.05, d)).astype(np.float32)
        labels = np.arange(n) % 2
        values, vectors = np.linalg.eigh(features.astype(np.float64) @ features.T.astype(np.float64))
        shares = (vectors.T @ np.stack([labels, 1 - labels], axis=1)) ** 2
        best = np.full(2, -np.inf)
        for ratio in values[-1] * np.geomspace(1e-14, 1e10, 1500):
            noise = ratio / (ratio + np.maximum(values, 0))
            spread = (noise @ shares) / n
            best = np.maximum(best, -0.5 * (np.log(2 * np.pi * spread) + 1 - np.log(noise).mean()))
        for scale in (1e-8, 1, 1e10):
            assert logme((scale * features).astype(np.float32), labels) == pytest.approx(best.mean(), abs=2e-4)
