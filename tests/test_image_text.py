"""Image–text shards: captions and images by row, splits and groups, subsets, scores, and streams of workers."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from datamodules import LAION400M, WIT, YFCC15M, ImageTextShards, shards
from datamodules.errors import DataError
from datamodules.image_text import parquet_pairs
from studies.description import exclusion_frame, find_usage, table_one
from tests.data import image_text
from tests.datamodule_contract import DataModuleContract, no_image

SMALL = {"image_size": 16, "batch_size": 8, "seed": 3}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))


def decoded(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def numbers(paths):
    return [int(path.rpartition("/")[2].removesuffix(".jpg")) for path in paths]


class TestImageTextShards(DataModuleContract):
    def create(self):
        image_text.create(self.root)

    def build(self, **arguments):
        return ImageTextShards(root=str(self.root), **{"val_fraction": 0.1, "test_fraction": 0.15, **arguments})

    def test_outputs_known_without_an_image(self):
        with no_image():
            data = self.make()
            data.setup()
        assert (data.num_classes, data.class_names, data.task) == (0, [], "multiclass")
        table = data.read_table()
        assert len(table.paths) == len(table.groups) == len(table.split) == len(table.labels) == 120
        assert set(table.labels) == {-1}
        assert sum(len(data.rows(split)) for split in ("train", "validation", "test")) == 120
        assert data.excluded == []

    def test_test_set_is_fixed(self):
        changes = ({}, {"split_seed": 5, "val_fraction": 0.4}, {"few_shot_seed": 9, "num_images": 20})
        sets = [set(self.make(**change).rows("test")) for change in changes]
        assert sets[0] == sets[1] == sets[2] != set()

    def test_few_shot_counts_without_an_image(self):
        """A set without classes has no shots; its subsets are nested."""
        with pytest.raises(DataError, match="shots wants classes"):
            self.make(shots=1)
        with no_image():
            draws = [self.make(num_images=count).rows("train") for count in (10, 40)]
            draws += [self.make(fraction=fraction).rows("train") for fraction in (0.5, 1.0)]
        whole = set(self.make().rows("train"))
        assert [len(rows) for rows in draws] == [10, 40, round(len(whole) / 2), len(whole)]
        assert set(draws[0]) < set(draws[1]) < whole
        assert set(draws[2]) < set(draws[3]) == whole
        assert set(self.make(num_images=40, few_shot_seed=1).rows("train")) != set(draws[1])

    def test_images_and_captions(self):
        data = self.make()
        table = data.read_table()
        assert table.paths[61] == "00001.tar/000000061.jpg"
        np.testing.assert_array_equal(data.read_images([61])[0], decoded(image_text.jpeg(61)))
        assert data.texts([61, 3, 61], [0, 1, 2]) == ["caption of 61", "caption of 3", "caption of 61"]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_batch_pairs_images_with_their_captions(self, workers):
        """The stream is the same in the process and in workers; what is paired stays paired."""
        here, there = self.make(transform="resize_center"), self.make(transform="resize_center", num_workers=workers)
        expected, found = list(here.train_dataloader()), list(there.train_dataloader())
        assert len(expected) == len(found) > 10
        for one, other in zip(expected, found, strict=True):
            assert one["text"] == other["text"] == [f"caption of {row}" for row in one["index"].tolist()]
            torch.testing.assert_close(one["image"], other["image"])
        order = torch.cat([batch["index"] for batch in found]).tolist()
        assert len(set(order)) == len(order)

    def test_several_captions(self):
        data = self.make(caption=["txt", "json:url", "status"])
        rows = list(range(100)) * 10
        seeds = np.random.default_rng(0).integers(0, 2**62, 1000).tolist()
        texts = data.texts(rows, seeds)
        assert texts == data.texts(rows, seeds)
        assert texts[500] == data.texts([rows[500]], [seeds[500]])[0]
        kinds = np.array([text.split()[0].split(":")[0] for text in texts])
        assert all(280 < (kinds == kind).sum() < 390 for kind in ("caption", "https", "success"))

    def test_curation_by_a_score_of_the_set(self):
        whole, best = self.make(), self.make(score="similarity", curation=0.25)
        train = whole.rows("train")
        assert best.rows("train").tolist() == train[-round(len(train) / 4) :].tolist()  # scores rise with the rows
        assert best.rows("test").tolist() == whole.rows("test").tolist()
        (step,) = best.excluded
        assert step.reason == "score not among the best 25% of similarity"
        assert best.dials.describe() == "best 0.25 by similarity (seed 0)"

    def test_a_description_without_labels(self):
        data = self.make()
        usage = find_usage(data)
        assert table_one(data.read_table(), usage.rows, data.class_names).loc[("Images", ""), "all used"] == "120"
        assert exclusion_frame(data.read_table(), usage)["images"].tolist()[0] == 120

    def test_inner_folds_and_folds(self):
        data = self.make(folds=3, fold=1)
        assert abs(len(data.rows("test")) - 40) <= 1
        inner = self.make(inner_folds=4, inner_fold=0, num_images=40)
        assert (len(inner.rows("train")), len(inner.rows("validation"))) == (30, 10)

    @pytest.mark.parametrize(
        "setting",
        [{"num_classes_kept": 2}, {"label_noise": 0.1}, {"balance": True}, {"captions": ["a {}."]}, {"outputs": ["a"]}],
    )
    def test_settings_of_classes(self, setting):
        with pytest.raises(DataError, match=r"wants classes|num_classes_kept"):
            self.make(**setting)


@pytest.mark.parametrize("layout", ["binary", "struct"])
def test_parquet_files_with_images(tmp_path, layout, monkeypatch):
    pairs = image_text.samples(90)
    (tmp_path / "set").mkdir()
    for number in range(3):
        path = tmp_path / "set" / f"train-{number:05d}-of-00003.parquet"
        image_text.write_parquet(path, pairs[30 * number : 30 * number + 30], layout)
    data = ImageTextShards(root=str(tmp_path / "set"), score="similarity", curation=0.5, **SMALL)
    rows = [0, 35, 89]
    for row, image in zip(rows, data.read_images(rows), strict=True):
        np.testing.assert_array_equal(image, decoded(pairs[row]["jpg"]))
    assert data.texts(rows, rows) == [f"caption of {row}" for row in rows]
    assert data.read_table().paths[35] == "train-00001-of-00003.parquet/5"
    assert data.rows("train").min() > 20
    monkeypatch.setattr(shards, "write_shard", lambda *_: pytest.fail("copied again"))
    again = ImageTextShards(root=str(tmp_path / "set"), **SMALL)
    np.testing.assert_array_equal(again.read_images([35])[0], decoded(pairs[35]["jpg"]))


def test_a_changed_parquet_file_is_copied_again(tmp_path):
    (tmp_path / "set").mkdir()
    for first in (0, 50):
        image_text.write_parquet(tmp_path / "set" / "a.parquet", image_text.samples(25, first))
        data = ImageTextShards(root=str(tmp_path / "set"), **SMALL)
        np.testing.assert_array_equal(data.read_images([7])[0], decoded(image_text.jpeg(first + 7)))


def test_parquet_images_are_copied_page_by_page(tmp_path):
    """Of one row group of 24 MB, in pages of 1,024 images, Arrow holds two pages at most."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    pq.write_table(pa.table({"jpg": [random.bytes(3000) for _ in range(8192)]}), tmp_path / "a.parquet")
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in parquet_pairs._images(tmp_path / "a.parquet")]
    assert len(held) == 8192
    assert max(held) < 12e6


