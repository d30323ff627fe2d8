"""The evaluation against scikit-learn, slow loops and analytic cases."""

import dataclasses
import functools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn import metrics as oracle
from torch import distributed, multiprocessing

from lightning_modules.errors import ModelError, NonFiniteLossError
from lightning_modules.metrics import Evaluation, MetricValue, calibration_error, evaluate, ranking
from lightning_modules.thresholds import choose_thresholds, decide, probabilities

SEEDS = range(8)


def by_key(values):
    keys = [value.key for value in values]
    assert len(set(keys)) == len(keys)
    return {value.key: value.value for value in values}


def random_labelwise(seed, labels=5, samples=157):
    """Ties, unknown cells, and columns that are unknown, all positive, or all negative throughout."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(samples, labels)).astype(np.float32)
    logits[:, 0] = logits[:, 0].round()
    targets = (rng.random((samples, labels)) < rng.uniform(0.05, 0.9, labels)).astype(np.float32)
    if labels > 1:
        targets[:, 2], targets[:, 3], targets[:, 4] = np.nan, 1, 0
    targets[rng.random(targets.shape) < rng.uniform(0, 0.7)] = np.nan
    return logits, targets


def random_multiclass(seed, classes=7, samples=131):
    """Tied rows, and two classes that no sample belongs to."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(samples, classes)).astype(np.float32)
    logits[rng.integers(0, samples, 20)] = logits[0]
    return logits, rng.choice(classes - 2, samples)


def slow_calibration_error(confidence, correct):
    error = 0.0
    for k in range(15):
        low, high = k / 15, (k + 1) / 15
        members = [i for i, p in enumerate(confidence) if low < p <= high or (k == 0 and p == 0)]
        if members:
            gap = np.mean([confidence[i] for i in members]) - np.mean([correct[i] for i in members])
            error += len(members) / len(confidence) * abs(gap)
    return error


def nanmean(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(values))


@pytest.mark.parametrize(("task", "labels"), [("multilabel", 5), ("binary", 1)])
@pytest.mark.parametrize("seed", SEEDS)
def test_labelwise_numbers_equal_scikit_learn(seed, task, labels):
    logits, targets = random_labelwise(seed, labels)
    names = [f"label {i}" for i in range(labels)]
    values = evaluate(logits, torch.from_numpy(targets), task, names)
    found, known = by_key(values), ~np.isnan(targets)

    wanted = {name: [] for name in ("auroc", "average_precision", "balanced_accuracy", "f1", "precision", "recall")}
    for i in range(labels):
        truth, score = targets[known[:, i], i], logits[known[:, i], i]
        decided = score > 0
        both = 0 < truth.sum() < len(truth)
        wanted["auroc"].append(oracle.roc_auc_score(truth, score) if both else math.nan)
        wanted["average_precision"].append(oracle.average_precision_score(truth, score) if both else math.nan)
        wanted["balanced_accuracy"].append(oracle.balanced_accuracy_score(truth, decided) if both else math.nan)
        for name in ("f1", "precision", "recall"):
            score_of = getattr(oracle, f"{name}_score")
            wanted[name].append(score_of(truth, decided, zero_division=0) if truth.sum() else math.nan)
    for name, series in wanted.items():
        assert [found[f"{name}/{label}"] for label in names] == pytest.approx(series, nan_ok=True), name
        assert found[f"mean_{name}"] == pytest.approx(nanmean(series), nan_ok=True)

    truth, probability = targets[known].astype(int), probabilities(logits, task)[known]
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(truth, probability > 0.5))
    assert found["loss"] == pytest.approx(oracle.log_loss(truth, probability, labels=[0, 1]))
    assert found["ece"] == pytest.approx(slow_calibration_error(probability, truth))
    for value in values:
        column = slice(None) if not value.class_name else names.index(value.class_name)
        assert value.support == known[:, column].sum()
        assert value.positives == (targets[:, column] == 1).sum()


