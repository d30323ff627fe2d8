"""Calibration of stored predictions, against torchmetrics, scikit-learn and searches by brute force; its figure."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_modules.metrics import evaluate
from studies.calibration import calibration_table
from studies.calibration_errors import calibration_errors, confidences, debiased, error_by_chance, reliability
from studies.calibration_figures import reliability_diagram
from studies.patient_sums import bootstrap_counts, wilson
from studies.temperature import TEMPERATURES, fit_temperature

SHIFT = 0.7  # logits are too high by this


def binary(n, seed=0, shift=SHIFT):
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=n)
    return logits, (rng.random(n) < expit(logits - shift)).astype(float)


def several(n=600, seed=0, sharpness=2.5):
    """Logits `sharpness` times as large as those that the classes were drawn from."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(n, 4))
    labels = (softmax(true, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return (sharpness * true).astype(np.float32), labels


def labelled(n=600, unknown=0.2):
    parts = [binary(n, seed, shift) for seed, shift in enumerate((0.0, 0.7, 2.0))]
    logits, labels = (np.stack(part, axis=1).astype(np.float32) for part in zip(*parts, strict=True))
    labels[np.random.default_rng(9).random(labels.shape) < unknown] = np.nan
    return logits, labels


def own(logits, outcome, counts=None, **settings):
    counts = np.ones((len(logits), 1)) if counts is None else counts
    return calibration_errors(expit(logits), outcome, np.arange(len(logits)), counts, **settings)


def rows_of(table, stage="as trained"):
    table = table[table["stage"] == stage]
    return {(row.metric, row.class_name): row for row in table.itertuples()}


def test_errors_are_those_of_torchmetrics():
    logits, outcome = binary(500)
    oracle = binary_calibration_error(torch.tensor(expit(logits)), torch.tensor(outcome).long(), n_bins=15)
    assert own(logits, outcome)[0] == pytest.approx(oracle.item(), abs=1e-6)
    logits, labels = several()
    table = rows_of(calibration_table(logits, labels, np.arange(600), "multiclass", list("abcd"), draws=20))
    oracle = multiclass_calibration_error(torch.tensor(softmax(logits, axis=1)), torch.tensor(labels), 4, n_bins=15)
    assert table["ece", ""].value == pytest.approx(oracle.item(), abs=1e-6)
    stored = {one.name: one.value for one in evaluate(logits, labels, "multiclass", list("abcd"))}
    assert table["ece", ""].value == pytest.approx(stored["ece"], abs=1e-12)
    each = [
        binary_calibration_error(torch.tensor(softmax(logits, axis=1)[:, c]), torch.tensor(labels == c).long()).item()
        for c in range(4)
    ]
    assert [table["ece", name].value for name in "abcd"] == pytest.approx(each, abs=1e-6)
    assert table["mean_ece", ""].value == pytest.approx(np.mean(each), abs=1e-6)


def test_equal_mass_bins_are_those_of_scikit_learn():
    logits, outcome = binary(500)
    for equal_mass, strategy in ((True, "quantile"), (False, "uniform")):
        points = reliability(expit(logits), outcome, equal_mass=equal_mass)
        frequency, confidence = calibration_curve(outcome, expit(logits), n_bins=15, strategy=strategy)
        np.testing.assert_allclose(points[["frequency", "confidence"]].to_numpy(), np.stack([frequency, confidence], 1))
        gap = np.abs(points["frequency"] - points["confidence"]) @ points["count"] / 500
        assert own(logits, outcome, equal_mass=equal_mass)[0] == pytest.approx(gap)
        for point in points.itertuples():
            inside = (expit(logits) > point.left) & (expit(logits) <= point.right)
            assert inside.sum() in (point.count, point.count - 1)  # the lowest quantile is its bin's own edge
            assert (point.low, point.high) == wilson(round(point.frequency * point.count), point.count)
    assert np.ptp(reliability(expit(logits), outcome, equal_mass=True)["count"]) <= 1
    assert reliability(np.zeros(0), np.zeros(0)).empty


def test_brier_scores_and_skill():
    logits, labels = labelled()
    table = rows_of(calibration_table(logits, labels, np.arange(600), "multilabel", list("abc"), draws=50))
    for column, name in enumerate("abc"):
        known = ~np.isnan(labels[:, column])
        truth = labels[known, column].astype(float)
        oracle = brier_score_loss(truth, expit(logits[known, column].astype(float)))
        reference = brier_score_loss(truth, np.full(known.sum(), truth.mean()))
        row, skill = table["brier", name], table["brier_skill", name]
        assert (row.value, skill.value) == pytest.approx((oracle, 1 - oracle / reference), abs=1e-12)
        assert row.low < row.value < row.high
        assert (row.n, row.n_patients) == (known.sum(), known.sum())
    mean = np.mean([table["brier", name].value for name in "abc"])
    assert table["mean_brier", ""].value == pytest.approx(mean)
    logits, labels = several()
    table = rows_of(calibration_table(logits, labels, np.arange(600), "multiclass", list("abcd"), draws=20))
    oracle = brier_score_loss(labels, softmax(logits.astype(float), axis=1), scale_by_half=False)
    shares = np.bincount(labels) / 600
    assert table["brier", ""].value == pytest.approx(oracle, abs=1e-9)
    assert table["brier_skill", ""].value == pytest.approx(1 - oracle / (shares * (1 - shares)).sum(), abs=1e-9)


def test_temperature_is_the_best_of_a_search():
    logits, labels = several()
    (found,) = fit_temperature(logits, labels, "multiclass")
    grid = np.geomspace(0.2, 20, 4001)
    losses = [log_loss(labels, softmax(logits / t, axis=1)) for t in grid[::80]]
    assert found == pytest.approx(grid[::80][np.argmin(losses)], rel=0.06)
    assert log_loss(labels, softmax(logits.astype(float) / found, axis=1)) <= min(losses) + 1e-9
    assert found == pytest.approx(2.5, rel=0.15)  # the truth
    logits, labels = labelled()
    for column, found in enumerate(fit_temperature(logits, labels, "multilabel")):
        known = ~np.isnan(labels[:, column])
        margin = np.where(labels[known, column] == 1, 1, -1) * logits[known, column].astype(float)
        losses = np.logaddexp(0, -margin / grid[:, None]).mean(axis=1)
        assert found == pytest.approx(grid[losses.argmin()], rel=2e-3)


def test_temperature_without_an_optimum():
    labels = np.array([[1, 1, 1], [0, 1, 0], [1, np.nan, 0], [0, 1, 1]], dtype=np.float32)
    logits = np.array([[2, 1, -1], [-1, 1, 1], [1, 1, 1], [-3, 1, -1]], dtype=np.float32)
    separated, positives_only, reverse = fit_temperature(logits, labels, "multilabel")
    assert (separated, reverse) == pytest.approx(TEMPERATURES, rel=1e-3)
    assert np.isnan(positives_only)
    assert np.isnan(fit_temperature(np.empty((0, 4)), np.empty(0, int), "multiclass")).all()


def test_table_before_and_after():
    """Scaling mends sharp logits, leaves decisions alone, and a label without a temperature as it is."""
    (old, old_labels), (logits, labels) = several(seed=1), several(seed=2)
    temperature = fit_temperature(old, old_labels, "multiclass")
    table = calibration_table(logits, labels, np.arange(600), "multiclass", list("abcd"), temperature, draws=200)
    before, after = rows_of(table), rows_of(table, "after temperature")
    assert after["ece", ""].high < before["ece", ""].low
    assert after["brier", ""].value < before["brier", ""].value
    assert after["ece", ""].low == 0.0 < before["ece", ""].low
    assert set(before) == set(after)
    assert (after["ece", "a"].temperature, after["mean_ece", ""].temperature) == (temperature[0], temperature[0])
    logits, labels = labelled()
    found = calibration_table(
        logits, labels, np.arange(600), "multilabel", list("abc"), np.array([2.0, np.nan, 1.0]), draws=20
    )
    before, after = rows_of(found), rows_of(found, "after temperature")
    assert (after["ece", "b"].value, after["ece", "b"].temperature) == (before["ece", "b"].value, 1.0)
    assert after["ece", "b"].note.startswith("kept as trained")
    assert after["ece", "a"].value != before["ece", "a"].value
    assert (after["mean_ece", ""].note, np.isnan(after["mean_ece", ""].temperature)) == ("", True)


def test_unknown_labels_and_many_classes():
    logits, labels = labelled()
    labels[:, 1] = np.nan
    table = rows_of(calibration_table(logits, labels, np.arange(600), "multilabel", list("abc"), draws=20))
    assert (table["ece", "b"].n, table["ece", "b"].note) == (0, "no known label")
    assert np.isnan([table["ece", "b"].value, table["brier", "b"].value, table["ece", "b"].by_chance]).all()
    mean = np.mean([table["ece", name].value for name in "ac"])
    assert table["mean_ece", ""].value == pytest.approx(mean)
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 40)), rng.integers(40, size=300)
    names = [str(number) for number in range(40)]
    table = rows_of(calibration_table(logits, labels, np.arange(300), "multiclass", names, draws=20))
    assert {name for _, name in table} == {""}
    each = [binary_calibration_error(torch.tensor(one.confidence), torch.tensor(one.outcome).long(), n_bins=15).item()
            for name, one in confidences(logits, labels, "multiclass", names) if name]  # fmt: skip
    assert table["mean_ece", ""].value == pytest.approx(np.mean(each), abs=1e-6)
    assert np.isnan(table["mean_ece", ""].low)
    assert table["ece", ""].low <= table["ece", ""].high


