"""Test images that the source of the weights has seen are found: by id, patient, file name and content."""

import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from datamodules import ImageTable
from studies import guard, training_record
from studies.runs import RunFolder
from tests.data.images import picture

COLUMNS = {"path": "file", "label": "sick", "group": "patient", "split": "split"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))


def create(root, *, patients=30, first=0, prefix="a"):
    """A clinic's table: 2 images a patient, the last third of the patients is the test set."""
    rows = []
    for patient in range(first, first + patients):
        for image in range(2):
            name = f"{prefix}{patient:05d}_{image}.png"
            cv2.imwrite(str(root / name), picture(2 * patient + image))
            split = "test" if patient - first >= 20 else "train"
            rows.append({"file": name, "sick": patient % 2, "patient": f"p{patient}", "split": split})
    frame = pd.DataFrame(rows)
    frame.to_csv(root / "labels.csv", index=False)
    return frame


def module(root, **arguments):
    arguments = {"val_fraction": 0.0, **arguments}
    return ImageTable(root=str(root), table="labels.csv", columns=COLUMNS, task="binary", mode="grey", **arguments)


@pytest.fixture
def source(tmp_path):
    """Run folder that has recorded training on clinic a."""
    (tmp_path / "a").mkdir()
    create(tmp_path / "a")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    training_record.write_record(folder, module(tmp_path / "a"), None, hashes=True)
    return str(folder.path)


def test_its_own_split_is_clean(tmp_path, source):
    overlap = guard.check_source(source, module(tmp_path / "a"))
    assert (overlap.examples, overlap.tested, overlap.describe()) == ([], 20, "source checked")


def test_another_split_of_the_same_set(tmp_path, source):
    frame = pd.read_csv(tmp_path / "a" / "labels.csv")
    frame["split"] = np.where(frame["patient"].isin(["p3", "p25"]), "test", "train")
    frame = frame[frame["file"] != "a00003_1.png"]
    frame.to_csv(tmp_path / "a" / "labels.csv", index=False)
    overlap = guard.check_source(source, module(tmp_path / "a"))
    assert (overlap.by["id"], overlap.by["patient"], overlap.tested) == (1, 1, 3)
    assert overlap.examples == ["a00003_0.png"]


def test_a_patient_with_other_images(tmp_path, source):
    frame = pd.read_csv(tmp_path / "a" / "labels.csv")
    frame.loc[frame["file"] == "a00025_0.png", ["patient"]] = "p4"
    frame = frame[frame["patient"].isin(["p4", "p25"]) == frame["file"].str.startswith("a00025")]
    frame.to_csv(tmp_path / "a" / "labels.csv", index=False)
    overlap = guard.check_source(source, module(tmp_path / "a"))
    assert (overlap.by["id"], overlap.by["patient"]) == (0, 1)


def test_copies_under_other_names_in_another_set(tmp_path, source):
    (tmp_path / "b").mkdir()
    create(tmp_path / "b", first=100, prefix="b")
    for number, original in enumerate(("a00000_0", "a00001_1", "a00005_0")):
        image = cv2.imread(str(tmp_path / "a" / f"{original}.png"), cv2.IMREAD_GRAYSCALE)
        changed = cv2.resize(image, (60, 80), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(tmp_path / "b" / f"b0012{number}_0.png"), changed)
    overlap = guard.check_source(source, module(tmp_path / "b"))
    assert overlap.by == {"id": 0, "patient": 0, "file name": 0, "image content": 3}
    with pytest.raises(guard.DataError, match=r"trained on test images of b: 3 by image content, of 20") as error:
        guard.guard(source, module(tmp_path / "b"))
    assert "--data.leaks record" in str(error.value)
    marked = guard.guard(source, module(tmp_path / "b", leaks="record"))
    assert marked == "patients disjoint; LEAK: the source has seen test images (3 by image content, of 20)"