@pytest.mark.parametrize("classes", [4, 7])
@pytest.mark.parametrize("seed", SEEDS)
def test_multiclass_numbers_equal_scikit_learn(seed, classes):
    logits, labels = random_multiclass(seed, classes)
    every, present = range(classes), sorted(set(labels))
    names = [f"class {i}" for i in every]
    values = evaluate(torch.from_numpy(logits), labels, "multiclass", names)
    found, probability, decided = by_key(values), probabilities(logits, "multiclass"), logits.argmax(axis=1)

    for name in ("precision", "recall", "f1"):
        series = getattr(oracle, f"{name}_score")(labels, decided, labels=every, average=None, zero_division=0)
        series = [series[c] if c in present else math.nan for c in every]
        assert [found[f"{name}/{c}"] for c in names] == pytest.approx(series, nan_ok=True), name
        assert found[f"mean_{name}"] == pytest.approx(nanmean(series))
    for name, score in (
        ("auroc", oracle.roc_auc_score),
        ("average_precision", oracle.average_precision_score),
    ):
        series = [score(labels == c, probability[:, c]) if c in present else math.nan for c in every]
        assert [found[f"{name}/{c}"] for c in names] == pytest.approx(series, nan_ok=True), name
        assert found[f"mean_{name}"] == pytest.approx(nanmean(series))
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(labels, decided))
    with warnings.catch_warnings():  # scikit-learn warns about decisions for classes without samples
        warnings.simplefilter("ignore", UserWarning)
        assert found["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(labels, decided))
    assert found["loss"] == pytest.approx(oracle.log_loss(labels, probability, labels=every))
    assert found["ece"] == pytest.approx(slow_calibration_error(probability.max(axis=1), decided == labels))
    assert ("top5_accuracy" in found) == (classes > 5)
    if classes > 5:
        top5 = oracle.top_k_accuracy_score(labels, probability, k=5, labels=every)
        assert found["top5_accuracy"] == pytest.approx(top5)
    support = {value.class_name: value.positives for value in values if value.class_name}
    assert [support[name] for name in names] == np.bincount(labels, minlength=classes).tolist()


def test_ranking_of_ties_by_hand():
    # One positive above both negatives, one tied with one of them and above the other: (2 + 1.5) / (2 × 2).
    auroc, average_precision = ranking(np.array([True, True, False, False]), np.array([0.9, 0.5, 0.5, 0.1]))
    assert auroc == pytest.approx(3.5 / 4)
    assert average_precision == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert ranking(np.array([True, False, False]), np.zeros(3)) == pytest.approx((0.5, 1 / 3))


def test_confident_samples_are_not_tied_by_rounding():
    # In float32 both probabilities are exactly 1 and the AUROC would be 0.5.
    logits = np.array([[25.0, 0.0], [20.0, 0.0]], dtype=np.float32)
    found = by_key(evaluate(logits, np.array([0, 1]), "multiclass", ["a", "b"]))
    assert found["auroc/a"] == 1.0


def test_equal_logits_earn_chance_and_not_full_marks():
    labels = np.arange(20) % 10
    found = by_key(evaluate(np.zeros((20, 10), np.float32), labels, "multiclass", [str(c) for c in range(10)]))
    assert found["accuracy"] == 0.1
    assert found["top5_accuracy"] == 0.5
    assert found["mean_auroc"] == 0.5
    assert found["loss"] == pytest.approx(math.log(10))


def test_calibration_error_by_hand():
    assert calibration_error(np.array([0.9, 0.9, 0.1]), np.array([1, 0, 0])) == pytest.approx(0.8 / 3 + 0.1 / 3)
    assert calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0
    # 0.2 = 3 / 15 closes its bin, and so shares it with 0.15.
    assert calibration_error(np.array([0.15, 0.2]), np.array([0, 1])) == pytest.approx(0.65 / 2)


def test_unknown_labels_are_not_errors():
    """Published code computes mean((probability > 0.5) == label), where NaN never equals anything."""
    logits = np.array([[3, -3], [2, -2], [-1, 1], [-4, 4]], dtype=np.float32)
    labels = (logits > 0).astype(np.float32)
    labels[0, 0] = labels[2, 1] = labels[3, 1] = np.nan
    assert ((logits > 0) == labels).mean() == 5 / 8
    accuracy = next(v for v in evaluate(logits, labels, "multilabel", ["a", "b"]) if v.key == "accuracy")
    assert accuracy == MetricValue("accuracy", "", 1.0, support=5, positives=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_unknown_cells_change_nothing(seed):
    logits, labels = random_labelwise(seed)
    evaluate_these = functools.partial(evaluate, task="multilabel", class_names=list("abcde"))
    other = np.where(np.isnan(labels), np.float32(7), logits)
    assert by_key(evaluate_these(other, labels)) == pytest.approx(by_key(evaluate_these(logits, labels)), nan_ok=True)


def test_numbers_are_not_means_of_batch_means():
    """Two batches: 3 samples, all wrong, and 1 sample, right. The mean of batch means would be 1 / 2."""
    evaluation = Evaluation("multiclass", ["a", "b"])
    evaluation.update(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([1, 1, 0]), torch.arange(3))
    evaluation.update(torch.tensor([[0.0, 1]]), torch.tensor([1]), torch.tensor([3]))
    assert by_key(evaluation.compute().metrics)["accuracy"] == 1 / 4

    # Inside each batch the positive wins; between the batches it does not.
    evaluation = Evaluation("binary", ["ill"])
    evaluation.update(torch.tensor([[-2.0], [-1]]), torch.tensor([[0.0], [1]]), torch.tensor([0, 1]))
    evaluation.update(torch.tensor([[1.0], [2]]), torch.tensor([[0.0], [1]]), torch.tensor([2, 3]))
    assert by_key(evaluation.compute().metrics)["mean_auroc"] == 3 / 4


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("seed", SEEDS)
def test_batches_order_and_padding_change_nothing(seed, task):
    logits, labels = {
        "multiclass": random_multiclass(seed, classes=5),
        "binary": random_labelwise(seed, labels=1),
        "multilabel": random_labelwise(seed),
    }[task]
    names = ["x"] if task == "binary" else list("abcde")
    logits, labels = torch.from_numpy(logits), torch.from_numpy(labels)
    index = torch.arange(len(logits)) * 3

    whole, parts = Evaluation(task, names), Evaluation(task, names)
    whole.update(logits, labels, index)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)))
    for rows in torch.tensor_split(order, [seed + 1, 60]):
        parts.update(logits[rows], labels[rows], index[rows])
        parts.update(torch.full_like(logits[:2], torch.nan), labels[:2], torch.tensor([-1, -1]))
    expected, found = whole.compute(), parts.compute()
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.logits, logits)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.logits.dtype == np.float32
    assert repr(found.metrics) == repr(expected.metrics) == repr(evaluate(logits, labels, task, names))


