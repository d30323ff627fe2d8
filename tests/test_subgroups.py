"""Subgroups from stored predictions: slow versions, known truths, what is too few, their file and their section."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import recall_score, roc_auc_score

from datamodules.errors import DataError
from datamodules.image_table import ImageTable
from lightning_modules.metrics import EvaluationResult
from studies import outcome
from studies.page import Prose, TableBlock
from studies.patient_bootstrap import weighted_ranking
from studies.patient_sums import bootstrap_counts, weighted_auroc
from studies.report import make_tables
from studies.results import rows_to_frame
from studies.runs import RunFolder
from studies.sections.material import Material
from studies.sections.predictions import predictions
from studies.statistics import holm
from studies.stored_predictions import read_predictions
from studies.subgroup_attributes import age_bands, attributes_of
from studies.subgroups import GAP, TABLE, compare
from tests.data.images import write_image


def example(n=600, seed=0, patients=300):
    rng = np.random.default_rng(seed)
    patient = rng.integers(patients, size=n)
    labels = (rng.random((n, 3)) < (0.4, 0.3, 0.02)).astype(np.float32)
    logits = (rng.normal(size=(n, 3)) + 2 * labels - 1).round(1).astype(np.float32)  # rounded: there are ties
    labels[rng.random((n, 3)) < 0.1] = np.nan
    sex = rng.choice(["F", "M", ""], size=n, p=[0.5, 0.4, 0.1])
    return logits, labels, patient, {"sex": sex}


def found(result, **which):
    table = result.table if "group" in which else result.gaps
    for column, value in which.items():
        table = table[table[column] == value]
    assert len(table) == 1, table
    return table.iloc[0]


def test_values_are_those_of_scikit_learn():
    logits, labels, patient, attributes = example()
    result = compare(logits, labels, patient, attributes, "multilabel", list("abc"), [0.5, 0.4, 0.5], draws=100)
    assert list(result.table.columns) == list(TABLE)
    for group, sex in (("F", "F"), ("M", "M"), ("unknown", "")):
        for column, label in enumerate("ab"):
            rows = (attributes["sex"] == sex) & ~np.isnan(labels[:, column])
            truth, scores = labels[rows, column].astype(int), logits[rows, column]
            decided = expit(scores.astype(float)) > (0.5, 0.4)[column]
            values = {
                "auroc": roc_auc_score(truth, scores),
                "sensitivity": recall_score(truth, decided),
                "fnr": 1 - recall_score(truth, decided),
            }
            for metric, value in values.items():
                row = found(result, attribute="sex", group=group, label=label, metric=metric)
                assert row["value"] == pytest.approx(value, abs=1e-12)
                assert row["low"] <= row["value"] <= row["high"]
                assert row["low"] < row["high"]
                sizes = (rows.sum(), len(set(patient[rows])), truth.sum(), "")
                assert (row["n"], row["n_patients"], row["n_positive"], row["note"]) == sizes


def test_multiclass_is_one_against_the_rest():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=400)
    logits = rng.normal(size=(400, 3)) + np.eye(3)[labels]
    views = rng.choice(["PA", "AP"], size=400)
    result = compare(logits, labels, np.arange(400), {"view": views}, "multiclass", list("abc"), [], draws=50)
    rows = views == "PA"
    recalls = recall_score(labels[rows], logits[rows].argmax(axis=1), average=None)
    for label, recall in zip("abc", recalls, strict=True):
        row = found(result, attribute="view", group="PA", label=label, metric="sensitivity")
        assert row["value"] == pytest.approx(recall)
    row = found(result, attribute="view", group="PA", label="", metric="mean_sensitivity")
    assert row["value"] == pytest.approx(recalls.mean())


def test_area_is_that_of_the_weighted_ranking():
    logits, labels, patient, _ = example()
    known = ~np.isnan(labels[:, 0])
    truth, scores = labels[known, 0] == 1, logits[known, 0]
    counts = bootstrap_counts(300, 40)
    area = weighted_auroc(truth, scores, patient[known], counts)
    np.testing.assert_allclose(area, weighted_ranking(truth, scores, counts[patient[known]])[0], atol=1e-12)
    assert np.isnan(weighted_auroc(~truth & truth, scores, patient[known], counts)).all()


def test_too_few_is_said():
    logits, labels, patient, attributes = example()
    result = compare(logits, labels, patient, attributes, "multilabel", list("abc"), [0.5] * 3, draws=50)
    row = found(result, attribute="sex", group="M", label="c", metric="auroc")
    assert np.isnan([row["value"], row["low"], row["high"]]).all()
    assert row["note"].startswith("too few:")
    assert 0 < row["n_positive"] < 10
    assert compare(
        logits, labels, patient, attributes, "multilabel", list("abc"), [0.5] * 3, minimum=1, draws=50
    ).table["value"].notna().all()  # fmt: skip
    gap = found(result, attribute="sex", label="c", metric="auroc")
    assert (gap["n_groups"], np.isnan(gap["value"])) == (0, True)
    assert gap["note"] == "fewer than two groups with enough patients"
    # Many images of few patients are few.
    few = compare(logits, labels, patient % 9, attributes, "multilabel", list("abc"), [0.5] * 3, draws=20)
    assert few.table["note"].str.startswith("too few").all()


def test_mean_is_over_labels_that_every_group_has():
    logits, labels, patient, attributes = example()
    result = compare(logits, labels, patient, attributes, "multilabel", list("abc"), [0.5] * 3, draws=50)
    for group in "FM":
        mean = found(result, attribute="sex", group=group, label="", metric="mean_auroc")
        each = [found(result, attribute="sex", group=group, label=one, metric="auroc")["value"] for one in "ab"]
        assert mean["value"] == pytest.approx(np.mean(each))
        assert mean["note"] == "mean of 2 labels with enough patients in every group"
        assert mean["n"] == (attributes["sex"] == group).sum()
        assert pd.isna(mean["n_positive"])
    assert "unknown" not in set(result.table.loc[result.table["label"] == "", "group"])


def test_gap_of_equal_groups_is_seldom_found_and_a_true_one_is():
    """Six groups of unequal size, patients with several images: the range of noise alone is no finding."""
    below, covered, large = 0, 0, 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(300), 2)
        group = rng.choice(list("abcdef"), size=300, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1])[patient]
        labels = (rng.random((600, 1)) < 0.3).astype(np.float32)
        noise = (rng.normal(size=300)[patient] + rng.normal(size=600))[:, None] / np.sqrt(2)
        settings = (labels, patient, {"site": group}, "multilabel", ["x"], [0.5])
        same = found(compare(noise + labels, *settings, draws=80), attribute="site", metric="auroc")
        below += same["p"] <= 0.05
        covered += same["low"] == 0
        differ = noise + labels * np.where(group == "b", -0.5, 1.5)[:, None]
        other = found(compare(differ, *settings, draws=80), attribute="site", metric="auroc")
        large += (other["p"] <= 0.05) & (other["low"] > 0) & (other["worst"] == "b")
    assert below <= 4
    assert covered >= 26
    assert large >= 26


def test_gaps_say_which_groups_and_are_corrected():
    logits, labels, patient, attributes = example()
    logits[attributes["sex"] == "M", 0] *= 0.1
    result = compare(logits, labels, patient, attributes, "multilabel", list("abc"), [0.5] * 3, draws=100)
    assert list(result.gaps.columns) == list(GAP)
    values = {
        group: found(result, attribute="sex", group=group, label="a", metric="ece_debiased")["value"] for group in "FM"
    }
    gap = found(result, attribute="sex", label="a", metric="ece_debiased")
    best, worst = sorted(values, key=values.get)
    assert (gap["best"], gap["worst"], gap["n_groups"]) == (best, worst, 2)
    assert gap["value"] == pytest.approx(values[worst] - values[best])
    assert gap["low"] <= gap["value"] <= gap["high"]
    family = result.gaps[(result.gaps["metric"] == "auroc")]
    np.testing.assert_allclose(family["p_holm"], holm(family["p"].to_numpy()))
    assert family["p_holm"].isna().tolist() == [False, False, True]


def test_perfect_groups_claim_no_certainty():
    labels = np.tile([0.0, 1.0], 60)[:, None]
    logits = 10 * labels - 5
    sites = np.repeat(["x", "y"], 60)
    result = compare(logits, labels, np.arange(120), {"site": sites}, "binary", ["a"], [0.5], draws=50)
    row = found(result, attribute="site", group="x", label="a", metric="auroc")
    assert (row["value"], np.isnan(row["low"]), row["note"]) == (1.0, True, "no interval from resamples")
    row = found(result, attribute="site", group="x", label="a", metric="fnr")
    assert (row["value"], row["low"]) == (0.0, 0.0)
    assert 0.05 < row["high"] < 0.15  # Wilson: 30 of 30
    gap = found(result, attribute="site", label="a", metric="sensitivity")
    assert gap["note"] == "interval and p too optimistic: no resample of x, y differs"


def test_ages_and_other_attributes():
    years = np.array([0.5, 19, 20, 59.9, 80, 120, 148, np.nan, -1], dtype=np.float32)
    expected = ["0-19", "0-19", "20-39", "40-59", "80+", "80+", "unknown", "unknown", "unknown"]
    assert age_bands(years).tolist() == expected
    assert age_bands(years, (18, 65)).tolist()[:5] == ["unknown", "18-64", "18-64", "18-64", "65+"]
    attributes = attributes_of({"age": years, "view": np.array(["PA"] * 9)}, (5, 18, 65))
    assert attributes["age"][1] == "18-64"
    logits, labels, patient, _ = example(60)
    bands = age_bands(np.tile([30, 7, 12, 80, np.nan], 12), (5, 10, 40))
    mixed = np.array([None, np.nan, "", "unknown", " b "] * 12, dtype=object)
    result = compare(logits, labels, patient, {"age": bands, "site": mixed}, "multilabel", list("abc"), [0.5] * 3)
    table = result.table[result.table["label"] == "a"]
    assert table.loc[table["attribute"] == "age", "group"].unique().tolist() == ["5-9", "10-39", "40+", "unknown"]
    sites = table[(table["attribute"] == "site") & (table["metric"] == "fnr")]
    assert sites["group"].tolist() == ["b", "unknown"]
    nothing = compare(logits, labels, patient, {}, "multilabel", list("abc"), [0.5] * 3, draws=2)
    assert (len(nothing.table), len(nothing.gaps)) == (0, 0)


COLUMNS = {
    "path": "path", "label": "finding", "group": "who", "split": "split", "sex": "Sex", "age": "Age", "view": "View",
}  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    """Predictions of nine images of a CSV with some metadata, and what was stored."""
    lines = ["path,finding,who,split,Sex,Age,View"]
    for number, (sex, age) in enumerate([("F", "58Y"), ("Male", "7"), ("", "")] * 3):
        write_image(tmp_path / f"{number}.png", number)
        lines.append(f"{number}.png,{number % 2},p{number // 2},test,{sex},{age},PA")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    data = ImageTable(root=str(tmp_path), table="t.csv", columns=COLUMNS, task="binary", val_fraction=0.0)
    index = np.array([1, 2, 3, 6])
    labels = data.read_table().labels[index].reshape(4, -1)
    result = EvaluationResult(np.arange(4, dtype=np.float32)[:, None], labels, index, [])
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    outcome.write_predictions(folder, "test", result, data)
    return folder, result, data


def test_predictions_keep_the_metadata(stored):
    folder, result, data = stored
    predictions = read_predictions(folder.predictions)
    assert {name: values.tolist() for name, values in predictions.metadata.items() if name != "age"} == {
        "sex": ["M", "", "F", "F"],
        "view": ["PA"] * 4,
    }
    np.testing.assert_array_equal(predictions.metadata["age"], np.array([7, np.nan, 58, 58], np.float32))
    assert predictions.metadata["age"].dtype == np.float32
    assert (predictions.task, predictions.class_names) == ("multilabel", data.class_names)
    np.testing.assert_array_equal(predictions.logits, result.logits)
    np.testing.assert_array_equal(predictions.labels, result.labels)
    assert predictions.ids.tolist() == ["1.png", "2.png", "3.png", "6.png"]
    assert predictions.patients.tolist() == ["p0", "p1", "p1", "p3"]
    assert attributes_of(predictions.metadata)["age"].tolist() == ["0-19", "unknown", "40-59", "40-59"]


def test_earlier_files_stay_readable(stored):
    folder, result, data = stored
    frame = pd.read_parquet(folder.predictions)
    old = frame[[name for name in frame.columns if not name.startswith("meta/")]]
    old.to_parquet(folder.predictions, index=False)
    assert read_predictions(folder.predictions).metadata == {}
    outcome.write_predictions(folder, "validation", result, data)  # one split is written anew, the other is not
    metadata = read_predictions(folder.predictions).metadata
    assert all(pd.isna(values).all() for values in metadata.values())
    assert set(attributes_of(metadata)["age"]) == {"unknown"}
    unknown = compare(
        result.logits, result.labels, range(4), attributes_of(metadata), "binary", ["a"], [0.5], minimum=1, draws=5
    )
    assert set(unknown.table["group"]) == {"unknown"}
    assert read_predictions(folder.predictions, "validation").metadata["sex"].tolist() == ["M", "", "F", "F"]


def test_multiclass_predictions_and_bad_files(tmp_path):
    path = tmp_path / "predictions.parquet"
    frame = pd.DataFrame(
        {"id": ["a"], "group": ["p"], "split": ["test"], "label": [1], "logit/x": [0.5], "logit/y": [2]}
    )
    frame.to_parquet(path)
    predictions = read_predictions(path)
    assert (predictions.task, predictions.class_names, predictions.labels.tolist()) == ("multiclass", ["x", "y"], [1])
    with pytest.raises(DataError, match=r"no predictions of validation\n.*\n.*valid: test"):
        read_predictions(path, "validation")
    frame.drop(columns="group").to_parquet(path)
    with pytest.raises(DataError, match="cannot read predictions: 'group'"):
        read_predictions(path)
    path.write_text("nothing")
    with pytest.raises(DataError, match="cannot read predictions"):
        read_predictions(path)
    with pytest.raises(DataError, match="cannot read predictions"):
        read_predictions(tmp_path / "none.parquet")


def section_of(folder, monkeypatch, thresholds, labels):
    """The page's section on one run with two labels and a site, as text blocks and tables by their captions."""
    monkeypatch.setattr("studies.sections.predictions._reliability", lambda *_: [])  # no figure
    rng = np.random.default_rng(1)
    parts = []
    for split in ("validation", "test"):
        truth = (rng.random((300, labels)) < 0.4).astype(np.float32)
        scores = {f"logit/{n}": 3 * truth[:, n] - 1.5 + rng.normal(size=300).astype(np.float32) for n in range(labels)}
        parts.append(pd.DataFrame({
            "id": [f"{split}{n}" for n in range(300)], "group": np.arange(300).astype(str), "split": split,
            **{f"label/{n}": truth[:, n] for n in range(labels)}, **scores,
            "meta/site": np.where(np.arange(300) < 8, "small", np.where(np.arange(300) % 2, "a", "b")),
        }))  # fmt: skip
    run = RunFolder(folder / "s" / "cell")
    run.path.mkdir(parents=True)
    pd.concat(parts).to_parquet(run.predictions)
    run.update_summary(state="finished", run={}, rows=[], thresholds=thresholds)
    facts = {"study": "s", "cell": "cell", "run": "cell", "source": "a", "target": "t", "seed": 0}
    facts |= {"architecture": "net", "protocol": "finetune", "metric": "mean_auroc", "value": 0.9}
    frame = rows_to_frame([facts])
    study = SimpleNamespace(name="s", prevalence={})
    tables = make_tables(frame, {"t": "mean_auroc"})
    section = predictions(Material(study, folder, folder, frame, frame, tables, "scratch", []))
    blocks = section.blocks[0].blocks
    return [b.text for b in blocks if isinstance(b, Prose)], {
        b.caption.split()[0].strip(",:"): b.frame for b in blocks if isinstance(b, TableBlock)
    }