def test_official_splits_by_name(tmp_path):
    for name, first in (("train", 0), ("val", 30), ("test", 60)):
        image_text.write_tar(tmp_path / name / "00000.tar", image_text.samples(30, first))
    data = ImageTextShards(root=str(tmp_path), **SMALL)
    assert {name: numbers(data.read_table().paths[data.rows(name)])[0] for name in ("train", "validation", "test")} == {
        "train": 0,
        "validation": 30,
        "test": 60,
    }
    assert data.split_policy == "official"


def test_copies_of_an_image_stay_in_one_split(tmp_path):
    pairs = image_text.samples(400)
    for number in range(200, 400):  # the second half repeats the first under other addresses
        pairs[number]["jpg"] = pairs[number - 200]["jpg"]
        pairs[number]["meta"]["sha256"] = pairs[number - 200]["meta"]["sha256"]
    pairs[7]["meta"]["sha256"] = pairs[9]["meta"]["sha256"] = "unknown"  # no hash: not one image
    image_text.write_tar(tmp_path / "00000.tar", pairs)
    data = ImageTextShards(root=str(tmp_path), val_fraction=0.2, test_fraction=0.2, **SMALL)
    table = data.read_table()
    assert table.groups[7] == table.paths[7] != table.groups[9]
    data.setup()
    codes = np.asarray(table.split.codes)
    unlike = np.flatnonzero(codes[:200] != codes[200:])
    assert set(unlike) <= {7, 9}
    assert len(set(codes)) == 3


def test_releases_keep_their_names(tmp_path):
    root = tmp_path / "somewhere"
    image_text.create(root, shard_count=1)
    for release, name in ((YFCC15M, "yfcc15m"), (LAION400M, "laion400m"), (WIT, "wit")):
        assert release(root=str(root), **SMALL).name == name
    assert YFCC15M(root=str(root), dataset_name="mine").name == "mine"
    assert ImageTextShards(root=str(root)).name == "somewhere"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_view_changes_nothing_else(tmp_path, workers):
    image_text.create(tmp_path / "set", shard_count=1)
    one, two = (
        list(ImageTextShards(root=str(tmp_path / "set"), transform="simclr", **SMALL, **more).train_dataloader())
        for more in ({}, {"augmented_views": 2, "num_workers": workers})
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a["image"], b["image"])
        assert (a["text"], a["index"].tolist()) == (b["text"], b["index"].tolist())
        assert not (b["image"] == b["view2"]).all(dim=(1, 2, 3)).any()


def test_two_equal_views_are_an_error(tmp_path):
    image_text.create(tmp_path / "set", shard_count=1, count=20)
    data = ImageTextShards(root=str(tmp_path / "set"), transform="resize_center", augmented_views=2, **SMALL)
    with pytest.raises(DataError, match=r"both views of an image would be equal[\s\S]*simclr"):
        data.train_dataloader()


@pytest.mark.parametrize("name", ["yfcc15m", "laion400m", "cc3m", "cc12m", "redcaps", "wit", "shutterstock"])
def test_a_source_leaves_the_augmentation_to_the_method(name):
    """`--config configs/data/NAME.yaml` after SimCLR's configuration must not replace its views."""
    path = Path(__file__).parents[1] / "configs" / "data" / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text())["data"]["init_args"]
    assert not {"transform", "augmented_views", "num_images"} & set(settings)
