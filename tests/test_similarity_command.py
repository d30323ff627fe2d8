"""The commands similarity and rank on generated images and small nets, as a user calls them."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch

from datamodules import Synthetic
from datamodules.errors import DataError
from lightning_modules.backbones import weights_hash
from lightning_modules.errors import ModelError
from studies.commands import rank, similarity
from studies.features import extract_features
from studies.representations import linear_cka
from studies.results import rows_to_frame, write_csv
from studies.transferability import knn_score, leep, logme

DATA = ("--data", "Synthetic", "--data.num_train", "90", "--data.num_test=20", "--data.classes", "3")
DATA += ("--data.image_size", "32", "--data.val_fraction", "0")
BACKBONE = ("--backbone", "test_resnet")


def write_weights(path, seed, architecture="test_resnet", **extra):
    """A net with random weights as a file; with `extra` hyper-parameters as a checkpoint of a run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = timm.create_model(architecture, num_classes=4)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        state = {f"backbone.{name}": value for name, value in net.state_dict().items()}
        torch.save({"state_dict": state, "hyper_parameters": {"backbone": architecture, **extra}}, path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [write_weights(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]


def test_similarity_writes_table_and_heat_map(files, tmp_path, capsys):
    output = tmp_path / "out"
    similarity.run(["similarity", *files, *DATA, *BACKBONE, "--images", "60", "--output", str(output)])
    table = pd.read_csv(output / "similarity.csv")
    layers = ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert [(a, b) for a, b in zip(table["layer_a"], table["layer_b"], strict=True)] == [
        (a, b) for a in layers for b in layers
    ]
    assert set(table["images"]) == {60}
    assert set(table["data"]) == {"synthetic"}
    data = Synthetic(num_train=90, num_test=20, classes=3, image_size=32, val_fraction=0)
    rows = similarity.training_rows(data, 60, 0)
    a, b = (extract_features(file, data, rows, backbone="test_resnet", groups=["stage2"])["stage2"] for file in files)
    own = table[(table["layer_a"] == "stage2") & (table["layer_b"] == "stage2")].iloc[0]
    assert own["linear_cka"] == pytest.approx(linear_cka(a.values, b.values), abs=1e-9)
    assert (output / "similarity.png").read_bytes()[:4] == b"\x89PNG"
    assert (output / "similarity.svg").read_text().count("<image") >= 5  # a panel a measure, and the bar
    printed = capsys.readouterr().out
    assert "stage4" in printed
    assert f"{own['linear_cka']:.3f}" in printed


def test_a_net_is_like_itself_and_other_nets_are_compared_by_layer(files, tmp_path):
    output = tmp_path / "out"
    similarity.run(["similarity", files[0], files[0], *DATA, *BACKBONE, "--layers", "last", "--output", str(output)])
    (row,) = pd.read_csv(output / "similarity.csv").to_dict("records")
    assert row["layer_a"] == row["layer_b"] == "stage4"
    assert [row["linear_cka"], row["minibatch_cka"], row["overlap"]] == pytest.approx([1, 1, 1])
    assert [row["imbalance_ab"], row["imbalance_ba"]] == [0, 0]
    transformer = write_weights(tmp_path / "vit.ckpt", 5, "test_vit", task="multiclass")
    words = ["similarity", "scratch", transformer, *DATA, *BACKBONE, "--data.image_size", "160"]
    similarity.run([*words, "--images", "20", "--output", str(output)])
    table = pd.read_csv(output / "similarity.csv")
    assert table["layer_a"].nunique() == 5
    assert table["layer_b"].nunique() > 5  # its blocks
    assert table[["linear_cka", "overlap"]].stack().between(0, 1).all()


def test_images_are_of_the_training_part_alone():
    data = Synthetic(num_train=90, num_test=20, classes=3, image_size=32)
    table = data.read_table()
    drawn = similarity.training_rows(data, 30, 0)
    assert set(table.split[drawn]) == {"train"}
    assert len(np.unique(drawn)) == 30
    assert np.bincount(table.labels[drawn]).min() >= 9  # at natural prevalence
    assert (similarity.training_rows(data, 30, 0) == drawn).all()
    assert (similarity.training_rows(data, 30, 1) != drawn).any()
    assert (similarity.training_rows(data, 1000, 0) == data.rows("train")).all()


def test_rank_scores_and_judges(files, tmp_path, capsys):
    checkpoint = write_weights(tmp_path / "classes.ckpt", 7, task="multiclass")
    labels_of = write_weights(tmp_path / "labels.ckpt", 8, task="multilabel")
    candidates = [files[0], checkpoint, labels_of]
    shared = {"target": "far", "metric": "accuracy", "protocol": "finetune", "architecture": "test_resnet"}
    rows = [
        {**shared, "weights_hash": weights_hash(file), "source": "s", "shots": shots, "seed": seed, "value": value}
        for shots in ("1", "5")
        for seed in (0, 1)
        for file, value in zip(candidates, (0.2, 0.4, 0.5), strict=True)
    ]
    write_csv(rows_to_frame(rows), tmp_path / "results.csv")
    output = tmp_path / "out"
    words = ["rank", *DATA, *BACKBONE, "--weights", *candidates, "--output", str(output)]
    rank.run([*words, "--results", str(tmp_path), "--target", "far"])
    table = pd.read_csv(output / "ranking.csv").set_index(["weights", "measure"])
    assert len(table) == 3 * 5
    data = Synthetic(num_train=90, num_test=20, classes=3, image_size=32, val_fraction=0)
    for file in candidates:
        (last,) = extract_features(file, data, data.rows("train"), backbone="test_resnet").values()
        assert table.loc[(file, "logme"), "score"] == pytest.approx(logme(last.values, last.labels), abs=1e-9)
        assert table.loc[(file, "knn"), "score"] == pytest.approx(knn_score(last.values, last.labels), abs=1e-9)
    assert sorted(table.xs("n_leep", level="measure")["place"]) == [1, 2, 3]
    # Only the checkpoint of exclusive classes has a LEEP: that of the net's own softmax.
    assert table.xs("leep", level="measure")["score"].notna().tolist() == [False, True, False]
    net = timm.create_model("test_resnet", num_classes=4)
    net.load_state_dict({k[9:]: v for k, v in torch.load(checkpoint)["state_dict"].items()})
    (last,) = extract_features(checkpoint, data, data.rows("train")).values()
    with torch.no_grad():
        theta = net.fc(torch.from_numpy(np.array(last.values))).softmax(dim=1).numpy()
    assert table.loc[(checkpoint, "leep"), "score"] == pytest.approx(leep(theta, last.labels), abs=1e-5)
    judged = pd.read_csv(output / "judgement.csv")
    assert judged["setting"].unique().tolist() == ["finetune, shots 1", "finetune, shots 5"]
    scores = table.xs("logme", level="measure")["score"].loc[candidates].to_numpy()
    found = judged[judged["measure"] == "logme"].iloc[0]
    assert found["regret"] == pytest.approx(0.5 - (0.2, 0.4, 0.5)[scores.argmax()])
    assert found["pick"] == candidates[scores.argmax()]
    printed = capsys.readouterr().out
    assert "Kendall's τ" in printed
    assert "mean over 2 settings" in printed
    assert not list(output.glob("*.npy"))


def test_rank_by_likeness_to_a_reference(files, tmp_path):
    output = tmp_path / "out"
    words = ["rank", *DATA, *BACKBONE, "--weights", *files, "scratch", "--reference", files[1], "--output", str(output)]
    rank.run(words)
    table = pd.read_csv(output / "ranking.csv").pivot(index="weights", columns="measure", values="score")
    measures = ["linear_cka", "minibatch_cka", "one_minus_imbalance_to", "one_minus_imbalance_from", "overlap"]
    assert table.loc[files[1], measures].tolist() == pytest.approx([1] * 5)
    assert (table.loc[[files[0], "scratch"], measures] < 0.999).all().all()
    assert not (output / "judgement.csv").exists()


def test_rank_of_multilabel_data_holds_patients_apart(files, tmp_path, monkeypatch):
    """Patients reach the scores: two images of each, and a spy on the groups."""
    seen = []
    monkeypatch.setattr(
        "studies.transferability.probe_score", lambda values, labels, groups=None, **_: seen.append(groups) or 0.5
    )
    values, patients = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32), np.arange(60) // 2
    labels = np.random.default_rng(1).integers(0, 2, (60, 3)).astype(np.float32)
    features = SimpleNamespace(values=values, labels=labels)
    scores = rank.label_scores("scratch", features, patients)
    assert (seen[0] == patients).all()
    assert scores["knn"] == pytest.approx(knn_score(values, labels, patients))
    assert scores["knn"] != pytest.approx(knn_score(values, labels))
    assert np.isnan(scores["leep"])


def test_errors_say_what_is_wrong(files, tmp_path):
    write_csv(rows_to_frame([{"target": "far", "metric": "accuracy", "value": 0.5}]), tmp_path / "results.csv")
    output = ("--output", str(tmp_path / "out"))
    words = ["rank", *DATA, *BACKBONE, "--weights", *files, *output]
    with pytest.raises(DataError, match=r"no results on synthetic(.|\n)*valid: far(.|\n)*--target"):
        rank.run([*words, "--results", str(tmp_path)])
    with pytest.raises(
        DataError, match=r"no setting in which two or more(.|\n)*weights_hash is [0-9a-f]{16} or [0-9a-f]{16}"
    ):
        rank.run([*words, "--results", str(tmp_path / "results.csv"), "--target", "far"])
    with pytest.raises(DataError, match=r"there is no folder|cannot read"):
        rank.run([*words, "--results", str(tmp_path / "nowhere")])
    broken = safetensors.torch.load_file(files[0])
    broken["layer1.0.conv1.weight"][0] = torch.nan
    safetensors.torch.save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises((DataError, ModelError), match=r"not finite|NaN or infinite"):
        similarity.run(["similarity", files[0], str(tmp_path / "nan.safetensors"), *DATA, *BACKBONE, *output])
    with pytest.raises(DataError, match="do not say which net"):
        similarity.run(["similarity", *files, *DATA, *output])
    with pytest.raises(ModelError, match="no weights at"):
        similarity.run(["similarity", files[0], "nowhere.pth", *DATA, *BACKBONE, *output])
    with pytest.raises(SystemExit) as stop:
        similarity.run(["similarity", files[0], "--images", "0"])
    assert stop.value.code == 2


def test_words_of_the_data_set_are_told_apart():
    words = ["a", "--data.root", "x", "--data", "D", "--data.fold=3", "--images", "5", "--data.shots", "1", "b"]
    assert similarity.split_data_words(words) == (
        ["a", "--data", "D", "--images", "5", "b"],
        ["--data.root", "x", "--data.fold=3", "--data.shots", "1"],
    )


@pytest.mark.parametrize("command", ["similarity", "rank"])
def test_help_needs_no_torch(command):
    code = (
        f"import sys\nfrom studies.commands import {command}\n"
        f"try:\n    {command}.run(['{command}', '--help'])\nfinally:\n"
        "    assert not {'torch', 'sklearn', 'matplotlib', 'pandas'} & set(sys.modules), 'heavy'"
    )
    begun = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "--data" in found.stdout
    assert time.monotonic() - begun < 5  # 0.6 s on an idle machine
