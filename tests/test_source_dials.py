"""The dials of a source through a data set: what changes, what stays, what the rows say."""

import json

import numpy as np
import pandas as pd
import pytest

from datamodules import ImageFolder, ImageTable, Synthetic
from datamodules.errors import DataError
from studies.description import find_usage
from tests.data import tables

LARGE = {"classes": 8, "num_train": 400, "num_test": 100, "image_size": 16}


def rows_of(data):
    return {split: set(data.rows(split)) for split in ("train", "validation", "test")}


def test_fewer_classes_are_nested_and_hold_in_every_split():
    whole, four, two = (Synthetic(**LARGE, num_classes_kept=count) for count in (None, 4, 2))
    assert set(two.class_names) < set(four.class_names) < set(whole.class_names)
    assert (four.num_classes, len(four.class_names)) == (4, 4)
    names = np.array(whole.class_names)[whole.read_table().labels]
    for split in ("train", "validation", "test"):
        rows = four.rows(split)
        assert set(names[rows]) == set(four.class_names)
        assert np.array(four.class_names)[four.read_table().labels[rows]].tolist() == names[rows].tolist()
    steps = {step.reason: len(step.rows) for step in four.excluded}
    assert steps == {"class not kept": int((~np.isin(names, four.class_names)).sum())}
    assert set(Synthetic(**LARGE, num_classes_kept=4, few_shot_seed=1).class_names) != set(four.class_names)


def test_wrong_labels_stand_in_training_alone():
    clean, noisy, worse = (Synthetic(**LARGE, label_noise=rate) for rate in (0.0, 0.2, 0.4))
    right = clean.read_table().labels
    changed = [np.flatnonzero(data.read_table().labels != right) for data in (noisy, worse)]
    assert set(changed[0]) < set(changed[1]) <= set(clean.rows("train"))
    assert len(changed[0]) / len(clean.rows("train")) == pytest.approx(0.2, abs=0.06)
    assert rows_of(clean) == rows_of(noisy)
    kept = Synthetic(**LARGE, label_noise=0.5, num_classes_kept=3)
    assert set(kept.read_table().labels[kept.rows("train")]) == {0, 1, 2}


def test_noise_by_a_confusion_matrix(tmp_path):
    names = [f"class {number}" for number in range(8)]
    matrix = pd.DataFrame(np.roll(np.eye(8), 1, axis=1), index=names, columns=names)
    matrix.to_csv(tmp_path / "confusion.csv")
    noisy = Synthetic(**LARGE, label_noise=0.3, noise_confusion=str(tmp_path / "confusion.csv"))
    right, wrong = Synthetic(**LARGE).read_table().labels, noisy.read_table().labels
    changed = right != wrong
    assert ((right[changed] + 1) % 8 == wrong[changed]).all()
    assert noisy.dials.describe() == "label noise 0.3 by confusion.csv (seed 0)"


def test_noise_in_labels_that_may_occur_together_is_independent_of_the_choice(tmp_path):
    tables.create_csv(tmp_path, patients=120)
    columns = {"path": "file", "label": ["Pneumonia", "Effusion"], "group": "patient"}
    arguments = {"root": str(tmp_path), "table": "labels.csv", "columns": columns, "mode": "grey", "label_noise": 0.3}
    both, one = ImageTable(**arguments), ImageTable(**arguments, labels=["Effusion"])
    np.testing.assert_array_equal(both.read_table().labels[:, 1], one.read_table().labels[:, 0])


def test_curation_keeps_the_best_training_images(tmp_path):
    tables.create_tree(tmp_path / "tree", splits=("train", "test"), images=20)
    data = ImageFolder(root=str(tmp_path / "tree"), image_size=16)
    paths = np.asarray(data.read_table().paths)
    scores = pd.DataFrame({"path": paths, "score": np.arange(len(paths))[::-1]})
    scores.to_csv(tmp_path / "scores.csv", index=False)
    best = ImageFolder(
        root=str(tmp_path / "tree"), image_size=16, curation=0.5, curation_scores=str(tmp_path / "scores.csv")
    )
    train = data.rows("train")
    assert best.rows("train").tolist() == train[: round(len(train) / 2)].tolist()
    assert best.rows("test").tolist() == data.rows("test").tolist()
    assert best.dials.describe() == "best 0.5 by scores.csv (seed 0)"
    (step,) = best.excluded
    assert step.reason == "score not among the best 50% of scores.csv"
    usage = find_usage(best)  # what `describe` prints is what a run uses
    assert [one.reason for one in usage.steps] == [step.reason]
    assert usage.rows["train"].tolist() == best.rows("train").tolist()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_classes_kept": 9}, "num_classes_kept is 9"),
        ({"num_classes_kept": 2, "task": "multilabel"}, "wants classes"),
        ({"label_noise": 1.5}, "label_noise"),
        ({"noise_confusion": "x.csv"}, "without label_noise"),
        ({"curation": 0.5}, "need each other"),
    ],
)
def test_bad_settings(arguments, problem):
    with pytest.raises(DataError, match=problem):
        Synthetic(**{**LARGE, **arguments})


def test_bad_scores(tmp_path):
    tables.create_tree(tmp_path / "tree", splits=("train", "test"))
    paths = np.asarray(ImageFolder(root=str(tmp_path / "tree")).read_table().paths)

    def read(frame):
        frame.to_csv(tmp_path / "scores.csv", index=False)
        scores = str(tmp_path / "scores.csv")
        ImageFolder(root=str(tmp_path / "tree"), curation=0.5, curation_scores=scores).setup()

    good = pd.DataFrame({"path": paths, "score": ["1"] * len(paths)})
    with pytest.raises(DataError, match=r"no number: .*, high") as error:
        read(good.assign(score=["1", "high", *good["score"][2:]]))
    assert "scores.csv, line 3" in str(error.value)
    with pytest.raises(DataError, match="an image listed twice"):
        read(pd.concat([good, good.head(1)]))
    with pytest.raises(DataError, match="a score for none of"):
        read(good.assign(path="elsewhere/" + good["path"]))


def test_rows_name_the_dials_of_run_and_source(tiny_config, run_cli, tmp_path):
    words = ["--config", tiny_config, "--runs_dir", tmp_path / "runs", "--evaluate", "true"]
    noise = ["--data.init_args.label_noise", "0.2", "--data.init_args.fraction", "0.5"]
    assert run_cli("fit", *words, "--run", "source", *noise)[0] == 0
    source = tmp_path / "runs" / "tiny" / "source"
    assert run_cli("fit", *words, "--run", "target", "--model.init_args.weights", source)[0] == 0
    first, second = (
        json.loads((tmp_path / "runs" / "tiny" / name / "summary.json").read_text())["rows"][0]
        for name in ("source", "target")
    )
    assert first["dials"] == "label noise 0.2 (seed 0)"
    assert (second["dials"], second["source_dials"]) == (None, "fraction 0.5, label noise 0.2 (seed 0)")
