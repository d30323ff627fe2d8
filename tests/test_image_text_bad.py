"""Image–text shards as the web leaves them: what is left out, by which reason, and where it is an error."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules import ImageTextShards, shards
from datamodules.errors import DataError
from datamodules.image_text import pairs, tar_pairs
from tests.data import image_text

SMALL = {"image_size": 16, "batch_size": 8, "seed": 3}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def steps_of(root, **arguments):
    data = ImageTextShards(root=str(root), **{"max_bad": 1, **SMALL, **arguments})
    data.setup()
    return {step.reason: step.rows.tolist() for step in data.excluded}


def change(found, number, **parts):
    found[number].update(parts)


def test_every_kind_of_bad_pair_is_left_out_and_counted(root):
    found = image_text.samples(20)
    change(found, 1, txt=b"")
    change(found, 2, txt=" \u2003\n\t".encode())
    change(found, 3, txt=b"caf\xe9")
    change(found, 4, txt=None)
    change(found, 5, jpg=None)
    change(found, 6, txt=b"x" * (1 << 20))
    change(found, 7, txt=b"x" * ((1 << 20) + 1))
    change(found, 8, json=json.dumps({"status": "failed_to_download"}).encode())
    change(found, 9, json=b"{")  # says nothing of the status, and the caption is elsewhere
    change(found, 10, jpg=b"")
    change(found, 11, json=json.dumps({"status": "failed_to_resize"}).encode(), txt=b"")
    image_text.write_tar(root / "00000.tar", found, beside=False)
    with pytest.warns(UserWarning, match=r"1 captions are not UTF-8, the first is that of 00000.tar/000000003.jpg"):
        steps = steps_of(root)
    assert steps == {
        "the download failed": [8, 11],
        "text without image": [5, 10],
        "image without text": [4],
        "caption is empty": [1, 2],
        "caption is not UTF-8": [3],
        "caption above 1 MB": [7],
    }


def test_bad_captions_of_json(root):
    captions = ["fine", "", None, 7, ["a"], "\ud83d half of a pair", " trimmed ", "x" * (1 << 21)]
    found = image_text.samples(len(captions) + 3)
    for number, caption in enumerate(captions):
        change(found, number, json=json.dumps({"alt": caption}).encode())
    change(found, 8, json=b'{"alt": "caf\xe9"}')
    change(found, 9, json=b"[1]")
    change(found, 10, json=b"[" * 100_000)
    image_text.write_tar(root / "00000.tar", found, beside=False)
    with pytest.warns(UserWarning, match="not UTF-8"):
        steps = steps_of(root, caption="json:alt", val_fraction=0)
    assert steps == {
        "image without text": [2, 3, 4],
        "caption is empty": [1],
        "caption is not UTF-8": [5],
        "JSON cannot be read": [7, 8, 9, 10],
    }
    data = ImageTextShards(root=str(root), caption="json:alt", max_bad=1, **SMALL)
    assert data.texts([0, 6], [0, 0]) == ["fine", "trimmed"]


def test_of_several_captions_one_is_enough(root):
    found = image_text.samples(30)
    for number, pair in enumerate(found):
        pair["meta"]["alt"] = None if number % 3 == 0 else f"alt {number}"
        pair["txt"] = b"" if number % 3 == 1 else b"\xff" if number == 3 else f"text {number}".encode()
    image_text.write_tar(root / "00000.tar", found, beside=False)
    with pytest.warns(UserWarning, match="not UTF-8"):
        assert steps_of(root, caption=["txt", "json:alt"]) == {"caption is not UTF-8": [3]}
    data = ImageTextShards(root=str(root), caption=["txt", "json:alt"], max_bad=1, **SMALL)
    seeds = list(range(50))
    assert set(data.texts([0] * 50, seeds)) == {"text 0"}
    assert set(data.texts([1] * 50, seeds)) == {"alt 1"}
    assert set(data.texts([2] * 50, seeds)) == {"text 2", "alt 2"}


def test_a_wrong_name_is_an_error_with_the_right_ones(root):
    image_text.create(root)
    with pytest.raises(DataError, match="did you mean 'txt'") as error:
        ImageTextShards(root=str(root), caption="text.").read_table()
    assert "valid: json, txt, key, url, caption" in str(error.value)
    with pytest.raises(DataError, match=r"caption 'json:alt' is neither"):
        ImageTextShards(root=str(root), caption=["txt", "json:alt"]).read_table()
    with pytest.raises(DataError, match=r"score 'similar' is neither.*did you mean 'similarity'"):
        ImageTextShards(root=str(root), score="similar", curation=0.5).read_table()
    with pytest.raises(DataError, match=r"a score is no number[\s\S]*00000.tar"):
        ImageTextShards(root=str(root), score="url", curation=0.5).read_table()


def test_too_many_bad_rows_are_an_error_with_their_reasons(root):
    found = image_text.samples(100)
    for number in range(6):
        change(found, number, txt=b"")
    for number in range(50, 90):  # failed downloads are not the caption's fault
        change(found, number, json=json.dumps({"status": "failed_to_download"}).encode())
    image_text.write_tar(root / "00000.tar", found, beside=False)
    with pytest.raises(DataError, match=r"6 of 60 rows of set cannot be used \(6: caption is empty\)") as error:
        ImageTextShards(root=str(root)).read_table()
    assert "valid: json, txt, json:key, json:url, json:caption" in str(error.value)
    assert "max_bad above 0.100" in str(error.value)
    assert len(steps_of(root, max_bad=0.1)["caption is empty"]) == 6


def test_the_file_beside_a_shard_is_used_where_it_is_about_it(root, monkeypatch):
    """Its captions and scores are those of its keys, in any order; members are read for comparison alone."""
    found = image_text.samples(50)
    image_text.write_tar(root / "00000.tar", found, with_json=False)
    beside = pq.read_table(root / "00000.parquet")
    pq.write_table(beside.take(np.random.default_rng(0).permutation(len(beside))), root / "00000.parquet")
    reads = []
    read = tar_pairs._Samples.read
    monkeypatch.setattr(tar_pairs._Samples, "read", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    data = ImageTextShards(root=str(root), score="similarity", curation=1.0, **SMALL)
    table = data.read_table()
    assert reads == [2]
    assert data.texts(range(50), [0] * 50) == [f"caption of {number}" for number in range(50)]
    assert table.metadata["score"].tolist() == [number / 1000 for number in range(50)]
    assert len(set(table.groups)) == 50
    assert not any("/" in group for group in table.groups)


@pytest.mark.parametrize("kind", ["other keys", "other captions", "damaged", "key twice", "no keys"])
def test_the_file_beside_a_shard_is_passed_over_where_it_is_not(root, kind):
    found = image_text.samples(50)
    image_text.write_tar(root / "00000.tar", found)
    beside = pq.read_table(root / "00000.parquet").to_pylist()[1:]
    for number, row in enumerate(beside):
        row["caption"] = f"other {number}"
        if kind == "other keys":
            row["key"] = f"{number:010d}"
    rows = beside * 2 if kind == "key twice" else beside
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.drop_columns("key") if kind == "no keys" else table, root / "00000.parquet")
    if kind == "damaged":
        (root / "00000.parquet").write_bytes(b"PAR1")
    data = ImageTextShards(root=str(root), score="similarity", curation=1.0, **SMALL)
    assert data.texts(range(50), [0] * 50) == [f"caption of {number}" for number in range(50)]
    assert data.read_table().metadata["score"].tolist() == [number / 1000 for number in range(50)]


def test_a_shard_without_samples(root):
    """What img2dataset leaves where every download of a shard failed."""
    shards.write_shard(root / "00000.tar", [])
    for number in (1, 2):
        image_text.write_tar(root / f"0000{number}.tar", image_text.samples(30, 30 * number), beside=number == 1)
    data = ImageTextShards(root=str(root), score="similarity", curation=1.0, **SMALL)
    assert data.texts([0, 59], [0, 0]) == ["caption of 30", "caption of 89"]
    assert data.read_table().paths[0] == "00001.tar/000000030.jpg"
    assert len(data.read_images([59])) == 1


def test_a_change_beside_a_shard_is_noticed(root):
    image_text.write_tar(root / "00000.tar", image_text.samples(50))
    ImageTextShards(root=str(root), score="similarity", curation=1.0).read_table()
    beside = pq.read_table(root / "00000.parquet")
    scores = pa.array(np.full(len(beside), 0.5))
    pq.write_table(
        beside.set_column(beside.column_names.index("similarity"), "similarity", scores), root / "00000.parquet"
    )
    table = ImageTextShards(root=str(root), score="similarity", curation=1.0).read_table()
    assert set(table.metadata["score"]) == {0.5}


def test_bad_rows_of_a_parquet_file(root):
    found = image_text.samples(20)
    found[3]["jpg"], found[4]["jpg"] = None, b""
    bad = [pair["meta"]["caption"].encode() for pair in found]
    bad[5], bad[6], bad[7] = b"caf\xe9", b" ", None
    table = pa.table({"jpg": [pair["jpg"] for pair in found], "text": pa.array(bad, pa.binary())})
    not_checked = pa.Array.from_buffers(pa.string(), 20, table["text"].combine_chunks().buffers())
    pq.write_table(table.set_column(1, "text", not_checked), root / "a.parquet")
    with pytest.warns(UserWarning, match=r"not UTF-8, the first is that of a.parquet/5"):
        assert steps_of(root) == {
            "text without image": [3, 4],
            "image without text": [7],
            "caption is empty": [6],
            "caption is not UTF-8": [5],
        }


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"url": ["a"], "caption": ["b"]}, r"no column holds images[\s\S]*img2dataset"),
        ({"a": [b"a"], "b": [b"b"]}, "2 columns hold bytes"),
        ({"jpg": [b"a"], "words": ["b"]}, "caption 'txt' is neither a member nor a column"),
    ],
)
def test_parquet_files_of_other_kinds(root, columns, words):
    pq.write_table(pa.table(columns), root / "a.parquet")
    with pytest.raises(DataError, match=words):
        ImageTextShards(root=str(root)).read_table()


def test_files_that_cannot_be_read(root):
    (root / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a Parquet file cannot be read[\s\S]*a\.parquet"):
        ImageTextShards(root=str(root)).read_table()
    (root / "00000.tar").write_bytes(b"x" * 600)
    with pytest.raises(DataError, match="not a tar archive"):
        ImageTextShards(root=str(root)).read_table()
    with pytest.raises(DataError, match=r"shards are \.parquet and \.tar"):
        ImageTextShards(root=str(root), shards=[str(root / "00000.tar"), str(root / "a.parquet")])
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="no tar or parquet shards"):
        ImageTextShards(root=str(root / "empty"))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.txt", b"a")], "a sample of a tar shard has two images"),
        ([("0.jpg", b"x"), ("0.txt", b"a"), ("0.txt", b"a")], r"has two members \.txt"),
        ([(f"{key}.{kind}", b"a") for key in "010" for kind in ("jpg", "txt")], "twice in one shard"),
    ],
)
def test_samples_that_cannot_be(root, members, words):
    shards.write_shard(root / "0.tar", members)
    with pytest.raises(DataError, match=words):
        ImageTextShards(root=str(root)).read_table()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_bad": 2}, "max_bad: 2"),
        ({"caption": []}, "names nothing"),
        ({"score": "similarity"}, "need each other"),
        ({"curation": 0.5}, "need each other"),
        ({"score": "similarity", "curation_scores": "a.csv", "curation": 0.5}, "exclude each other"),
        ({"labels": ["a"]}, "restricts multi-label sets"),
    ],
)
def test_bad_settings(root, arguments, words):
    image_text.create(root, shard_count=1, count=4)
    with pytest.raises(DataError, match=words):
        ImageTextShards(root=str(root), **arguments)


def test_texts_of_any_type_agree_with_python():
    values = [b"a", b"\xff", None, b"", " é ".encode(), b"x" * 5]
    for kind in (pa.binary(), pa.large_binary()):
        caption = pairs.clean(pa.array(values, kind))
        assert caption.text.to_pylist() == ["a", "", "", "", "é", "xxxxx"]
        expected = [pairs.FINE, pairs.NOT_UTF8, pairs.NO_TEXT, pairs.EMPTY, pairs.FINE, pairs.FINE]
        assert caption.problem.tolist() == expected
    for other in (pa.array([1, 2]), pa.array([["a"], []]), pa.nulls(2)):
        assert pairs.clean(other).problem.tolist() == [pairs.NO_TEXT] * 2
    words = pa.array(["a", None, "b"]).dictionary_encode()
    assert pairs.clean(words).text.to_pylist() == ["a", "", "b"]


def test_captions_that_nobody_can_see_are_empty():
    from datamodules.image_text.pairs import EMPTY, FINE, clean

    given = [b"a cat", "\u200b".encode(), b"\x07", b"a\x00b", b" \t", "\u65e5".encode(), "\U0001f600".encode()]
    found = clean(pa.array(given, pa.binary()))
    assert found.problem.tolist() == [FINE, EMPTY, EMPTY, FINE, EMPTY, FINE, FINE]
    assert found.text.to_pylist()[3] == "a b"
