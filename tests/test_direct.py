"""Protocol `direct`: a run evaluated on other data, outputs and labels met by name."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from studies.store import collect
from tests.data import nih, tables

COLUMNS = (
    '{"path": "file", "label": ["Pneumonia", "Pleural Effusion", "Scoliosis"], "group": "patient", "split": "split"}'
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("direct")
    (root / "nih").mkdir()
    nih.create(root / "nih", patients=24)

    def change(rows):
        return [
            {**row, "Pleural Effusion": row["Effusion"], "Scoliosis": "0", "split": "test" if i > 20 else "train"}
            for i, row in enumerate(rows)
        ]

    tables.create_csv(root / "clinic", patients=30, images_each=1, change=change, seed=5000)
    return root


@pytest.fixture(scope="module")
def run_once(folders):
    """Fit on NIH once for the module."""
    import os

    from cli import main

    os.environ["PL_GLOBAL_SEED"] = "0"
    words = [
        *("fit", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
        *("--trainer.enable_progress_bar", "false", "--model", "Classification"),
        *("--model.init_args.backbone", "test_resnet", "--data", "NIHChestXray14"),
        *("--data.init_args.root", str(folders / "nih"), "--data.init_args.image_size", "16"),
        *("--runs_dir", str(folders / "runs"), "--experiment", "e", "--run", "a", "--wandb", "off"),
        *("--data.init_args.transform", "resize_center", "--evaluate", "true"),
    ]
    main(words)
    return folders / "runs" / "e" / "a"


def clinic(folders, *words):
    return [
        *("--data", "ImageTable", "--data.init_args.root", folders / "clinic", "--data.init_args.table", "labels.csv"),
        *("--data.init_args.columns", COLUMNS, "--data.init_args.mode", "grey", *words),
    ]


def test_shared_labels_are_reported_and_the_rest_named(folders, run_once, run_cli):
    before = (run_once / "summary.json").read_text()
    code, out, err = run_cli("test", "--run", run_once, *clinic(folders))
    assert (code, err) == (0, "")
    assert "2 labels in common: Effusion, Pneumonia" in out
    assert "only in clinic: Scoliosis" in out
    assert "only in the run: Atelectasis" in out
    assert (run_once / "summary.json").read_text() == before
    folder = next((run_once / "direct").glob("clinic-*"))
    summary = json.loads((folder / "summary.json").read_text())
    row = summary["rows"][0]
    found = [row[name] for name in ("protocol", "target", "source", "source_n", "shots", "n_train", "n_test")]
    n_train = json.loads(before)["run"]["n_train"]
    assert found == ["direct", "clinic", "nih", n_train, "0", 0, 9]
    assert row["guard"] == "patients disjoint; source checked"
    stored = pd.read_parquet(folder / "predictions.parquet")
    truth = pd.read_csv(folders / "clinic" / "labels.csv").set_index("file").loc[stored["id"]]
    auroc = {r["class_name"]: r["value"] for r in summary["rows"] if r["metric"] == "auroc"}
    assert set(auroc) == {"Effusion", "Pneumonia"}
    for name, column in (("Effusion", "Pleural Effusion"), ("Pneumonia", "Pneumonia")):
        known = truth[column].notna().to_numpy()
        expected = roc_auc_score(truth[column][known], stored[f"logit/{name}"][known])
        assert auroc[name] == pytest.approx(expected)
    mean = next(r["value"] for r in summary["rows"] if r["metric"] == "mean_auroc")
    assert mean == pytest.approx(np.mean(list(auroc.values())))


def test_preprocessing_is_the_runs(folders, run_once, run_cli):
    assert run_cli("test", "--run", run_once, *clinic(folders))[0] == 0
    folder = next((run_once / "direct").iterdir())
    assert json.loads((folder / "summary.json").read_text())["rows"][0]["image_size"] == 16


def test_all_images_of_the_other_set(folders, run_once, run_cli):
    code, _, err = run_cli("test", "--run", run_once, *clinic(folders), "--images", "all")
    assert (code, err) == (0, "")
    rows = [json.loads((folder / "summary.json").read_text())["rows"][0] for folder in (run_once / "direct").iterdir()]
    assert {row["split_policy"]: row["n_test"] for row in rows} == {"official": 9, "all images": 30}
    code, _, err = run_cli("test", "--run", run_once, *clinic(folders), "--images", "most")
    assert (code, "test (default) or all" in err) == (2, True)


def test_a_part_of_the_images_is_not_kept(folders, run_once, run_cli):
    before = {path: path.read_bytes() for path in (run_once / "direct").rglob("*.parquet")}
    words = ("--data.init_args.max_batch_per_device", "4", "--trainer.limit_test_batches", "1")
    code, out, _ = run_cli("test", "--run", run_once, *clinic(folders), *words)
    assert (code, "not written: a part of the images" in out) == (0, True)
    assert {path: path.read_bytes() for path in (run_once / "direct").rglob("*.parquet")} == before


def test_labels_of_the_configuration_are_honoured(folders, run_once, run_cli, tmp_path):
    config = {"root": str(folders / "clinic"), "table": "labels.csv", "columns": json.loads(COLUMNS), "mode": "grey"}
    data = {"class_path": "ImageTable", "init_args": {**config, "labels": ["Pneumonia", "Scoliosis"]}}
    (tmp_path / "clinic.yaml").write_text(yaml.safe_dump({"data": data, "model": {"class_path": "Nothing"}}))
    code, out, err = run_cli("test", "--run", run_once, "--data", tmp_path / "clinic.yaml")
    assert (code, err) == (0, "")
    assert "1 labels in common: Pneumonia" in out


def test_rows_are_collected_with_the_study(folders, run_once, run_cli):
    assert run_cli("test", "--run", run_once, *clinic(folders))[0] == 0
    frame = collect(folders / "runs" / "e")
    assert set(frame["protocol"]) == {"scratch", "direct"}


def test_its_own_training_images_stop_it(folders, run_once, run_cli):
    code, _, err = run_cli(
        *("test", "--run", run_once, "--data", "NIHChestXray14", "--data.init_args.root", folders / "nih"),
        *("--data.init_args.folds", "3"),
    )
    assert code == 2
    assert "was trained on test images of nih" in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--data", "NIHChestXray"], "did you mean 'NIHChestXray14'"),
        (["--data", "none.yaml"], "no configuration none.yaml"),
        (["--data", "Synthetic"], "outputs are multilabel, the labels of synthetic are multiclass"),
        (["--data", "Synthetic", "--data.init_args.task", "multilabel"], "share no name"),
    ],
)
def test_data_that_do_not_fit(run_once, run_cli, words, problem):
    code, _, err = run_cli("test", "--run", run_once, *words)
    assert code == 2
    assert problem in err