def test_resamples_are_a_slow_bootstrap_over_patients():
    logits, outcome = binary(120)
    patient = np.repeat(np.arange(40), 3)
    counts = bootstrap_counts(40, 30, seed=4)
    assert (counts[:, 0] == 1).all()
    assert (counts.sum(axis=0) == 40).all()
    edges = np.quantile(expit(logits), np.arange(1, 5) / 5)  # the sample's bins
    found = calibration_errors(expit(logits), outcome, patient, counts, equal_mass=True, bins=5)
    for count, error in zip(counts.T, found, strict=True):
        rows = np.repeat(np.arange(120), count[patient].astype(int))
        number = np.searchsorted(edges, expit(logits[rows]))
        slow = sum(abs((expit(logits[rows]) - outcome[rows])[number == one].sum()) for one in range(5)) / len(rows)
        assert error == pytest.approx(slow)


def test_error_of_a_calibrated_model_is_what_chance_gives():
    """Of few images the error is biased upwards: chance says by how much, also where a patient's images are alike."""
    found = []
    for seed in range(60):
        logits, outcome = (np.repeat(one, 3) for one in binary(150, seed, shift=0.0))
        patient = np.repeat(np.arange(150), 3)
        errors = calibration_errors(expit(logits), outcome, patient, bootstrap_counts(150, 60, seed))
        chance = error_by_chance(expit(logits), outcome, patient)
        alone = error_by_chance(expit(logits), outcome, np.arange(450))
        found.append([errors[0], chance[0], alone[0], *debiased(errors, chance)])
    error, chance, alone, corrected, _, _ = np.mean(found, axis=0)
    assert chance == pytest.approx(error, rel=0.1)
    assert alone < 0.7 * error
    assert corrected < 0.75 * error
    lows, highs = np.array(found).T[4:]
    assert np.mean((lows == 0) & (highs > 0)) >= 0.9


