"""Intervals over patients: a slow bootstrap with scikit-learn's metrics, and the coverage of a known truth."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from lightning_modules.metrics import evaluate
from studies.patient_bootstrap import estimate, weighted_ranking


def example(task, seed=0, patients=20, images=60):
    rng = np.random.default_rng(seed)
    groups = rng.integers(patients, size=images).astype(str)
    logits = rng.normal(size=(images, 3)).round(1).astype(np.float32)  # rounded: there are ties
    if task == "multiclass":
        return logits, rng.integers(3, size=images), groups
    labels = (logits + rng.normal(size=logits.shape) > 0.5).astype(np.float32)
    labels[rng.random(labels.shape) < 0.1] = np.nan
    return logits, labels, groups


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_values_are_those_of_the_evaluation(task):
    logits, labels, groups = example(task)
    expected = {(m.name, m.class_name): m.value for m in evaluate(logits, labels, task, ["a", "b", "c"])}
    found = estimate(logits, labels, groups, task, ["a", "b", "c"], draws=100)
    assert {one.name for one in found} >= {"mean_auroc", "mean_average_precision", "auroc"}
    for one in found:
        assert one.value == pytest.approx(expected[one.name, one.class_name], abs=1e-12)
        assert one.low < one.value < one.high
    assert found == estimate(logits, labels, groups, task, ["a", "b", "c"], draws=100)
    assert found != estimate(logits, labels, groups, task, ["a", "b", "c"], draws=100, seed=1)


def test_intervals_are_those_of_a_slow_bootstrap():
    logits, labels, groups = example("multiclass")
    names, draws = np.array(list(dict.fromkeys(groups))), 60
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.integers(len(names), size=(size, len(names))) for size in (50, 10)])
    scores = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=1, keepdims=True)
    slow = {"accuracy": [], "balanced_accuracy": [], "a": [], "ap": []}
    for patients in drawn:
        rows = np.concatenate([np.flatnonzero(groups == names[patient]) for patient in patients])
        slow["accuracy"].append((logits[rows].argmax(axis=1) == labels[rows]).mean())
        slow["balanced_accuracy"].append(balanced_accuracy_score(labels[rows], logits[rows].argmax(axis=1)))
        slow["a"].append(roc_auc_score(labels[rows] == 0, scores[rows, 0]))
        slow["ap"].append(np.mean([average_precision_score(labels[rows] == c, scores[rows, c]) for c in range(3)]))
    found = estimate(logits, labels, groups, "multiclass", ["a", "b", "c"], draws=draws)
    keys = {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy", "auroc": "a"}
    keys["mean_average_precision"] = "ap"
    compared = [one for one in found if one.name in keys and one.class_name in ("", "a")]
    assert len(compared) == 4
    for one in compared:
        np.testing.assert_allclose([one.low, one.high], np.quantile(slow[keys[one.name]], [0.025, 0.975]), atol=1e-12)


def test_weighted_ranking_counts_samples():
    rng = np.random.default_rng(1)
    truth, scores, counts = rng.random(40) < 0.3, rng.integers(8, size=40) / 8, rng.integers(0, 4, size=(40, 5))
    areas, precisions = weighted_ranking(truth, scores, counts.astype(float))
    for count, area, precision in zip(counts.T, areas, precisions, strict=True):
        many, values = np.repeat(truth, count), np.repeat(scores, count)
        assert area == pytest.approx(roc_auc_score(many, values))
        assert precision == pytest.approx(average_precision_score(many, values))
    for kind in (np.ones(40, bool), np.zeros(40, bool)):
        assert np.isnan(weighted_ranking(kind, scores, counts.astype(float))).all()


def test_patients_are_the_unit():
    """Copies of a patient's images tell nothing new; a rare label has no interval."""
    logits, labels, groups = example("multilabel")
    thrice = estimate(*(np.repeat(part, 3, axis=0) for part in (logits, labels, groups)), "multilabel", ["a", "b", "c"])
    single = estimate(logits, labels, groups, "multilabel", ["a", "b", "c"])
    for ours, copied in zip(single, thrice, strict=True):
        assert (copied.low, copied.high) == pytest.approx((ours.low, ours.high))
    labels[:, 2] = 0
    labels[0, 2] = 1  # in a draw without this patient the label has no positives
    rare = estimate(logits, labels, groups, "multilabel", ["a", "b", "c"])[-1]
    assert (rare.class_name, np.isnan(rare.value), np.isnan(rare.low)) == ("c", False, True)


def test_intervals_cover():
    """Accuracy of correlated images: intervals over patients cover the truth, those over images do not."""
    rng = np.random.default_rng(2)
    covered = {"patient": 0, "image": 0}
    for _ in range(150):
        share = rng.beta(1.4, 0.6, size=60)  # of a patient's images that are right; 0.7 on average
        right = rng.random((60, 5)) < share[:, None]
        logits = np.stack([right.ravel(), ~right.ravel()], axis=1).astype(float)
        groups = {"patient": np.repeat(np.arange(60), 5), "image": np.arange(300)}
        for unit, group in groups.items():
            labels = np.zeros(300, dtype=int)
            accuracy = estimate(logits, labels, group, "multiclass", ["a", "b"], draws=80)[0]
            covered[unit] += accuracy.low <= 0.7 <= accuracy.high
    assert 0.90 < covered["patient"] / 150 < 0.98
    assert covered["image"] / 150 < 0.85


def test_many_classes_have_no_ranking():
    logits = np.random.default_rng(0).normal(size=(200, 40))
    labels = np.arange(200) % 40
    names = [str(number) for number in range(40)]
    found = estimate(logits, labels, np.arange(200), "multiclass", names, draws=50)
    assert [one.name for one in found] == ["accuracy", "balanced_accuracy"]
    assert found[1].value == pytest.approx(balanced_accuracy_score(labels, logits.argmax(axis=1)))
