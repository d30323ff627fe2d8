"""Reading a prepared folder: paths to rows, checks, an object store, and manifests and shards that lie."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.errors import DataError, UnreadableImageError
from datamodules.image_table import ImageTable
from datamodules.prepared import PreparedImages
from studies.prepare import verify
from tests.test_prepare import FEW, contents, make, write_tree


@pytest.fixture
def folder(tmp_path):
    write_tree(tmp_path / "data")
    make(ImageTable(root=str(tmp_path / "data")), tmp_path / "out", **FEW)
    return tmp_path / "out"


def test_find(folder, tmp_path):
    table = ImageTable(root=str(tmp_path / "data")).read_table()
    images = PreparedImages(folder)
    assert images.find(table.paths).tolist() == list(range(40))
    order = np.random.default_rng(0).permutation(40)
    assert images.find(table.paths[order]).tolist() == order.tolist()
    assert images.find(table.paths[[7, 7, 3]]).tolist() == [7, 7, 3]
    assert images.find(["none.png", table.paths[5], ""]).tolist() == [-1, 5, -1]
    assert images.find([]).tolist() == []
    swapped = np.asarray(table.paths, dtype=object)
    swapped[[38, 39]] = swapped[[39, 38]]
    assert images.find(swapped).tolist() == [*range(38), 39, 38]


def test_check(folder):
    images = PreparedImages(folder)
    images.check("data", 3, None)
    with pytest.raises(DataError, match="release 'data', not 'other'"):
        images.check("other", 3, None)
    with pytest.raises(DataError, match=r"channels 3, not 1; window None, not \[0, 4095\]"):
        images.check("data", 1, (0, 4095))


def test_through_an_object_store(folder, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(folder), "/prepared-test", recursive=True)
    remote, local = PreparedImages("memory://prepared-test"), PreparedImages(folder)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    np.testing.assert_array_equal(remote.read([39])[0], local.read([39])[0])
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1
    assert remote.find(["b/039.png"]).tolist() == local.find(["b/039.png"]).tolist()
    with pytest.raises(DataError, match="no settings"):
        PreparedImages("memory://none")


def change(folder, column, value):
    path = folder / "manifest.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[11] = value
    place = table.column_names.index(column)
    pq.write_table(
        table.set_column(place, table.field(column), pa.chunked_array([values], table.field(column).type)), path
    )


@pytest.mark.parametrize(
    ("column", "value"), [("offset", -512), ("shard", -1), ("shard", 2**31 - 1), ("size", 0), ("size", 2**31 - 1)]
)
def test_a_hostile_manifest(folder, column, value):
    change(folder, column, value)
    with pytest.raises(DataError, match=r"impossible numbers[\s\S]*row 11"):
        PreparedImages(folder)


def test_manifest_and_shards_disagree(folder):
    number = int(pq.read_table(folder / "manifest.parquet")["shard"][11].as_py())
    path = folder / "shards" / f"{number:06d}.tar"
    content = path.read_bytes()
    change(folder, "offset", 512 * 5)
    with pytest.raises(UnreadableImageError, match=r"checksum differs \(a/022\.png\)"):
        PreparedImages(folder).read([11])
    path.write_bytes(content[:1000])
    with pytest.raises(DataError, match=rf"a shard has 1000 bytes[\s\S]*{path.name}"):
        PreparedImages(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"a shard is missing[\s\S]*{path.name}"):
        PreparedImages(folder)


def test_damage_is_found_and_repaired(folder, tmp_path):
    before = contents(folder)
    path = folder / "shards" / "000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1 of 40 images differ[\s\S]*000001\.tar"):
        verify(folder, workers=2)
    path.unlink()
    make(ImageTable(root=str(tmp_path / "data")), folder, **FEW)
    assert contents(folder) == before
    assert verify(folder) == 40


def test_damaged_files_of_the_folder(folder):
    manifest, settings = folder / "manifest.parquet", folder / "settings.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"manifest cannot be read"):
        PreparedImages(folder)
    manifest.unlink()
    with pytest.raises(DataError, match="not finished"):
        PreparedImages(folder)
    settings.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        PreparedImages(folder)
    settings.write_text("{}")
    with pytest.raises(DataError, match="lack channels"):
        PreparedImages(folder)