def test_debiased_error_of_a_miscalibrated_model():
    """The true error is known from many images; intervals of few cover it, the plain value lies above it."""
    truth = own(*binary(400_000, 99, 0.3))[0]
    found = []
    for seed in range(80):
        logits, outcome = binary(500, seed, 0.3)
        errors = own(logits, outcome, bootstrap_counts(500, 80, seed))
        found.append([errors[0], *debiased(errors, error_by_chance(expit(logits), outcome, np.arange(500)))])
    plain, corrected, _, _ = np.mean(found, axis=0)
    assert abs(corrected - truth) < 0.4 * (plain - truth)
    assert np.mean([low <= truth <= high for _, _, low, high in found]) > 0.8


def test_figure(monkeypatch):
    monkeypatch.setattr("studies.calibration_figures.PANELS", 2)
    logits, labels = labelled()
    names = ["a label with quite a long name that has to be wrapped", *(f"label {n}" for n in range(2, 6))]
    stages = {"raw": 1, "scaled": 2}
    points = {
        name: {stage: reliability(expit(logits[:, i % 3] / t), labels[:, i % 3] == 1) for stage, t in stages.items()}
        for i, name in enumerate(names)
    }
    figure = reliability_diagram(points)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert len(titles) == 2
    assert f"not drawn: {', '.join(names[2:])}" in [text.get_text().replace("\n", " ") for text in figure.texts]
    one = reliability_diagram({"": {"as trained": points[names[1]]["raw"]}})
    drawn = one.axes[0].lines[1]  # after the diagonal
    np.testing.assert_allclose(drawn.get_ydata(), 100 * points[names[1]]["raw"]["frequency"])
    bars = np.array([patch.get_height() for patch in one.axes[1].patches])
    assert bars.sum() == pytest.approx(100)
    assert reliability_diagram({"none": {"raw": pd.DataFrame(columns=points[names[1]]["raw"].columns)}}).axes
