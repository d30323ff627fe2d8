"""Weights of every method serve every command, and what comes out says which method they are of."""

import json
import os
import shutil

import pandas as pd
import pytest

SYNTHETIC = "num_train: 60, num_test: 30, classes: 3, image_size: 16, batch_size: 8"
FOLDER = "{class_path: Synthetic, init_args: {%s, %s}}"
HEAD = "trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false, max_steps: 1}\n"
TEXT = "{class_path: SmallText, init_args: {vocabulary: 64, context: 8, width: 16, layers: 1, heads: 2}}"
CONFIGS = {
    "simclr": "model: {class_path: SimCLR, init_args: {backbone: test_resnet, projection: [16, 8]}}\n"
    "data: " + FOLDER % (SYNTHETIC, "augmented_views: 2, transform: inception_crop"),
    "clip": "model: {class_path: CLIP, init_args: {backbone: test_resnet, embedding: 8, text: " + TEXT + "}}\n"
    "data: " + FOLDER % (SYNTHETIC, 'captions: ["a {}."]'),
}
TARGET = ["--data", "Synthetic", "--data.role", "target", "--data.image_size", "16"]
TARGET += ["--data.num_train", "60", "--data.num_test", "30", "--data.classes", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of SimCLR and one of CLIP."""
    from cli import main

    folder = tmp_path_factory.mktemp("methods")
    os.environ.pop("FARSHOT_RESUME", None)
    for name, config in CONFIGS.items():
        path = folder / f"{name}.yaml"
        path.write_text(HEAD + config)
        main(["fit", "--config", str(path), "--runs_dir", str(folder), "--run", "run"])
        os.environ.pop("FARSHOT_RESUME", None)
    return {name: folder / name / "run" for name in CONFIGS}


def test_probes_and_orders_take_the_runs_as_they_are(runs, run_cli, tmp_path):
    weights = [str(run) for run in runs.values()]
    assert (
        run_cli("probe", *TARGET, "--weights", *weights, "--shots", 1, "--seeds", 2, "--output", tmp_path / "p")[0] == 0
    )
    rows = pd.read_csv(tmp_path / "p" / "results.csv")
    assert set(rows["method"]) == {"simclr", "clip"}
    assert set(rows["source_n"]) == {54}
    assert rows["weights_hash"].nunique() == 2
    assert run_cli("rank", *TARGET, "--weights", *weights, "--output", tmp_path / "r")[0] == 0
    scores = pd.read_csv(tmp_path / "r" / "ranking.csv").pivot(index="weights", columns="measure", values="score")
    assert scores["leep"].isna().all()  # no classifier of classes came with them
    assert scores["logme"].notna().all()
    code, out, _ = run_cli(
        "similarity", *weights, *TARGET[:2], *TARGET[4:], "--layers", "last", "--output", tmp_path / "s"
    )
    assert code == 0
    assert "stage4" in out
    for run in weights:
        code, out, _ = run_cli("weights", "inspect", run)
        assert code == 0
        assert "test_resnet (as the source says)" in out
        assert "classifier  " not in out


def test_validation_is_written_to_the_run_and_outputs_are_refused(runs, run_cli, tmp_path):
    for name, run in runs.items():
        (run / "summary.json").write_text(json.dumps({**read(run), "validation": []}))
        assert run_cli("validate", "--run", run)[0] == 0
        assert {"loss", "matched"} <= {row["name"] for row in read(run)["validation"]}
        for words in (
            ["test", "--run", run, "--data", "Synthetic"],
            ["weights", "export", run, "--output", tmp_path / "export"],
            ["predict", "--run", run, "--input", __file__],
        ):
            code, _, err = run_cli(*words)
            assert code == 2
            assert f"is a pre-training ({name}) that names no classes" in err


def read(run):
    return json.loads((run / "summary.json").read_text())


def zero_shot(run_cli, run, *words):
    data = [*TARGET[:2], *TARGET[4:]]
    return run_cli("zero-shot", "--run", run, *data, *words)


def test_folds_do_not_replace_each_other(runs, run_cli):
    run = runs["clip"]
    shutil.rmtree(run / "zero_shot", ignore_errors=True)
    for fold in (0, 1):
        assert zero_shot(run_cli, run, "--data.folds", 5, "--data.fold", fold, "--data.leaks", "record")[0] == 0
    found = [read(place)["run"] for place in (run / "zero_shot").iterdir()]
    assert sorted(row["fold"] for row in found) == [0, 1]
    assert len({row["config_hash"] for row in found}) == 2
    assert {(row["method"], row["source"], row["source_n"], row["protocol"]) for row in found} == {
        ("clip", "synthetic", 54, "zero_shot")
    }


def test_labels_are_not_said_to_have_been_checked(runs, run_cli):
    shutil.rmtree(runs["clip"] / "zero_shot", ignore_errors=True)
    assert zero_shot(run_cli, runs["clip"], "--data.task", "multilabel")[0] == 0
    (place,) = (runs["clip"] / "zero_shot").iterdir()
    assert read(place)["names_check"].startswith("not checked")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--device", "cuda:77"], "there is no device 'cuda:77'"),
        (["--device", "gpu7"], "there is no device 'gpu7'"),
        (["--templates", "a photo"], "does not take one name"),
        (["--data.caption_names", "{folder}/missing.csv"], "1 of 3 classes have no caption name: class 2"),
        (["--split", "validation", "--data.val_fraction", "0"], "has no validation images"),
    ],
)
def test_wrong_words_of_zero_shot(runs, run_cli, tmp_path, words, problem):
    (tmp_path / "missing.csv").write_text("class,name\nclass 0,a\nclass 1,b\n")
    code, _, err = zero_shot(
        run_cli, runs["clip"], *(word.format(folder=tmp_path) if "{f" in word else word for word in words)
    )
    assert code == 2
    assert problem in err


def test_runs_that_zero_shot_cannot_take(runs, run_cli, tmp_path):
    def refused(run):
        code, _, err = zero_shot(run_cli, run)
        assert code == 2
        return err

    assert "has no text tower: it is of simclr" in refused(runs["simclr"])
    assert "is not a run folder" in refused(tmp_path)
    going = tmp_path / "going"
    shutil.copytree(runs["clip"], going)
    (going / "summary.json").unlink()
    assert "has not finished" in refused(going)  # its images would be prepared in another way than in training
    with (runs["clip"] / "checkpoints" / "last.ckpt").open("rb") as file:
        (going / "checkpoints" / "last.ckpt").write_bytes(file.read(5000))
    assert "is damaged, cut short" in refused(going)
    shutil.rmtree(going / "checkpoints")
    assert "a study's transfer cells keep no checkpoints" in refused(going)
