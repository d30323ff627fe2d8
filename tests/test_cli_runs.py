"""Single runs through the command line: run folder, resume, test, predict, and what a user does wrong."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from datamodules.chest_xray.padchest import known_broken
from tests.data import padchest, tables
from tests.data.images import write_image


def run_folder(tmp_path):
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    return folder


@pytest.fixture
def fit(run_cli, tiny_config, tmp_path):
    """Fit the tiny configuration with further words."""

    def call(*words):
        return run_cli("fit", "--config", tiny_config, "--runs_dir", tmp_path / "runs", *words)

    return call


def test_run_folder_has_everything(fit, tmp_path):
    code, out, err = fit("--evaluate", "true")
    assert (code, err) == (0, "")
    folder = run_folder(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        *(
            "config.yaml",
            "identity.json",
            "environment.json",
            "metrics.jsonl",
            "summary.json",
            "training_images.parquet",
            "predictions.parquet",
        ),
        "checkpoints",
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "finished"
    rows = {(row["metric"], row["class_name"]): row for row in summary["rows"]}
    row = rows["accuracy", None]
    assert (row["n_train"], row["n_val"], row["n_test"]) == (63, 7, 30)
    assert (row["source"], row["target"], row["protocol"], row["shots"]) == (
        "scratch",
        "synthetic",
        "scratch",
        "full",
    )
    assert row["images_seen"] == 2 * 3 * 16
    assert rows["auroc", "class 1"]["value"] > 0
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert predictions["split"].value_counts().to_dict() == {"test": 30, "validation": 7}
    test = predictions[predictions["split"] == "test"]
    logits = test[[f"logit/class {c}" for c in range(3)]].to_numpy()
    np.testing.assert_allclose((logits.argmax(1) == test["label"]).mean(), row["value"])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in line for line in steps) == 6
    assert "accuracy" in out


def test_checkpoint_is_plain(fit, tmp_path):
    fit()
    checkpoint = torch.load(run_folder(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["backbone"] == "test_resnet"
    assert "_instantiator" not in checkpoint["hyper_parameters"]
    assert checkpoint["hyper_parameters"]["class_names"] == ["class 0", "class 1", "class 2"]


def test_same_again_is_finished_and_a_change_is_refused(fit, tmp_path):
    assert fit("--run", "a")[0] == 0
    before = (tmp_path / "runs/tiny/a/summary.json").read_text()
    code, out, _ = fit("--run", "a", "--data.init_args.num_workers", 1)  # workers change nothing
    assert code == 0
    assert "is finished" in out
    code, _, err = fit("--run", "a", "--data.init_args.batch_size", 8)
    assert code == 2
    assert "data.init_args.batch_size: 16 there, 8 now" in err
    assert "--overwrite" in err
    assert (tmp_path / "runs/tiny/a/summary.json").read_text() == before
    assert fit("--run", "a", "--data.init_args.batch_size", 8, "--overwrite", "true")[0] == 0
    assert (tmp_path / "runs/tiny/a/summary.json").read_text() != before


def test_run_name_depends_on_what_decides_the_result(fit, tmp_path):
    for words in ([], ["--seed_everything", 1], ["--data.init_args.cache_gb", 1]):
        fit(*words)
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 2


def test_same_seed_same_weights(fit, tmp_path):
    for name in "ab":
        fit("--run", name)
    states = [
        torch.load(tmp_path / f"runs/tiny/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in "ab"
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_test_by_run_folder_repeats_the_numbers(fit, run_cli, tmp_path):
    fit("--evaluate", "true")
    folder = run_folder(tmp_path)
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    code, out, err = run_cli("test", "--run", folder)
    assert (code, err) == (0, "")
    assert json.loads((folder / "summary.json").read_text())["rows"] == rows
    assert "test: 30 images" in out


def test_select_best_keeps_the_best_weights(fit, tmp_path):
    code, _, err = fit("--select", "best", "--monitor", "validation/accuracy", "--trainer.max_epochs", 4)
    assert (code, err) == (0, "")
    folder = run_folder(tmp_path)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(line["validation/accuracy"] for line in logged if "validation/accuracy" in line)
    summary = json.loads((folder / "summary.json").read_text())
    accuracy = next(row["value"] for row in summary["validation"] if row["name"] == "accuracy")
    assert accuracy == pytest.approx(best)
    assert summary["checkpoint"] == "checkpoints/best.ckpt"


def test_steps_instead_of_epochs(fit, tmp_path):
    schedule = '{"class_path": "HyperRuleSchedule", "init_args": {"length": 7}}'
    code, _, err = fit("--trainer.max_epochs=-1", f"--model.init_args.lr_scheduler={schedule}", "--evaluate", "true")
    assert (code, err) == (0, "")
    summary = json.loads((run_folder(tmp_path) / "summary.json").read_text())
    assert summary["run"]["step"] == 7
    logged = (run_folder(tmp_path) / "metrics.jsonl").read_text()
    assert logged.count("validation/loss") == 1  # after training only: nothing selects on validation


def test_a_second_length_beside_a_schedule_that_has_one_is_refused(fit):
    schedule = '{"class_path": "HyperRuleSchedule", "init_args": {"length": 7}}'
    code, _, err = fit("--trainer.max_epochs=-1", "--trainer.max_steps=3", f"--model.init_args.lr_scheduler={schedule}")
    assert (code, "Traceback" in err) == (2, False)
    assert "max_steps 3 beside a schedule that sets the run's length itself, 7 steps" in err
    assert "lr_scheduler.init_args.length" in err


def test_transfer_depths(fit, run_cli, tiny_config, tmp_path):
    fit("--run", "source")
    source = torch.load(tmp_path / "runs/tiny/source/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    code, _, err = fit(
        *("--run", "probe", "--data.init_args.role", "target", "--model.init_args.frozen_depth=-1"),
        *("--model.init_args.weights", tmp_path / "runs/tiny/source", "--evaluate", "true"),
    )
    assert (code, err) == (0, "")
    probe = torch.load(tmp_path / "runs/tiny/probe/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    same = {key for key in source if torch.equal(source[key], probe[key])}
    assert {key for key in source if key not in same} == {"backbone.fc.weight", "backbone.fc.bias"}
    row = json.loads((tmp_path / "runs/tiny/probe/summary.json").read_text())["rows"][0]
    assert (row["source"], row["source_n"], row["protocol"]) == ("synthetic", 63, "linear_probe")
    assert run_cli("test", "--run", tmp_path / "runs/tiny/probe")[0] == 0


@pytest.fixture
def csv_run(run_cli, tmp_path):
    """A finished run on a table of two labels."""
    root = tmp_path / "data"
    root.mkdir()
    tables.create_csv(root)
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False},
        "model": {"class_path": "Classification", "init_args": {"backbone": "test_resnet"}},
        "data": {
            "class_path": "ImageTable",
            "init_args": {
                "root": str(root), "table": "labels.csv", "mode": "grey", "image_size": 16, "transform": "chest_xray",
                "columns": {"path": "file", "label": ["Pneumonia", "Effusion"], "group": "patient"},
            },
        },
    }  # fmt: skip
    path = tmp_path / "csv.yaml"
    path.write_text(yaml.safe_dump(config))
    code, _, err = run_cli("fit", "--config", path, "--runs_dir", tmp_path / "runs", "--run", "a", "--evaluate", "true")
    assert (code, err) == (0, "")
    return tmp_path / "runs" / "csv" / "a"


def test_predict_without_labels_or_data_set(csv_run, run_cli, tmp_path):
    inputs = tmp_path / "new"
    for number in range(5):
        write_image(inputs / f"{number}.png", number, channels=1 if number % 2 else 3)
    (inputs / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "data").rename(tmp_path / "elsewhere")  # predicting needs no data set
    output = tmp_path / "out" / "preds.csv"
    code, out, err = run_cli("predict", "--run", csv_run, "--input", inputs, "--output", output)
    assert (code, err) == (0, "")
    assert "5 images" in out
    assert "broken.jpg" in out.split("unreadable:")[1]
    frame = pd.read_csv(output, keep_default_na=False)
    assert list(frame.columns) == ["id", "Pneumonia", "Effusion", "decision"]
    thresholds = json.loads((csv_run / "summary.json").read_text())["thresholds"]
    for _, row in frame.iterrows():
        on = [name for name, t in zip(("Pneumonia", "Effusion"), thresholds, strict=True) if row[name] > t]
        assert row["decision"] == "|".join(on)


def test_predict_agrees_with_test(csv_run, run_cli, tmp_path):
    stored = pd.read_parquet(csv_run / "predictions.parquet").query("split == 'test'")
    table = tmp_path / "data" / "some.csv"
    stored[["id"]].rename(columns={"id": "path"}).to_csv(table, index=False)
    assert run_cli("predict", "--run", csv_run, "--input", table, "--output", tmp_path / "p.csv")[0] == 0
    frame = pd.read_csv(tmp_path / "p.csv")
    expected = 1 / (1 + np.exp(-stored["logit/Effusion"].to_numpy()))
    np.testing.assert_allclose(frame["Effusion"], expected, atol=2e-6)


def test_corrupt_image_stops_with_its_name_and_keeps_the_checkpoint(csv_run, run_cli, tmp_path):
    checkpoint = (csv_run / "checkpoints" / "last.ckpt").read_bytes()
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    config = tmp_path / "csv.yaml"
    for workers in (0, 1):
        code, _, err = run_cli(
            *("fit", "--config", config, "--runs_dir", tmp_path / "runs", "--run", f"b{workers}"),
            *("--data.init_args.num_workers", workers, "--seed_everything", 1),
        )
        assert code == 2
        assert "images/p0" in err
        assert len(err.splitlines()) <= 15
        assert "Traceback" not in err
    assert (csv_run / "checkpoints" / "last.ckpt").read_bytes() == checkpoint


def test_check_lists_bad_files(run_cli, tmp_path):
    root = tables.create_tree(tmp_path / "tree", images=3)
    words = ["check", "ImageFolder", "--data.root", root, "--output", tmp_path / "bad.tsv"]
    code, out, err = run_cli(*words)
    assert (code, "all 27 images decode" in out) == (0, True), err
    (root / "train" / "ant" / "000.png").write_bytes(b"broken")
    code, _, err = run_cli(*words)
    assert code == 2
    assert "1 of 27 images" in err
    assert "train/ant/000.png" in (tmp_path / "bad.tsv").read_text()
    cv2.imwrite(str(root / "train" / "ant" / "001.png"), np.full((8, 8), 4000, np.uint16))
    assert "2 of 27 images" in run_cli(*words)[2]  # a wrong bit depth is listed like a broken file
    assert "001.png\tAn image has uint16 values" in (tmp_path / "bad.tsv").read_text()


def test_check_passes_over_what_the_set_leaves_out(run_cli, tmp_path):
    padchest.create(tmp_path, broken=[sorted(known_broken())[0]])
    code, out, err = run_cli("check", "PadChest", "--root", tmp_path)
    assert (code, err) == (0, "")
    assert "without 1: known broken file" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["test"], "without weights"),
        (["validate"], "without weights"),
        (["fit", "--model.init_args.num_classes", 4], "num_classes is 4, but synthetic has 3"),
        (["fit", "--model.init_args.frozen_depth", 2], "without weights"),
        (["fit", "--model.init_args.weights", "nowhere.ckpt"], "nowhere.ckpt"),
        (["fit", "--data.init_args.shots", 999], "class 0"),
        (["fit", "--select", "best", "--monitor", "validation/acuracy"], "validation/acuracy"),
        (["fit", "--trainer.max_epochs=-1"], "max_epochs"),
        (["fit", "--data.init_args.transform", "bitt"], "bit"),
        (["fit", "--model.init_args.backbone", "resnet10x"], "resnet10t"),
    ],
)
def test_mistakes_exit_2_and_say_what(run_cli, tiny_config, tmp_path, words, problem):
    code, _, err = run_cli(
        words[0],
        "--config",
        tiny_config,
        *words[1:],
        *(["--runs_dir", tmp_path] if words[0] == "fit" else []),
    )
    assert code == 2, err
    assert problem in err
    assert len(err.splitlines()) <= 15
    assert "Traceback" not in err


def test_predict_without_weights_is_an_error(run_cli):
    code, _, err = run_cli("predict", "--input", ".")
    assert code == 2
    assert "--run" in err


def test_nan_loss_exits_3_and_keeps_the_last_good_checkpoint(fit, tmp_path):
    words = ("--checkpoint_every", 1, "--model.init_args.optimizer.init_args.lr", "1e38", "--run", "nan")
    code, _, err = fit(*words)
    assert code == 3
    assert "NaN" in err
    checkpoint = tmp_path / "runs/tiny/nan/checkpoints/last.ckpt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        assert state["global_step"] < 6


def test_checkpoint_of_another_model_is_refused(fit, run_cli, tiny_config, tmp_path):
    fit("--run", "a")
    code, _, err = run_cli(
        *("test", "--config", tiny_config, "--ckpt_path", tmp_path / "runs/tiny/a/checkpoints/last.ckpt"),
        *("--model.init_args.backbone", "test_convnext"),
    )
    assert code == 2
    assert "checkpoint test_resnet, here test_convnext" in err


def test_results_of_other_data_are_shown_but_not_kept(fit, run_cli, tmp_path):
    fit("--evaluate", "true")
    folder = run_folder(tmp_path)
    before = (folder / "summary.json").read_text()
    code, out, err = run_cli("test", "--run", folder, "--data.init_args.num_test", 12)
    assert (code, err) == (0, "")
    assert "test: 12 images" in out
    assert "not written" in out
    assert (folder / "summary.json").read_text() == before


def test_normalisation_travels_with_the_weights(fit, run_cli, tmp_path):
    fit("--run", "source", "--model.init_args.mean", "[0.25]", "--model.init_args.std", "[0.5]")
    weights = tmp_path / "runs/tiny/source"
    code, _, err = fit("--run", "target", "--data.init_args.role", "target", "--model.init_args.weights", weights)
    assert (code, err) == (0, "")
    target = torch.load(tmp_path / "runs/tiny/target/checkpoints/last.ckpt", weights_only=True)
    assert target["hyper_parameters"]["mean"] == [0.25] * 3
    assert target["hyper_parameters"]["std"] == [0.5] * 3
    assert run_cli("test", "--run", tmp_path / "runs/tiny/target")[0] == 0


@pytest.mark.parametrize("words", [["--trainer.limit_test_batches", "0.5"], ["--ckpt_path"]])
def test_numbers_of_something_else_are_not_kept(fit, run_cli, tmp_path, words):
    fit("--run", "a", "--evaluate", "true", "--data.num_test", 300)
    fit("--run", "b", "--seed_everything", 5)
    folder = tmp_path / "runs/tiny/a"
    before = (folder / "summary.json").read_text()
    if words == ["--ckpt_path"]:
        words = ["--ckpt_path", tmp_path / "runs/tiny/b/checkpoints/last.ckpt"]
    code, out, err = run_cli("test", "--run", folder, *words)
    assert (code, err) == (0, "")
    assert "not written" in out
    assert (folder / "summary.json").read_text() == before


def test_finished_fit_can_still_be_tested(fit, tmp_path):
    fit("--run", "a")
    state = torch.load(tmp_path / "runs/tiny/a/checkpoints/last.ckpt", weights_only=True)
    code, out, err = fit("--run", "a", "--evaluate", "true")
    assert (code, err) == (0, "")
    assert "test: 30 images" in out
    summary = json.loads((tmp_path / "runs/tiny/a/summary.json").read_text())
    assert summary["rows"]
    assert summary["run"]["step"] == state["global_step"] == 6


def test_best_that_is_never_defined_is_an_error(fit):
    words = ("--select", "best", "--trainer.check_val_every_n_epoch", 5)
    code, _, err = fit(*words)
    assert code == 2
    assert "was never defined" in err


def test_another_folder_is_another_run(run_cli, tmp_path):
    for name in ("one", "two"):
        tables.create_tree(tmp_path / name, images=6)
    config = tmp_path / "tree.yaml"
    config.write_text(
        "trainer: {accelerator: cpu, devices: 1, max_epochs: 1, enable_progress_bar: false}\n"
        "model: {class_path: Classification, init_args: {backbone: test_resnet}}\n"
        "data: {class_path: ImageFolder, init_args: {image_size: 16}}\n"
    )
    for name in ("one", "two"):
        words = ("--data.root", tmp_path / name, "--runs_dir", tmp_path / "runs")
        code, out, err = run_cli("fit", "--config", config, *words)
        assert (code, err) == (0, "")
        assert "is finished" not in out
    assert len(list((tmp_path / "runs" / "tree").iterdir())) == 2


def test_epochs_and_images_count_what_was_seen(fit, tmp_path):
    fit("--trainer.max_epochs=-1", "--trainer.max_steps", 10, "--data.shots", 1)
    run = json.loads((run_folder(tmp_path) / "summary.json").read_text())["run"]
    assert (run["n_train"], run["images_seen"]) == (3, 160)
    assert run["epochs"] == pytest.approx(160 / 3)