def test_file_names_count_unless_the_images_differ(tmp_path, source):
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    frame = pd.read_csv(tmp_path / "c" / "labels.csv")
    frame["split"] = np.where(frame["patient"].isin(["p0", "p1"]), "test", "train")
    frame["patient"] = "other " + frame["patient"]
    frame.to_csv(tmp_path / "c" / "labels.csv", index=False)
    assert guard.check_source(source, module(tmp_path / "c")).by["file name"] == 4
    for number, name in enumerate(frame["file"]):  # names that merely count: other images
        cv2.imwrite(str(tmp_path / "c" / name), picture(5000 + number))
    assert guard.check_source(source, module(tmp_path / "c")).examples == []


def test_numbers_in_class_folders_tell_nothing():
    test, seen = pd.Series(["cat/0001.jpg", "dog/0001.jpg"]), pd.Series(["x/0001.jpg"])
    assert [len(part) for part in guard.same_file_names(test, seen)] == [0, 0]
    test, seen = pd.Series(["x/00012_001.png", "y/7.png"]), pd.Series(["00012_001.jpeg", "z/8.png"])
    assert [part.tolist() for part in guard.same_file_names(test, seen)] == [[0], [0]]


def test_history_is_inherited_and_unknown_weights_are_named(tmp_path, source):
    (tmp_path / "b").mkdir()
    create(tmp_path / "b", first=100, prefix="b")
    child = RunFolder(tmp_path / "child")
    child.path.mkdir()
    training_record.write_record(child, module(tmp_path / "b"), source, hashes=False)
    frame = pd.read_csv(tmp_path / "a" / "labels.csv")
    frame["split"] = np.where(frame["patient"] == "p2", "test", "train")
    frame.to_csv(tmp_path / "a" / "labels.csv", index=False)
    assert guard.check_source(str(child.path), module(tmp_path / "a")).by["id"] == 2
    assert guard.guard("resnet18.a1_in1k", module(tmp_path / "b")).endswith(
        "source cannot be checked (resnet18.a1_in1k)"
    )
    grandchild = RunFolder(tmp_path / "grandchild")
    grandchild.path.mkdir()
    training_record.write_record(grandchild, module(tmp_path / "b"), "resnet18.a1_in1k", hashes=False)
    overlap = guard.check_source(str(grandchild.path / "checkpoints" / "last.ckpt"), module(tmp_path / "a"))
    assert overlap.describe() == "source cannot be checked (resnet18.a1_in1k)"


