"""Online probes: their numbers against libraries, and that training does not notice them."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.callbacks.jsonl_logger import JsonlLogger
from lightning_modules.callbacks.online_probes import OnlineProbes
from lightning_modules.collapse import effective_rank, feature_sd
from lightning_modules.errors import ModelError, NonFiniteLossError
from lightning_modules.probes import knn_scores, linear_scores, mean_auroc


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class FakeData(LightningDataModule):
    """Images of 8 × 8 pixels whose brightness of each channel says the class; 60 training, 20 validation rows."""

    num_classes, task = 3, "multiclass"

    def __init__(self, unknown=0, validation=20):
        super().__init__()
        self.labels = np.arange(90) % 3
        self.labels[:unknown] = -1
        self.splits = {"train": np.arange(60), "validation": np.arange(60, 60 + validation)}
        self.stages, self.read = [], []

    def setup(self, stage):
        self.stages.append(stage)

    def read_table(self):
        return SimpleNamespace(labels=self.labels)

    def rows(self, split):
        return self.splits[split]  # a KeyError for the test split

    def images(self, rows):
        noise = torch.randint(0, 60, (len(rows), 3, 8, 8), generator=torch.Generator().manual_seed(int(rows[0])))
        bright = torch.from_numpy(np.arange(90) % 3)[rows]
        return (noise + 150 * nn.functional.one_hot(bright, 3)[:, :, None, None]).to(torch.uint8)

    def batch(self, rows):
        index = torch.from_numpy(rows)
        return {"image": self.images(rows), "label": torch.from_numpy(self.labels[rows]), "index": index}

    def evaluation_dataloader(self, rows):
        self.read.append(rows)
        padding = {"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "label": torch.zeros(1, dtype=torch.int64)}
        batches = [self.batch(part) for part in np.array_split(rows, 3)]
        # A shuffled order, and padding; a plain loader also draws a seed from torch's generator.
        return DataLoader([*batches[::-1], padding | {"index": torch.tensor([-1])}], batch_size=None)

    def train_dataloader(self):
        return DataLoader([self.batch(np.arange(start, start + 10)) for start in range(0, 60, 10)], batch_size=None)


class TinyTask(LightningModule):
    """Convolution, batch norm and dropout, trained on noise drawn from torch's generator."""

    def __init__(self, collapsed=False):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.net[0].weight.data = torch.randn(6, 3, 3, 3, generator=generator) / 3
        self.net[0].bias.data.zero_()
        self.head = nn.Linear(6, 1)
        nn.init.ones_(self.head.weight)
        self.frozen = nn.BatchNorm2d(3)
        self.collapsed = collapsed

    def normalise(self, images):
        return images.float() / 255 - 0.5

    def encode(self, images):
        features = self.net(self.frozen(images)).mean(dim=(2, 3))
        return features * 0 + torch.tensor([1.0, 2, 3, 4, 5, 6]) if self.collapsed else features

    def training_step(self, batch, batch_idx):
        assert not self.frozen.training
        assert all(module.training for module in self.net)
        loss = (self.head(self.encode(self.normalise(batch["image"]))) - torch.randn(1)).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_train_start(self):
        self.frozen.eval()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.002, momentum=0.9)


class KeepMonitored(Callback):
    def on_train_batch_end(self, trainer, *args):
        self.monitored = dict(trainer.callback_metrics)


def train(folder, callbacks=(), data=None, task=None, steps=14, **arguments):
    torch.default_generator.manual_seed(11)
    task = TinyTask() if task is None else task
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=JsonlLogger(folder / "metrics.jsonl"),
        callbacks=[*callbacks],
        log_every_n_steps=3,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(task, datamodule=FakeData() if data is None else data)
    return task


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if any(name.startswith("probe/") for name in line)}


def test_training_is_bit_identical_with_and_without(tmp_path):
    plain = train(tmp_path / "plain").state_dict()
    probed = train(tmp_path / "probed", [OnlineProbes(every=4)]).state_dict()
    assert logged(tmp_path / "plain") == {}
    assert len(logged(tmp_path / "probed")) == 4
    assert all(torch.equal(probed[name], value) for name, value in plain.items())
    assert not torch.equal(plain["net.0.weight"], TinyTask().net[0].weight)  # it did train
    assert plain["net.1.num_batches_tracked"] == 14
    assert plain["frozen.num_batches_tracked"] == 0


