"""What a user of the probe can get wrong: said before the first image is read, in words, and nothing half-written."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules import Synthetic
from datamodules.errors import DataError
from datamodules.image_table import ImageTable
from lightning_modules.backbones.factory import create_backbone
from studies import features as studied
from studies import probe
from studies.commands.probe import HEADS as HEAD_WORDS
from studies.outcome import source_facts
from studies.probe import Plan, name_weights, run_probe
from studies.probe_heads import HEADS
from studies.runs import RunFolder
from tests.data.images import write_image

DATA = ["--data", "Synthetic", "--data.num_train", "200", "--data.num_test", "40", "--data.classes", "4"]
FORK = multiprocessing.get_context("fork")
NET = {"backbone": "test_resnet"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unread(monkeypatch):
    """Whatever reads an image for features fails."""
    monkeypatch.delattr(studied, "_read_batches")


def synthetic(**settings):
    return Synthetic(**{"num_train": 200, "num_test": 40, "classes": 4, **settings})


def save(path, seed=1):
    torch.manual_seed(seed)
    torch.save(create_backbone("test_resnet", 3).state_dict(), path)
    return str(path)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seeds", "0"], "'0' is no whole number of 1 or more"),
        (["--seeds", "abc"], "'abc' is no whole number of 1 or more"),
        (["--shots", "0"], "shots is '0'"),
        (["--shots", "5", "05"], "shots are 5, 5"),
        (["--heads", "ridge", "ridge"], "heads are ridge, ridge"),
        (["--device", "gpu"], "there is no device 'gpu'"),
        (["--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--backbone", "test_resnett"], "no model 'test_resnett'"),
        (["--split", "validation", "--data.val_fraction", "0.0"], "has no validation images"),
        (["--data.task", "multilabel", "--data.num_test", "1"], "they lack a label that is both 0 and 1"),
    ],
)
def test_words(words, expected, run_cli):
    code, _, err = run_cli("probe", *DATA, "--weights", "scratch", "--backbone", "test_resnet", *words)
    assert code == 2
    assert expected in err
    assert len(err.splitlines()) <= 15


@pytest.mark.usefixtures("unread")
def test_the_last_candidate_is_looked_at_before_the_first_is_extracted(tmp_path):
    weights = {"scratch": None, "good": save(tmp_path / "good.pth"), "lost": str(tmp_path / "lost.pth")}
    with pytest.raises(Exception, match=r"lost\.pth") as raised:
        list(run_probe(synthetic(), weights, Plan(shots=("1",), **NET)))
    assert raised.value.exit_code == 2
    with pytest.raises(DataError, match=r"(?s)do not say which net.*--backbone resnet50"):
        list(run_probe(synthetic(), {"good": weights["good"]}, Plan(shots=("1",))))


@pytest.mark.usefixtures("unread")
def test_heads_of_the_function(tmp_path):
    with pytest.raises(DataError, match=r"(?s)heads are svm.*ridge"):
        list(run_probe(synthetic(), {"scratch": None}, Plan(heads=("svm",), **NET)))
    assert set(HEAD_WORDS) == set(HEADS)


@pytest.mark.usefixtures("unread")
def test_a_class_without_training_images(tmp_path):
    names, splits = ["cat"] * 6 + ["dog"] * 6 + ["emu"] * 2, ["train", "test"] * 6 + ["test"] * 2
    for number in range(14):
        write_image(tmp_path / "set" / f"{number}.png", number)
    frame = pd.DataFrame({"path": [f"{number}.png" for number in range(14)], "label": names, "split": splits})
    frame.to_csv(tmp_path / "set" / "table.csv", index=False)
    columns = {"path": "path", "label": "label", "split": "split"}
    data = ImageTable(root=str(tmp_path / "set"), table="table.csv", columns=columns, image_size=32)
    with pytest.raises(DataError, match=r"(?s)1 of 3 classes have no training image: emu.*shots=full"):
        list(run_probe(data, {"scratch": None}, Plan(shots=("full",), **NET)))
    with pytest.raises(DataError, match="emu has 0"):
        list(run_probe(data, {"scratch": None}, Plan(shots=("1",), **NET)))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_unlabelled_images_take_no_place_and_change_no_draw(task, monkeypatch):
    data, seen = synthetic(task=task), []
    labels = data.read_table().labels
    rows = data.rows("train")
    labels[rows[::3]] = -1 if task == "multiclass" else np.nan
    real = probe.extract_features
    monkeypatch.setattr(probe, "extract_features", lambda *a, **k: seen.append(a[2]) or real(*a, **k))
    episodes, used, _ = probe._draw(data, Plan(shots=("2", "full"), seeds=2))
    kept = np.setdiff1d(rows, rows[::3])
    np.testing.assert_array_equal(used, kept)
    data.shots, data.few_shot_seed = 2, 1
    drawn = rows[data.draw(data.read_table(), rows)]
    np.testing.assert_array_equal(used[episodes[1].rows], drawn)  # those of a training run
    data.shots = None
    found = pd.DataFrame(run_probe(data, {"scratch": None}, Plan(shots=("full",), **NET)))
    np.testing.assert_array_equal(seen[0], kept)
    assert found["n_train"].unique().tolist() == [len(kept)]


def test_patients_reach_the_heads(tmp_path, monkeypatch):
    data, seen = synthetic(), []
    object.__setattr__(data.raw_table, "groups", np.array([f"p{n // 4}" for n in range(240)], dtype=object))
    ridge = HEADS["ridge"]

    def spy(*arguments, groups, **settings):
        seen.append(groups)
        return ridge(*arguments, groups=groups, **settings)

    monkeypatch.setattr(probe, "HEADS", {"ridge": spy})
    list(run_probe(data, {"scratch": None}, Plan(shots=("1", "full"), seeds=1, **NET)))
    one, full = seen
    assert len(one) == len(set(one.tolist())) == 4  # one image a patient
    assert len(set(full.tolist())) < len(full)


def test_stages_and_blocks_of_one_depth_are_told_apart(tmp_path, run_cli):
    words = ["--weights", "scratch", "--backbone", "test_resnet", "--shots", "2", "--seeds", "2"]
    code, _, err = run_cli("probe", *DATA, *words, "--groups", "stage2", "block2", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    frame = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(zip(frame["transfer_depth"], frame["granularity"], strict=True)) == {(3, "coarse"), (3, "block")}
    assert len(pd.read_csv(tmp_path / "out" / "episodes.csv")) == 2 * 2  # of each: accuracy, balanced accuracy


def test_folds_are_told_apart():
    plan = Plan(shots=("1",), seeds=1, **NET)
    rows = [probe._columns(synthetic(folds=3, fold=fold), "w", None, plan)["fold"] for fold in range(2)]
    assert rows == [0, 1]
    assert probe._columns(synthetic(), "w", None, plan)["fold"] is None


def test_names(tmp_path):
    for name in ("net.pth", "net.pt", "scratch.pth"):
        save(tmp_path / name)
    assert name_weights(["net.pth", "net.pt"]) == {"net": "net.pth", "net.pt": "net.pt"}
    for order in (["scratch", "scratch.pth"], ["scratch.pth", "scratch"]):
        assert name_weights(order) == {"scratch": None, "scratch.pth": "scratch.pth"}
    for twice in (["net.pth", str(tmp_path / "net.pth")], ["scratch", "scratch"], ["net.pth", "./net.pth"]):
        with pytest.raises(DataError, match="given twice"):
            name_weights(twice)


def test_rows_say_of_a_source_what_runs_say(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.path / "checkpoints").mkdir(parents=True)
    save(folder.path / "checkpoints" / "best.ckpt")
    folder.update_summary(run={"target": "nih", "n_train": 7, "seed": 3, "fraction": 0.5})
    for weights in (folder.path, folder.path / "checkpoints" / "best.ckpt"):
        row = probe._columns(synthetic(), "mine", str(weights), Plan())
        facts = {"source_n": 7, "pretrain_seed": 3, "method": "supervised", "source_dials": "fraction 0.5"}
        assert {name: row[name] for name in facts} == facts
        assert row["source"] == "mine"
    assert source_facts(None) == {"source": "scratch", "source_n": 0, "pretrain_seed": None}


def slow_probe(weights):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    read = studied._read_batches

    def slowly(*arguments):
        for batch in read(*arguments):
            yield batch
            time.sleep(60)  # ends by the signal, however busy the machine is

    studied._read_batches = slowly
    list(run_probe(synthetic(), {"net": weights}, Plan(shots=("1",), seeds=1, batch_size=8, **NET)))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_extraction_leaves_nothing_that_looks_finished(tmp_path, kind):
    weights, cache = save(tmp_path / "net.pth"), tmp_path / "cache" / "features"
    child = FORK.Process(target=slow_probe, args=(weights,))
    child.start()
    deadline = time.monotonic() + 30
    while not list(cache.glob("*/.*.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child.pid, kind)
    child.join()
    assert child.exitcode not in (0, None)
    assert not list(cache.glob("*/s*.npy"))
    rows = list(run_probe(synthetic(), {"net": weights}, Plan(shots=("1",), seeds=1, **NET)))
    assert len(rows) == 2
    assert {path.name for path in cache.glob("*/*")} == {"lock", "stage4.npy"}


def test_batches_are_as_large_as_asked_for():
    net, data = studied.build_net(None, "test_resnet")[0], synthetic(num_train=700, image_size=32)
    for size in (100, 600):
        batches = studied._read_batches(net, ["stem"], data, np.arange(700), size, None)
        assert len(next(batches)["stem"]) == size