def gather(rank, folder):
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    logits, labels = random_labelwise(0)
    evaluation = Evaluation("multilabel", list("abcde"))
    # Rank 1 has no sample of its own.
    rows, index = (slice(None), torch.arange(len(logits))) if rank == 0 else (slice(1), torch.tensor([-1]))
    evaluation.update(torch.from_numpy(logits[rows]), torch.from_numpy(labels[rows]), index)
    result = evaluation.compute()
    Path(folder, f"{rank}.txt").write_text(repr((result.index.tolist(), result.metrics)))
    distributed.destroy_process_group()


def test_a_rank_without_samples_reports_the_same_numbers(tmp_path):
    # Forked, as spawning would import everything twice.
    multiprocessing.start_processes(gather, args=(str(tmp_path),), nprocs=2, start_method="fork")
    logits, labels = random_labelwise(0)
    expected = repr((list(range(len(logits))), evaluate(logits, labels, "multilabel", list("abcde"))))
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() == expected


def test_a_sample_counted_twice_is_an_error():
    evaluation = Evaluation("multiclass", ["a", "b"])
    batch = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.tensor([4, 5, 6])
    evaluation.update(*batch)
    evaluation.compute()
    evaluation.update(*(part[1:] for part in batch))
    with pytest.raises(ModelError, match="2 of 3 samples were evaluated more than once: rows 5, 6"):
        evaluation.compute()
    evaluation.reset()
    evaluation.update(*batch)
    assert evaluation.compute().index.tolist() == [4, 5, 6]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize(
    ("task", "names"), [("multiclass", list("abcdefg")), ("binary", ["x"]), ("multilabel", ["x", "y"])]
)
def test_no_samples_give_nan(task, names):
    result = Evaluation(task, names).compute()
    assert result.logits.shape == (0, len(names))
    assert {"accuracy", "loss", "ece", "mean_auroc"} <= {value.key for value in result.metrics}
    assert all(math.isnan(value.value) and value.support == 0 for value in result.metrics)


def test_half_precision_logits_are_collected_as_float32():
    evaluation = Evaluation("binary", ["healthy", "ill"])
    evaluation.update(torch.ones(2, 1, dtype=torch.bfloat16), torch.tensor([[0.0], [1.0]]), torch.arange(2))
    result = evaluation.compute()
    assert result.logits.dtype == np.float32
    assert {value.class_name for value in result.metrics} == {"", "ill"}


def test_metric_values_cannot_be_changed():
    value = MetricValue("auroc", "Edema", 0.8, 100, 7)
    assert value.key == "auroc/Edema"
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.value = 0.9