def test_probes_come_every_so_many_steps_and_at_the_end(tmp_path):
    keep = KeepMonitored()
    train(tmp_path, [OnlineProbes(every=4), keep])
    probes = logged(tmp_path)
    assert sorted(probes) == [4, 8, 12, 14]
    for line in probes.values():
        assert line["probe/linear_accuracy"] == line["probe/knn_accuracy"] == 1.0  # brightness tells the class
        assert 2 < line["probe/effective_rank"] <= 6
        assert 0.05 < line["probe/feature_sd"] <= 1
    assert keep.monitored["probe/knn_accuracy"] == 1.0
    # While gradients accumulate the step stands still: one probe a step.
    train(tmp_path / "accumulated", [OnlineProbes(every=2)], steps=4, accumulate_grad_batches=3)
    assert sorted(logged(tmp_path / "accumulated")) == [2, 4]
    assert len((tmp_path / "accumulated/metrics.jsonl").read_text().splitlines()) < 8


def test_a_resumed_run_repeats_no_probe(tmp_path):
    first, second = OnlineProbes(every=2), OnlineProbes(every=2)
    first._probed = 2
    second.load_state_dict(first.state_dict())
    asked = []
    second._probe = lambda trainer, task: asked.append(trainer.global_step) or {}
    for step in (2, 3, 4):  # the first batch of a step whose gradients accumulate finds the step as it was
        second.on_train_batch_end(SimpleNamespace(global_step=step), TinyTask(), None, None, 0)
    assert asked == [4]


def test_other_data_are_opened_without_touching_the_run(tmp_path):
    own, other = FakeData(), FakeData(unknown=9)
    train(tmp_path, [OnlineProbes(other, every=100, max_images=30)], own)
    assert (own.stages, other.stages) == (["fit"], ["validate"])
    assert own.read == []
    rows, validation = other.read
    assert len(rows) == 30
    assert rows.min() >= 9  # what has no label is left out
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert validation.tolist() == list(range(60, 80))
    assert other.trainer is not None
    again = FakeData(unknown=9)
    train(tmp_path, [OnlineProbes(again, every=7, max_images=30)])
    assert all(np.array_equal(read, other.read[i % 2]) for i, read in enumerate(again.read))
    assert len(again.read) == 4


def test_a_collapsed_encoder_is_flagged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "farshot.probes"):
        train(tmp_path, [OnlineProbes(every=100)], task=TinyTask(collapsed=True))
    (line,) = logged(tmp_path).values()
    assert line["probe/effective_rank"] == 0
    assert line["probe/feature_sd"] == pytest.approx(0, abs=1e-6)
    assert line["probe/linear_accuracy"] < 0.6
    (record,) = caplog.records
    assert "features have collapsed" in record.message
    assert "\n" not in record.message


def test_features_that_are_not_finite_stop_the_run(tmp_path):
    task = TinyTask()
    task.encode = lambda images: images.mean(dim=(2, 3)) / 0 if not task.net.training else TinyTask.encode(task, images)
    with pytest.raises(NonFiniteLossError, match="80 of 80 probed"):
        train(tmp_path, [OnlineProbes(every=2)], task=task)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (FakeData(validation=0), r"labelled validation rows.*has 0\n.*val_fraction"),
        (FakeData(unknown=55), "10 or more labelled train rows, FakeData has 5"),
        (LightningDataModule(), "need a labelled data module"),
    ],
)
def test_data_that_cannot_be_probed_stop_before_the_run(data, match):
    with pytest.raises(ModelError, match=match):
        OnlineProbes().setup(SimpleNamespace(datamodule=data), TinyTask(), "fit")


@pytest.mark.parametrize("arguments", [{"every": 0}, {"max_images": 9}, {"neighbours": 0}, {"temperature": 0.0}])
def test_arguments_out_of_range_are_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ModelError, match=f"{name} {value}"):
        OnlineProbes(**arguments)


def test_multilabel_data_have_the_mean_auroc_of_known_cells(tmp_path):
    probes = OnlineProbes()
    probes._data = SimpleNamespace(task="multilabel", num_classes=4)
    features, queries = normal(80, 5), normal(50, 5, seed=1)
    rule = normal(5, 4, seed=2)
    labels, truth = ((x @ rule + normal(len(x), 4, seed=3) > 0).double() for x in (features, queries))
    labels[:30, 1] = torch.nan
    truth[::3, 1] = torch.nan
    truth[:, 2] = 0  # no positive: left out
    labels[8:, 3] = torch.nan  # too few to learn from: left out
    scores = probes.measure(features, labels, queries, truth)
    assert set(scores) == {"linear_mean_auroc", "feature_sd", "effective_rank"}
    predicted = linear_scores(features, labels, queries)
    areas = []
    for c in (0, 1):
        known = ~truth[:, c].isnan()
        areas.append(roc_auc_score(truth[known, c], predicted[known, c]))
    assert scores["linear_mean_auroc"] == pytest.approx(np.mean(areas))
    assert min(areas) > 0.8
    assert predicted[:, 3].isnan().all()
    assert np.isnan(mean_auroc(predicted[:, 3:], truth[:, 3:]))
    # Unknown cells count for nothing: the second label's scores are those of its known images alone.
    alone = linear_scores(features, labels[:, 1:2], queries)
    torch.testing.assert_close(predicted[:, 1:2], alone)


