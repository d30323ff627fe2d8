"""The probe through the command line: same episodes for all weights, rows of one schema, statistics from them."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from datamodules import Synthetic
from datamodules.errors import DataError
from lightning_modules.backbones.factory import create_backbone
from studies.probe import Plan, name_weights, probe_metrics, run_probe
from studies.results import read_csv

DATA = ["--data", "Synthetic", "--data.num_train", "300", "--data.num_test", "60", "--data.classes", "4"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def weights(tmp_path):
    """Weights of test_resnet, in a file that does not say so."""
    torch.manual_seed(1)
    torch.save(create_backbone("test_resnet", 3).state_dict(), tmp_path / "some.pth")
    return tmp_path / "some.pth"


def test_two_candidates_on_the_same_episodes(weights, tmp_path, run_cli):
    out = tmp_path / "out"
    words = ["--weights", "scratch", weights, "--backbone", "test_resnet", "--shots", "1", "5", "full", "--seeds", "3"]
    code, said, err = run_cli("probe", *DATA, *words, "--heads", "ridge", "prototype", "--output", out)
    assert (code, err) == (0, "")
    assert "accuracy in percent, mean and 95 % interval over episodes" in said
    frame = read_csv(out / "results.csv")
    assert set(frame["source"]) == {"scratch", "some"}
    assert set(frame["protocol"]) == {"probe ridge", "probe prototype"}
    counts = frame[frame["metric"] == "accuracy"].groupby(["source", "protocol", "shots"]).size()
    assert counts.xs("1", level="shots").eq(3).all()
    assert counts.xs("full", level="shots").eq(1).all()
    assert frame.groupby("shots")["n_train"].unique().map(list).to_dict() == {"1": [4], "5": [20], "full": [270]}
    assert frame["value"].between(0, 1).all()
    assert frame["architecture"].eq("test_resnet").all()
    paired = pd.read_csv(out / "paired.csv")
    assert set(paired["source"]) == {"some"}
    one = paired[(paired["shots"] == "5") & (paired["metric"] == "accuracy") & (paired["protocol"] == "probe ridge")]
    wide = frame[(frame["shots"] == "5") & (frame["metric"] == "accuracy") & (frame["protocol"] == "probe ridge")]
    wide = wide.pivot(index="seed", columns="source", values="value")
    assert one["difference"].item() == pytest.approx((wide["some"] - wide["scratch"]).mean())
    assert (out / "few_shot.png").is_file()


def test_every_layer_group_and_the_validation_set(weights, tmp_path):
    data = Synthetic(num_train=300, num_test=60, classes=4)
    plan = Plan(shots=("2",), seeds=2, groups=("stem", "stage2"), backbone="test_resnet", split="validation")
    rows = pd.DataFrame(run_probe(data, {"w": str(weights)}, plan))
    assert rows["transfer_depth"].value_counts().to_dict() == {1: 4, 3: 4}
    assert rows["n_test"].unique().tolist() == [30]
    assert rows["selection"].unique().tolist() == ["judged on validation"]


def test_labels_and_the_head_that_knows_them(tmp_path):
    data = Synthetic(num_train=400, num_test=100, classes=3, task="multilabel")
    rows = pd.DataFrame(run_probe(data, {"scratch": None}, Plan(shots=("5",), seeds=2, backbone="test_resnet")))
    assert set(rows["metric"]) == {"auroc", "average_precision", "mean_auroc", "mean_average_precision"}
    each = rows[rows["metric"] == "auroc"].groupby("seed")["value"].mean()
    means = rows[rows["metric"] == "mean_auroc"].set_index("seed")["value"]
    np.testing.assert_allclose(each, means)


def test_metrics_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 5, 200), random.normal(size=(200, 6))
    labels[:10] = -1
    found = probe_metrics(scores, labels, "multiclass", list("abcdef"))
    known = labels >= 0
    assert found["accuracy", None] == (scores[known].argmax(1) == labels[known]).mean()
    scores[:, 5] = -9  # a class that does not occur is not chosen, so that scikit-learn says the same
    found = probe_metrics(scores, labels, "multiclass", list("abcdef"))
    expected = balanced_accuracy_score(labels[known], scores.argmax(1)[known])
    assert found["balanced_accuracy", None] == pytest.approx(expected)
    cells = (random.random((200, 3)) < 0.3).astype(np.float32)
    cells[:5, 0], cells[:, 2] = np.nan, 0
    found = probe_metrics(scores[:, :3], cells, "multilabel", list("abc"))
    assert found["auroc", "a"] == pytest.approx(roc_auc_score(cells[5:, 0], scores[5:, 0]))
    assert ("auroc", "c") not in found  # no positives
    assert found["mean_auroc", None] == pytest.approx((found["auroc", "a"] + found["auroc", "b"]) / 2)


def test_names_of_weights(tmp_path):
    for folder in ("a/x", "b/x"):
        (tmp_path / folder).mkdir(parents=True)
    names = name_weights([str(tmp_path / "a/x"), str(tmp_path / "b/x"), "scratch", "resnet18"])
    assert list(names) == ["x", "b/x", "scratch", "resnet18"]
    assert names["scratch"] is None
    with pytest.raises(DataError, match="given twice"):
        name_weights(["scratch", "scratch"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.shots", "5"], "a probe draws its episodes itself"),
        (["--shots", "9999"], "fewer than 9999 images"),
        (["--shots", "some"], "whole number"),
        (["--groups", "stage9"], "stage9"),
        (["--weights", "no/such.pth"], "no/such.pth"),
        (["--heads", "svm"], "svm"),
    ],
)
def test_bad_words(words, expected, run_cli):
    code, _, err = run_cli("probe", *DATA, "--weights", "scratch", "--backbone", "test_resnet", *words)
    assert code == 2
    assert expected in err
    assert len(err.splitlines()) <= 15


def test_weights_that_do_not_say_their_net(weights, run_cli):
    code, _, err = run_cli("probe", *DATA, "--weights", weights)
    assert code == 2
    assert "backbone" in err
