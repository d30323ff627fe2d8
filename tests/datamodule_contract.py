"""What every data set has to keep; a data set's test inherits it and says how to build the data set."""

from abc import ABC, abstractmethod
from unittest import mock

import numpy as np
import pytest
import torch


def no_image():
    """Context in which opening an image fails."""
    return mock.patch("datamodules.io.read_image", side_effect=AssertionError("an image was opened"))


class DataModuleContract(ABC):
    """Inherit as `Test...` and implement `build`; the attributes say what is expected."""

    channels = 3
    shots = 1
    has_official_test = True

    @pytest.fixture(autouse=True)
    def _root(self, tmp_path, monkeypatch):
        self.root, self.monkeypatch = tmp_path / "data", monkeypatch
        self.root.mkdir()
        self.create()

    def create(self):  # noqa: B027  (a generated set has nothing to write)
        """Write the files that the data set needs under `self.root`."""

    @abstractmethod
    def build(self, **arguments):
        """The datamodule with further arguments."""

    def make(self, **arguments):
        return self.build(**{"image_size": 16, "batch_size": 8, "seed": 3, **arguments})

    def test_outputs_known_without_an_image(self):
        with no_image():
            data = self.make()
            assert data.num_classes == len(data.class_names) >= 1
            assert data.task in ("multiclass", "binary", "multilabel")
            table = data.read_table()
            data.setup()
        assert len(table.paths) == len(table.groups) == len(table.split) == len(table.labels)

    def test_labels(self):
        data = self.make()
        labels = data.read_table().labels
        if data.task == "multiclass":
            assert labels.dtype == np.int64
            assert set(np.unique(labels)) <= set(range(-1, data.num_classes))
        else:
            assert labels.dtype == np.float32
            assert labels.shape[1] == data.num_classes
            assert np.isin(labels[~np.isnan(labels)], [0, 1]).all()

    def test_batch(self):
        data = self.make()
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            batch = next(iter(loader))
            assert batch["image"].dtype == torch.uint8
            assert batch["image"].shape[1:] == (self.channels, 16, 16)
            assert batch["index"].dtype == torch.int64
            expected = torch.from_numpy(data.read_table().labels[batch["index"].numpy()])
            torch.testing.assert_close(batch["label"], expected, equal_nan=True)

    def test_groups_never_cross_splits(self):
        data = self.make(val_fraction=0.3)
        table = data.read_table()
        groups = [set(table.groups[data.rows(split)]) for split in ("train", "validation", "test")]
        assert all(groups)
        assert len(set().union(*groups)) == sum(len(part) for part in groups)

    def test_test_set_is_fixed(self):
        sets = [
            set(self.make(**changes).rows("test"))
            for changes in (
                {},
                {"split_seed": 5, "val_fraction": 0.4},
                {"few_shot_seed": 9, "shots": self.shots},
            )
        ]
        assert sets[0] == sets[1] == sets[2] != set()

    def test_evaluation_sees_every_sample_once(self):
        data = self.make()
        seen = torch.cat([batch["index"] for batch in data.test_dataloader()])
        assert sorted(seen.tolist()) == data.rows("test").tolist()

    def test_few_shot_counts_without_an_image(self):
        with no_image():
            one = self.make(shots=self.shots).rows("train")
            two = self.make(shots=self.shots + 1).rows("train")
            data = self.make()
        assert set(one) < set(two) <= set(data.rows("train"))
        labels = data.read_table().labels[one]
        if data.task == "multiclass":
            assert np.bincount(labels, minlength=data.num_classes).tolist() == [self.shots] * data.num_classes
        else:
            assert (np.nansum(labels == 1, axis=0) >= self.shots).all()
            groups = data.read_table().groups[one]
            assert len(set(groups)) == len(groups)

    def test_two_epochs_differ_and_a_seed_repeats(self):
        loader = self.make().train_dataloader()
        first, second = ([batch["index"].tolist() for batch in loader] for _ in range(2))
        again = [batch["index"].tolist() for batch in self.make().train_dataloader()]
        other = [batch["index"].tolist() for batch in self.make(seed=4).train_dataloader()]
        assert first == again
        assert first not in (second, other)