@pytest.mark.parametrize("width", [6, 90])  # fewer and more features than images
def test_the_linear_probe_is_a_ridge_regression(width, monkeypatch):
    from lightning_modules import probes

    monkeypatch.setattr(probes, "STRENGTHS", (0.03,))
    features, queries, targets = normal(40, width) * 5 + 2, normal(9, width, seed=1), normal(40, 2, seed=2)
    mean, sd = features.mean(dim=0), features.std(dim=0, correction=0)
    oracle = Ridge(alpha=0.03 * 40).fit((features - mean) / sd, targets)
    torch.testing.assert_close(
        linear_scores(features, targets, queries), torch.from_numpy(oracle.predict((queries - mean) / sd))
    )


def test_the_penalty_is_chosen_by_held_out_images(monkeypatch):
    """As many features as images, few of them useful: nearly without a penalty the fit is useless."""
    from lightning_modules import probes

    labels = torch.arange(500) % 2
    features = normal(500, 100)
    features[:, :3] += 1.5 * labels[:, None]
    targets = nn.functional.one_hot(labels[:100], 2)

    def share_right():
        scores = linear_scores(features[:100], targets, features[100:])
        assert torch.equal(scores, linear_scores(features[:100], targets, features[100:]))
        return float((scores.argmax(dim=1) == labels[100:]).double().mean())

    chosen = share_right()
    monkeypatch.setattr(probes, "STRENGTHS", (1e-4,))
    assert chosen > share_right() + 0.1
    assert chosen > 0.7


@pytest.mark.parametrize("neighbours", [1, 20, 500])
def test_neighbours_vote_as_in_scikit_learn(neighbours, monkeypatch):
    from lightning_modules import probes

    monkeypatch.setattr(probes, "CHUNK", 32)
    features, queries = normal(300, 8), normal(101, 8, seed=1)
    labels = torch.arange(300) % 4
    features[torch.arange(300), labels] += 1.0
    oracle = KNeighborsClassifier(
        n_neighbors=min(neighbours, 300), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(features, labels)
    votes = knn_scores(features, labels, queries, 5, neighbours, 0.07)
    assert (votes[:, 4] == 0).all()
    torch.testing.assert_close(
        (votes / votes.sum(dim=1, keepdim=True))[:, :4], torch.from_numpy(oracle.predict_proba(queries))
    )
    assert knn_scores(features, labels, queries, 5, neighbours, 1e-6).isfinite().all()


def test_feature_sd_is_one_for_isotropic_features_and_zero_for_equal_ones():
    corners = torch.cat([torch.eye(6), -torch.eye(6)])  # all directions alike: variance 1/6 in each of 6 dimensions
    assert feature_sd(corners) == pytest.approx(1.0)
    assert feature_sd(corners * torch.arange(1, 13)[:, None]) == pytest.approx(1.0)  # lengths do not count
    assert feature_sd(torch.full((5, 4), 3.0)) == pytest.approx(0, abs=1e-7)
    assert feature_sd(normal(2000, 64)) == pytest.approx(1.0, abs=0.02)
    half = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # one of two dimensions is used
    assert feature_sd(half) == pytest.approx(0.5 * 2**0.5)


def test_effective_rank_counts_directions():
    corners = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    assert effective_rank(corners) == pytest.approx(6.0)
    assert effective_rank(corners + 1e3) == pytest.approx(6.0)  # centred
    assert effective_rank(corners[:, :3]) == pytest.approx(3.0)
    line = normal(50, 1) @ normal(1, 20, seed=1)
    assert effective_rank(line) == pytest.approx(1.0)
    assert effective_rank(normal(30, 1) @ normal(1, 80, seed=1) + 7.0) == pytest.approx(
        1.0
    )  # fewer images than features
    assert effective_rank(torch.full((9, 5), 0.1)) == 0.0
    # Singular values 3 and 1: shares 3/4 and 1/4.
    two = torch.tensor([[3.0, 0], [-3.0, 0], [0, 1.0], [0, -1.0]])
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(two) == pytest.approx(expected)
    features = normal(40, 12) * torch.arange(1, 13)
    singular = np.linalg.svd((features - features.mean(dim=0)).numpy(), compute_uv=False)
    shares = singular / singular.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
