"""Preparing a data set: conversions, resuming after SIGKILL, verification, and reading what was prepared."""

import io as std_io
import json
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cli
from datamodules import shards
from datamodules.errors import DataError, UnreadableImageError
from datamodules.image_shards import ImageShards
from datamodules.image_table import ImageTable
from datamodules.io import read_image
from datamodules.prepared import PreparedImages
from datamodules.synthetic import Synthetic
from studies.encoding import Recipe
from studies.prepare import prepare, rows_to_prepare, verify
from tests.data.images import write_image

FEW = {"shard_mb": 0.008}  # a few of the images below, so that small sets have several shards


def write_tree(root, count=40, **arguments):
    """Two classes of images of 48×60."""
    for number in range(count):
        write_image(root / "ab"[number % 2] / f"{number:03d}.png", number, size=(60, 48), **arguments)


def make(data, folder, *, workers=1, skip_unreadable=False, **recipe):
    recipe = {"short_side": 32, **recipe}
    return prepare(
        data, rows_to_prepare(data), folder, Recipe(**recipe), workers=workers, skip_unreadable=skip_unreadable
    )


def contents(folder):
    """Every file's bytes; versions aside, which a commit in between would change."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    settings = json.loads(found.pop("settings.json"))
    settings.pop("versions")
    return found, settings


# What is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_and_manifest(tmp_path, workers):
    write_tree(tmp_path / "data")
    data = ImageTable(root=str(tmp_path / "data"))
    summary = make(data, tmp_path / "out", workers=workers, **FEW)
    table, manifest = data.read_table(), pq.read_table(tmp_path / "out" / "manifest.parquet").to_pandas()
    assert summary.images == len(manifest) == 40
    assert summary.before == sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.png"))
    assert manifest["path"].tolist() == table.paths.tolist()
    assert manifest["group"].tolist() == table.groups.tolist()
    assert manifest["split"].tolist() == list(table.split)
    assert manifest["shard"].nunique() > 3
    assert list(manifest["key"]) == [f"{row:09d}" for row in range(40)]
    for number, rows in manifest.groupby("shard"):
        with tarfile.open(tmp_path / "out" / "shards" / f"{number:06d}.tar") as tar:
            members = {entry.name: entry for entry in tar}
            assert list(members) == [f"{key}.jpg" for key in rows["key"]]
            for row in rows.itertuples():
                assert (members[f"{row.key}.jpg"].offset_data, members[f"{row.key}.jpg"].size) == (row.offset, row.size)
                content = tar.extractfile(f"{row.key}.jpg").read()
                assert shards.checksum(content) == row.checksum
    assert summary.after == manifest["size"].sum()
    images = PreparedImages(tmp_path / "out")
    image = images.read([7])[0]
    original = read_image(tmp_path / "data" / table.paths[7], mode="rgb")
    expected = cv2.resize(original, (40, 32), interpolation=cv2.INTER_AREA)
    assert image.shape == (32, 40, 3)
    assert cv2.PSNR(image, expected) > 30
    verify(tmp_path / "out")


def test_workers_do_not_change_a_byte(tmp_path):
    write_tree(tmp_path / "data")
    for workers in (1, 2):
        make(ImageTable(root=str(tmp_path / "data")), tmp_path / f"out{workers}", workers=workers, **FEW)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def save(folder, name, image, **options):
    (folder / "a").mkdir(parents=True, exist_ok=True)
    image.save(folder / "a" / name, **options)
    return folder / "a" / name


def photo(size=(30, 24), mode="RGB"):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)).convert(mode)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    ("name", "image", "options", "copied"),
    [
        ("rgb.jpg", photo(), {}, True),
        ("grey.jpg", photo(mode="L"), {}, True),
        ("progressive.jpeg", photo(), {"progressive": True, "quality": 95, "subsampling": 0}, True),
        ("upright.jpg", photo(), {"exif": exif(1)}, True),
        ("turned.jpg", photo(), {"exif": exif(6)}, False),
        ("cmyk.jpg", photo(mode="CMYK"), {}, False),
        ("large.jpg", photo((60, 48)), {}, False),
        ("palette.png", photo(mode="P"), {}, False),
        ("alpha.png", photo(mode="RGBA"), {}, False),
        ("grey.png", photo(mode="L"), {}, False),
        ("one_bit.png", photo(mode="1"), {}, False),
        ("photo.webp", photo(), {}, False),
        ("photo.bmp", photo(), {}, False),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_conversions(tmp_path, name, image, options, copied, channels):
    """Plain JPEG is copied byte for byte; everything else is what `datamodules.io` makes of it, as JPEG."""
    original = save(tmp_path / "data", name, image, **options)
    write_image(tmp_path / "data" / "b" / "other.png", 0)
    mode = "grey" if channels == 1 else "rgb"
    make(ImageTable(root=str(tmp_path / "data"), mode=mode, val_fraction=0), tmp_path / "out", quality=98)
    images = PreparedImages(tmp_path / "out")
    (stored,) = images.read([0])
    wanted = read_image(original, mode=mode)
    if copied:
        assert images.read_bytes(0) == original.read_bytes()
        np.testing.assert_array_equal(stored, wanted)
    else:
        height, width = wanted.shape[:2]
        if min(height, width) > 32:
            wanted = cv2.resize(wanted, (40, 32), interpolation=cv2.INTER_AREA).reshape(32, 40, channels)
        assert stored.shape == wanted.shape
        assert cv2.PSNR(stored, wanted) > 24  # colour is stored at half the resolution
        if channels == 1:
            assert cv2.PSNR(stored, wanted) > 38 or name == "one_bit.png"
            with Image.open(std_io.BytesIO(images.read_bytes(0))) as file:
                assert file.mode == "L"


def test_sixteen_bits_need_a_window(tmp_path):
    deep = (np.arange(40 * 50).reshape(40, 50) * 30).astype(np.uint16)
    save(tmp_path / "data", "deep.png", Image.fromarray(deep))
    write_image(tmp_path / "data" / "b" / "other.png", 0, channels=1)
    with pytest.raises(DataError, match="explicit window"):
        make(ImageTable(root=str(tmp_path / "data"), mode="grey", val_fraction=0), tmp_path / "out")
    data = ImageTable(root=str(tmp_path / "data"), mode="grey", window=(0, 60_000), val_fraction=0)
    make(data, tmp_path / "windowed", short_side=64, quality=100)
    image = PreparedImages(tmp_path / "windowed").read([0])[0][..., 0]
    assert np.abs(image - deep / 60_000 * 255).max() < 4


def test_shards_of_others_are_copied_too(tmp_path):
    content = cv2.imencode(".jpg", np.asarray(photo()))[1].tobytes()
    (tmp_path / "data").mkdir()
    shards.write_shard(tmp_path / "data" / "train-0.tar", [("0.jpg", content), ("0.cls", b"0")])
    make(ImageShards(root=str(tmp_path / "data"), val_fraction=0), tmp_path / "out")
    assert PreparedImages(tmp_path / "out").read_bytes(0) == content


# An array ------------------------------------------------------------------------------------------------------------


def test_raw_array(tmp_path):
    data = Synthetic(num_train=30, num_test=12, classes=2, image_size=16)
    make(data, tmp_path / "out", raw=True, workers=2, **FEW)
    array = np.load(tmp_path / "out" / "images.npy", mmap_mode="r")
    images = PreparedImages(tmp_path / "out")
    wanted = np.stack(data.read_images(range(42)))
    np.testing.assert_array_equal(array, wanted)
    np.testing.assert_array_equal(np.stack(images.read([41, 0, 5])), wanted[[41, 0, 5]])
    assert images.find(data.read_table().paths[[3, 9]]).tolist() == [3, 9]
    with (tmp_path / "out" / "images.npy").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(UnreadableImageError, match="checksum"):
        PreparedImages(tmp_path / "out").read([1])
    (tmp_path / "out" / "images.npy").unlink()
    make(data, tmp_path / "out", raw=True, **FEW)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "images.npy"), wanted)


def test_raw_array_needs_one_shape(tmp_path):
    write_tree(tmp_path / "data", 4)
    write_image(tmp_path / "data" / "b" / "9.png", 0, size=(64, 48))
    with pytest.raises(DataError, match=r"b/9\.png is \(32, 43, 3\), the first is \(32, 40, 3\)"):
        make(ImageTable(root=str(tmp_path / "data")), tmp_path / "out", raw=True)


# The command --------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, run_cli, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "prepare", ("studies.commands.prepare", ""))
    write_tree(tmp_path / "data")
    words = ["prepare", "ImageTable", "--root", tmp_path / "data", "--output", tmp_path / "out", "--short-side", 24]
    code, out, _ = run_cli(*words, "--verify", "true", "--workers", 1)
    assert code == 0
    assert "40 images of data" in out
    assert "checksums of all 40 images are right" in out
    code, out, _ = run_cli(*words)
    assert code == 0
    assert "finished already" in out
    code, _, err = run_cli(*words, "--quality", 80)
    assert code == 2
    assert "quality: 90 there, 80 asked" in err


# Bad input -----------------------------------------------------------------------------------------------------------


def test_settings_are_not_mixed(tmp_path):
    write_tree(tmp_path / "data")
    data = ImageTable(root=str(tmp_path / "data"))
    make(data, tmp_path / "out")
    with pytest.raises(DataError, match=r"short_side: 32 there, 48 asked; quality: 90 there, 85 asked"):
        make(data, tmp_path / "out", short_side=48, quality=85)
    with pytest.raises(DataError, match="channels: 3 there, 1 asked"):
        make(ImageTable(root=str(tmp_path / "data"), mode="grey"), tmp_path / "out")
    write_image(tmp_path / "data" / "a" / "new.png", 0)
    with pytest.raises(DataError, match=r"images: 40 there, 41 asked; paths"):
        make(ImageTable(root=str(tmp_path / "data")), tmp_path / "out")


def test_without_its_settings_nothing_is_taken_over(tmp_path):
    """Who deletes the settings to give others would otherwise get shards of both."""
    write_tree(tmp_path / "data")
    data = ImageTable(root=str(tmp_path / "data"))
    make(data, tmp_path / "out", **FEW)
    for name in ("settings.json", "manifest.parquet"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(DataError, match=r"000000\.tar, and no settings\.json"):
        make(data, tmp_path / "out", short_side=16, **FEW)


def test_other_peoples_files_are_left_alone(tmp_path):
    write_tree(tmp_path / "data", 4)
    data = ImageTable(root=str(tmp_path / "data"))
    for name in (".thesis.tmp.doc", "images.npy", "notes/.mine.tmp"):
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"holds files, such as images\.npy"):
        make(data, tmp_path / "home", raw=True)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".thesis.tmp.doc").write_bytes(b"precious")
    make(data, tmp_path / "empty")
    assert (tmp_path / "empty" / ".thesis.tmp.doc").is_file()


def test_impossible_places(tmp_path, monkeypatch):
    write_tree(tmp_path / "data", 4)
    data = ImageTable(root=str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("data")
    places = {
        "s3://bucket/x": "address of a store",
        "data": "inside",
        "link/out": "inside",
        "file": "cannot be written",
    }
    for place, words in places.items():
        with pytest.raises(DataError, match=words):
            make(data, Path(place))
    assert sorted(os.listdir(tmp_path)) == ["data", "file", "link"]
    assert sorted(os.listdir(tmp_path / "data")) == ["a", "b"]


def test_an_image_too_long_for_jpeg(tmp_path):
    write_tree(tmp_path / "data", 4)
    Image.new("L", (66_000, 8)).save(tmp_path / "data" / "a" / "strip.png")
    data = ImageTable(root=str(tmp_path / "data"), val_fraction=0)
    with pytest.raises(DataError, match=r"1 of 5 images[\s\S]*strip\.png"):
        make(data, tmp_path / "out")
    assert (tmp_path / "out" / "unreadable.tsv").read_text() == "a/strip.png\ta JPEG cannot hold 66000 x 8 pixels\n"


def test_unreadable_images(tmp_path):
    write_tree(tmp_path / "data")
    good = (tmp_path / "data" / "a" / "004.png").read_bytes()
    (tmp_path / "data" / "a" / "004.png").write_bytes(good[:200])
    (tmp_path / "data" / "b" / "001.png").write_bytes(b"")
    data = ImageTable(root=str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"2 of 40 images[\s\S]*--skip-unreadable true"):
        make(data, tmp_path / "out", workers=2, **FEW)
    lines = (tmp_path / "out" / "unreadable.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a/004.png", "b/001.png"]
    summary = make(data, tmp_path / "out", skip_unreadable=True, **FEW)
    assert (summary.images, summary.unreadable) == (38, 2)
    images = PreparedImages(tmp_path / "out")
    assert [path for path, _ in images.settings["unreadable"]] == ["a/004.png", "b/001.png"]
    rows = images.find(data.read_table().paths)
    assert (rows < 0).sum() == 2
    with pytest.raises(DataError, match="no row -1"):
        images.read([-1])
    (tmp_path / "data" / "a" / "004.png").write_bytes(good)
    write_image(tmp_path / "data" / "b" / "001.png", 1, size=(60, 48))
    make(data, tmp_path / "out", **FEW)
    make(data, tmp_path / "fresh", **FEW)
    assert contents(tmp_path / "out")[0] == contents(tmp_path / "fresh")[0]


def test_two_at_once(tmp_path):
    write_tree(tmp_path / "data", 4)
    data = ImageTable(root=str(tmp_path / "data"))
    from studies.prepare import _locked

    with _locked(tmp_path / "out"), pytest.raises(DataError, match="another process"):
        make(data, tmp_path / "out")


@pytest.mark.parametrize("recipe", [{"short_side": 4}, {"quality": 0}, {"shard_mb": 0}])
def test_impossible_recipes(recipe):
    option = next(iter(recipe)).replace("_", "-")
    with pytest.raises(DataError, match=rf"out of range[\s\S]*--{option}"):
        Recipe(**recipe)


@pytest.mark.real_data
def test_real_radiographs(tmp_path, real_nih):
    """PSNR of real radiographs, re-encoded at their own size, against the originals."""
    from datamodules.chest_xray.nih import NIHChestXray14

    data = NIHChestXray14(root=str(real_nih))
    rows = rows_to_prepare(data)[:40]
    summary = prepare(data, rows, tmp_path / "out", Recipe())
    images = PreparedImages(tmp_path / "out")
    found = images.find(data.read_table().paths[rows])
    psnr = [cv2.PSNR(a, b) for a, b in zip(images.read(found), data.read_images(rows), strict=True)]
    assert min(psnr) > 38
    assert summary.after < 0.6 * summary.before