@pytest.mark.parametrize(
    ("task", "names", "logits", "labels", "message"),
    [
        ("regression", ["a"], np.zeros((2, 1)), np.zeros((2, 1)), "no task 'regression'"),
        ("multilabel", ["a", "a"], np.zeros((2, 2)), np.zeros((2, 2)), "class names repeat"),
        ("binary", ["a", "b", "c"], np.zeros((2, 1)), np.zeros((2, 1)), "binary task with 3 class names"),
        ("multilabel", ["a", "b"], np.zeros((2, 3)), np.zeros((2, 3)), r"logits \(2, 3\)"),
        ("binary", ["a"], np.zeros((2, 1)), np.zeros(2), r"labels \(2,\)"),
        ("multiclass", ["a", "b"], np.zeros((2, 2)), np.array([0, 2]), "met the label 2"),
        ("multiclass", ["a", "b"], np.zeros((2, 2)), np.array([-1, 0]), "met the label -1"),
        ("multilabel", ["a"], np.zeros((2, 1)), np.array([[0.5], [1]]), "met the label 0.5"),
    ],
)
def test_input_that_does_not_fit_is_refused(task, names, logits, labels, message):
    with pytest.raises(ModelError, match=message):
        evaluate(logits, labels, task, names)


def test_update_refuses_shapes_that_do_not_fit():
    evaluation = Evaluation("multilabel", ["a", "b"])
    with pytest.raises(ModelError, match=r"labels \(3, 1\)"):
        evaluation.update(torch.zeros(3, 2), torch.zeros(3, 1), torch.arange(3))
    with pytest.raises(ModelError, match="one per sample"):
        evaluation.update(torch.zeros(3, 2), torch.zeros(3, 2), torch.arange(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_not_scored(bad):
    logits = np.zeros((3, 2), np.float32)
    logits[1, 0] = bad
    with pytest.raises(NonFiniteLossError, match="1 of 3 samples"):
        evaluate(logits, np.zeros((3, 2), np.float32), "multilabel", ["a", "b"])


def test_probabilities_and_decisions():
    logits = np.random.default_rng(0).normal(scale=1000, size=(50, 4)).astype(np.float32)
    found = probabilities(logits, "multiclass")
    np.testing.assert_allclose(found, softmax(logits.astype(np.float64), axis=1), rtol=1e-12)
    np.testing.assert_array_equal(decide(found, [], "multiclass"), logits.argmax(axis=1))
    with np.errstate(over="ignore"):
        by_hand = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(probabilities(logits, "multilabel"), by_hand, rtol=1e-12)
    decisions = decide(np.array([[0.2, 0.2], [0.3, 0.8]]), [0.2, 0.1], "multilabel")
    assert decisions.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("seed", SEEDS)
def test_thresholds_reach_the_best_youden_index(seed):
    logits, labels = random_labelwise(seed)
    thresholds = choose_thresholds(logits, labels, "multilabel")
    scores = probabilities(logits, "multilabel")
    decisions = decide(scores, thresholds, "multilabel")
    for i, threshold in enumerate(thresholds):
        known = ~np.isnan(labels[:, i])
        truth, score = labels[known, i], scores[known, i]
        if not 0 < truth.sum() < len(truth):
            assert threshold == 0.5
            continue
        false_positives, true_positives, _ = oracle.roc_curve(truth, score, drop_intermediate=False)
        decided = decisions[known, i]
        reached = decided[truth == 1].mean() - decided[truth == 0].mean()
        assert reached == pytest.approx((true_positives - false_positives).max())
        assert threshold - score[score < threshold].max() == pytest.approx(score[score > threshold].min() - threshold)


def test_thresholds_by_hand():
    logits = np.log(np.array([[0.1], [0.2], [0.4], [0.9]]) / np.array([[0.9], [0.8], [0.6], [0.1]]))
    truth = np.array([[0.0], [0], [1], [1]])
    assert choose_thresholds(logits, truth, "binary") == pytest.approx([0.3])
    # Above 0.15 and above 0.65 reach the same J of 1 / 2: the more sensitive one is taken.
    assert choose_thresholds(logits, np.array([[0.0], [1], [0], [1]]), "binary") == pytest.approx([0.15])
    assert choose_thresholds(logits, 1 - truth, "binary") == [0.5]
    assert choose_thresholds(np.zeros((4, 1)), truth, "binary") == [0.5]
    assert choose_thresholds(np.zeros((4, 3)), np.array([0, 1, 2, 0]), "multiclass") == []