def test_section_says_what_the_gaps_allow_and_gives_errors_less_their_bias(tmp_path, monkeypatch):
    _, tables = section_of(tmp_path, monkeypatch, [0.5, 0.5], 2)
    gaps = tables["Gaps"].set_index(["label", "metric"])
    assert set(gaps["says"]) <= {"not distinguishable", "a gap", "too few", "no claim"}
    assert gaps.loc[("0", "auroc"), "says"] == "not distinguishable"
    written = pd.read_csv(tmp_path / "calibration_t.csv", keep_default_na=False).set_index(["stage", "metric"])
    shown = tables["Calibration"].set_index(["stage", "measure"])["value"]
    row = written.loc[("as trained", "mean_ece")]
    assert shown["as trained", "mean ece"] == (
        f"{float(row['debiased']):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]"
    )
    few = tables["Subgroups"].query("group == 'small'")
    assert few.empty or few["note"].str.startswith("too few").all()


def test_section_of_one_label_without_thresholds(tmp_path, monkeypatch):
    texts, tables = section_of(tmp_path, monkeypatch, [], 1)
    assert texts[-1] == "No subgroups: 0 decision thresholds for 1 labels."
    assert tables["Calibration"]["measure"].tolist() == 2 * ["ece", "ece equal mass", "brier", "brier skill"]
