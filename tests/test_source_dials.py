"""The dials of a source through a data set: what changes, what stays, what the rows say."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from datamodules import ImageFolder, ImageTable, Synthetic
from datamodules.errors import DataError
from datamodules.natural.caltech import Caltech101
from datamodules.natural.camera_traps import CameraTraps
from datamodules.natural.cassava import Cassava
from datamodules.natural.domainnet import DomainNet
from datamodules.natural.dtd import DTD
from datamodules.natural.eurosat import EuroSAT
from datamodules.natural.flowers import OxfordFlowers102
from datamodules.natural.imagenet21k import ImageNet21k
from datamodules.natural.pets import OxfordPets
from datamodules.source_dials import SourceDials, read_scores
from studies.description import find_usage
from tests.data import caltech, camera_traps, cassava, domainnet, dtd, eurosat, flowers, imagenet, pets, tables

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


@pytest.mark.parametrize(
    ("cls", "write"),
    [
        (Caltech101, caltech.write),
        (CameraTraps, camera_traps.create),
        (Cassava, cassava.create),
        (DomainNet, domainnet.create),
        (DTD, dtd.create),
        (EuroSAT, eurosat.write),
        (ImageNet21k, imagenet.create_21k),
        (OxfordFlowers102, flowers.create),
        (OxfordPets, pets.create),
    ],
)
def test_dials_of_every_natural_set(cls, write, tmp_path, monkeypatch):
    caltech.shrink(monkeypatch)
    eurosat.shrink(monkeypatch)
    write(tmp_path)
    whole, part, noisy = (cls(root=str(tmp_path), **dial) for dial in ({}, {"num_classes_kept": 3}, {"label_noise": 1}))
    names, right = np.array(whole.class_names), whole.read_table().labels
    for split in ("train", "validation", "test"):
        rows = part.rows(split)
        assert rows.tolist() == [row for row in whole.rows(split) if names[right[row]] in part.class_names]
        assert np.array(part.class_names)[part.read_table().labels[rows]].tolist() == names[right[rows]].tolist()
        assert (noisy.read_table().labels == right)[whole.rows(split)].all() == (split != "train")


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
    matrix[:] = 1  # names all classes, of which a draw keeps some
    matrix.to_csv(tmp_path / "confusion.csv")
    arguments = {"label_noise": 1.0, "noise_confusion": str(tmp_path / "confusion.csv")}
    few, clean = (Synthetic(**LARGE, num_classes_kept=3, **noise) for noise in (arguments, {}))
    rows = clean.rows("train")
    wrong = few.read_table().labels[rows]
    assert set(wrong) == {0, 1, 2}
    assert (wrong != clean.read_table().labels[rows]).all()
    with pytest.raises(DataError, match="noise_confusion is for one class an image"):
        Synthetic(**LARGE, task="multilabel", **arguments).read_table()


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


def test_curation_keeps_a_share_of_what_is_used_otherwise(tmp_path):
    whole = Synthetic(**LARGE)
    table = whole.read_table()
    scores = pd.DataFrame({"path": np.asarray(table.paths), "score": -table.labels})  # some classes are the worst
    scores.to_parquet(tmp_path / "scores.parquet")
    best = {"curation": 0.25, "curation_scores": str(tmp_path / "scores.parquet")}
    for kept in range(1, 9):
        part, cut = (Synthetic(**LARGE, num_classes_kept=kept, **dials) for dials in ({}, best))
        assert len(cut.rows("train")) == max(1, round(len(part.rows("train")) / 4))
        assert rows_of(cut)["test"] == rows_of(part)["test"]
    usable = np.zeros(len(table), dtype=bool)
    usable[whole.rows("train")[:40]] = True
    (left_out,) = SourceDials(curation=0.025, curation_scores=best["curation_scores"]).exclusions(table, usable).items()
    assert left_out[0] == "score not among the best 2.5% of scores.parquet"
    assert (left_out[1].sum(), (left_out[1] & ~usable).sum()) == (39, 0)


def test_scores_of_the_set_itself(tmp_path):
    """Column `score` of the table does what a file with the same scores does."""
    whole = Synthetic(**LARGE)
    table = whole.read_table()
    scores = np.random.default_rng(0).random(len(table))
    pd.DataFrame({"path": np.asarray(table.paths), "score": scores}).to_csv(tmp_path / "scores.csv", index=False)
    (expected,) = SourceDials(curation=0.4, curation_scores=str(tmp_path / "scores.csv")).exclusions(table).values()
    own = SourceDials(curation=0.4, score="similarity")
    (found,) = own.exclusions(replace(table, metadata={"score": scores})).items()
    assert found[0] == "score not among the best 40% of similarity"
    np.testing.assert_array_equal(found[1], expected)
    assert own.describe() == "best 0.4 by similarity (seed 0)"
    for bad in ({"score": "a"}, {"score": "a", "curation_scores": "b.csv"}):
        with pytest.raises(DataError, match="need each other"):
            SourceDials(**bad)
    with pytest.raises(DataError, match="exclude each other"):
        SourceDials(curation=0.4, score="a", curation_scores="b.csv")


def test_scores_agree_with_a_dictionary(tmp_path):
    random = np.random.default_rng(0)
    images = np.array([f"é {number}#.jpg" for number in random.permutation(3000)], dtype=object)
    frame = pd.DataFrame({"path": images[::2], "score": random.random(1500)})
    frame.loc[::7, "score"] = np.nan
    expected = frame.set_index("path")["score"].reindex(images).to_numpy()
    frame.to_csv(tmp_path / "scores.csv", index=False)
    frame.assign(path=" " + frame["path"]).to_parquet(tmp_path / "scores.parquet")
    for name in ("scores.csv", "scores.parquet"):
        np.testing.assert_array_equal(read_scores(tmp_path / name, images), expected)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_classes_kept": 9}, "num_classes_kept is 9"),
        ({"num_classes_kept": 2, "task": "multilabel"}, "wants classes"),
        ({"label_noise": 1.5}, "label_noise"),
        ({"noise_confusion": "x.csv"}, "without label_noise"),
        ({"curation": 0.5}, "need each other"),
        ({"curation_scores": "x.csv"}, "need each other"),
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
    with pytest.raises(DataError, match=r"no number: 'high'") as error:
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


def folder_of_pets(root):
    return tables.create_tree(root / "pets", images=10)


@pytest.mark.parametrize("kind", ["folder", "table", "numbers"])
def test_fewer_classes_of_a_set_of_ones_own(kind, tmp_path):
    root = folder_of_pets(tmp_path)
    if kind == "folder":
        build = lambda **arguments: ImageFolder(root=str(root), **arguments)  # noqa: E731
    else:
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
        labels = [path.split("/")[1] if kind == "table" else tables.CLASSES.index(path.split("/")[1]) for path in files]
        pd.DataFrame({"file": files, "label": labels}).to_csv(root / "all.csv", index=False)
        columns = {"path": "file", "label": "label"}
        build = lambda **arguments: ImageTable(  # noqa: E731
            root=str(root), table="all.csv", columns=columns, class_names=tables.CLASSES, **arguments
        )
    kept = build(num_classes_kept=2, few_shot_seed=1)
    for split in ("train", "validation", "test"):
        rows = kept.rows(split)
        folders = [path.split("/")[1] for path in kept.read_table().paths[rows]]
        assert [kept.class_names[label] for label in kept.read_table().labels[rows]] == folders


def test_outputs_of_another_model_name_the_same_images(tmp_path):
    root = folder_of_pets(tmp_path)
    for outputs in (["cat", "ant", "bee"], ["bee", "cat"]):
        data = ImageFolder(root=str(root), outputs=outputs)
        table = data.read_table()
        labelled = np.flatnonzero(table.labels >= 0)
        assert [outputs[label] for label in table.labels[labelled]] == [
            path.split("/")[1] for path in table.paths[labelled]
        ]
        assert len(labelled) == (90 if len(outputs) == 3 else 60)


def test_a_set_that_is_only_evaluated_is_never_made_worse():
    plain, dialled = (
        Synthetic(**LARGE, outputs=[f"class {number}" for number in range(8)], **dials)
        for dials in ({}, {"label_noise": 0.4, "curation": 0.5, "curation_scores": "none.csv"})
    )
    for data in (plain, dialled):
        data.setup()
        data.test_on_all()
    np.testing.assert_array_equal(plain.rows("test"), dialled.rows("test"))
    np.testing.assert_array_equal(plain.read_table().labels, dialled.read_table().labels)


def test_curation_keeps_a_share_of_what_is_used(tmp_path):
    data = Synthetic(**LARGE, num_classes_kept=2)
    paths = data.read_table().paths
    scores = tmp_path / "scores.csv"
    pd.DataFrame({"path": paths, "score": np.arange(len(paths))}).to_csv(scores, index=False)
    curated = Synthetic(**LARGE, num_classes_kept=2, curation=0.5, curation_scores=str(scores))
    train = data.rows("train")
    assert curated.rows("train").tolist() == train[len(train) // 2 :].tolist()