def test_through_fit(tmp_path, run_cli):
    (tmp_path / "a").mkdir()
    create(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    frame = pd.read_csv(tmp_path / "b" / "labels.csv")
    frame["split"] = np.where(frame["split"] == "test", "train", "test")
    frame.to_csv(tmp_path / "b" / "labels.csv", index=False)

    def fit(name, *words):
        data = {"table": "labels.csv", "columns": COLUMNS, "task": "binary", "mode": "grey", "val_fraction": 0.0}
        config = {
            "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
            "model": {"class_path": "Classification", "init_args": {"backbone": "test_resnet"}},
            "data": {"class_path": "ImageTable", "init_args": {**data, "image_size": 16, "root": str(tmp_path / name)}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return run_cli(
            *("fit", "--config", tmp_path / f"{name}.yaml", "--runs_dir", tmp_path / "runs", "--experiment", "e"),
            *("--run", name, "--evaluate", "true", *words),
        )

    assert fit("a")[0] == 0
    weights = ("--model.init_args.weights", tmp_path / "runs" / "e" / "a")
    code, _, err = fit("b", *weights)
    assert code == 2
    assert "trained on test images of b: 40 by file name, 40 by image content, of 40" in err
    assert len(err.splitlines()) <= 15
    # The stopped start has lost nothing, so the same name may be used with the override.
    assert fit("b", *weights, "--data.init_args.leaks", "record")[0] == 0
    rows = json.loads((tmp_path / "runs" / "e" / "b" / "summary.json").read_text())["rows"]
    assert {row["guard"] for row in rows} == {
        "patients disjoint; LEAK: the source has seen test images (40 by file name, 40 by image content, of 40)"
    }
    assert json.loads((tmp_path / "runs" / "e" / "a" / "summary.json").read_text())["rows"][0]["guard"] == (
        "patients disjoint"
    )


def test_crossing_patients_stop_a_run_or_mark_its_rows(tmp_path):
    (tmp_path / "a").mkdir()
    frame = create(tmp_path / "a")
    frame.loc[frame["patient"] == "p22", "patient"] = "p3"
    frame.to_csv(tmp_path / "a" / "labels.csv", index=False)
    with pytest.raises(guard.DataError, match=r"1 groups occur in more than one split: p3 \(test, train\)"):
        module(tmp_path / "a").setup()
    data = module(tmp_path / "a", leaks="record")
    with pytest.warns(UserWarning, match="1 patients in several splits, such as p3"):
        data.setup()
    assert guard.guard(None, data) == "LEAK: 1 patients in several splits"


def test_two_sets_of_one_folder_name_are_two_sets(tmp_path, run_cli):
    """Folder names such as `images` are no release: equal ids and patients of unlike images mean nothing."""
    for hospital in ("h1", "h2"):
        (tmp_path / hospital / "images").mkdir(parents=True)
    create(tmp_path / "h1" / "images")
    other = create(tmp_path / "h2" / "images")
    for number, name in enumerate(other["file"]):
        cv2.imwrite(str(tmp_path / "h2" / "images" / name), picture(9000 + number))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    training_record.write_record(folder, module(tmp_path / "h1" / "images", folds=3), None, hashes=True)
    target = module(tmp_path / "h2" / "images", folds=3, fold=1)
    assert guard.check_source(str(folder.path), target).found == ""
    assert guard.check_source(str(folder.path), module(tmp_path / "h1" / "images", folds=3, fold=1)).by["id"] > 5
    # Copies under other names in a folder of the same name are found by their content.
    (tmp_path / "h3" / "images").mkdir(parents=True)
    copies = create(tmp_path / "h3" / "images", first=100, prefix="b")
    shutil.copy(tmp_path / "h1" / "images" / "a00003_0.png", tmp_path / "h3" / "images" / copies["file"].iloc[-1])
    found = guard.check_source(str(folder.path), module(tmp_path / "h3" / "images")).by["image content"]
    assert found == int("a00003_0.png" in set(training_record.read_history(str(folder.path))[0]["image"]))


def test_look_alikes_with_one_hash_are_no_copies(tmp_path, source):
    """A close hash alone stops nobody: the thumbnails must agree, too."""
    (tmp_path / "b").mkdir()
    create(tmp_path / "b", first=100, prefix="b")
    image = cv2.imread(str(tmp_path / "a" / "a00003_0.png"), cv2.IMREAD_GRAYSCALE).astype(np.float64)
    flat = cv2.GaussianBlur(image, (0, 0), 12)
    cv2.imwrite(str(tmp_path / "b" / "b00121_0.png"), (flat + 1.6 * (image - flat)).clip(0, 255).astype(np.uint8))
    test = module(tmp_path / "b")
    frame, _ = training_record.read_history(source)
    row = np.flatnonzero(test.raw_table.paths == "b00121_0.png")
    bits = guard.hamming(guard.hash_rows(test, row), training_record.hashes_of(frame[frame["image"] == "a00003_0.png"]))
    assert bits[0] <= guard.STRICT_BITS
    assert guard.check_source(source, test).found == ""


def test_depth_zero_takes_nothing_from_the_weights(tmp_path, run_cli):
    (tmp_path / "a").mkdir()
    create(tmp_path / "a")
    data = [
        *("--data", "ImageTable", "--data.init_args.root", tmp_path / "a", "--data.init_args.table", "labels.csv"),
        *("--data.init_args.columns", json.dumps(COLUMNS), "--data.init_args.task", "binary"),
        *("--data.init_args.image_size", "16", "--data.init_args.folds", "3"),
    ]
    words = [
        *("fit", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"),
        *("--model", "Classification", "--model.init_args.backbone", "test_resnet", *data),
        *("--runs_dir", tmp_path / "runs", "--experiment", "e"),
    ]
    assert run_cli(*words, "--run", "a")[0] == 0
    again = [*words, "--data.init_args.fold", "1", "--model.init_args.weights", tmp_path / "runs" / "e" / "a"]
    assert run_cli(*again, "--run", "b")[0] == 2
    assert run_cli(*again, "--run", "c", "--model.init_args.transfer_depth", "0")[0] == 0
