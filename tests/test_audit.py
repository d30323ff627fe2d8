"""The audit of data sets with planted copies, patients and confounds: what is found, and what is not."""

import csv
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from datamodules.errors import DataError
from datamodules.image_table import ImageTable
from studies.audit import run_audit
from studies.audit_report import markdown, summarise
from studies.commands.audit import run, split_words
from studies.overlap import content_keys, distinctive_names

COLUMNS = {"path": "file", "label": "label", "group": "patient", "split": "split", "site": "site"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))


def picture(seed, site="north"):
    """A textured grey picture; the south has a black frame and darker pictures."""
    rng = np.random.default_rng(seed)
    coarse = sum(cv2.resize(rng.normal(0, 1, (k, k)), (96, 96), interpolation=cv2.INTER_CUBIC) for k in (3, 6, 12, 24))
    image = np.clip(128 + 30 * coarse, 0, 255)
    if site == "south":
        image *= 0.5
        image[:8] = image[-8:] = image[:, :8] = image[:, -8:] = 0
    return image.astype(np.uint8)


def write_set(root, rows):
    """Write the table and the images of dicts of file, label, patient, split, site (and seed)."""
    root.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (root / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        if "seed" in row:
            cv2.imwrite(str(root / row["file"]), picture(row["seed"], row["site"]))
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(COLUMNS.values()), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return root


def read_set(root, **kwargs):
    settings = {
        "table": "labels.csv",
        "columns": COLUMNS,
        "mode": "grey",
        "class_names": ["negative", "positive"],
        "val_fraction": 0,
    }
    return ImageTable(root=str(root), **settings | kwargs)


def row(number, split, *, label=None, site="north", prefix="scan", patient=None):
    label = number % 2 if label is None else label
    return {
        "file": f"images/{prefix}_{number:06d}.png",
        "label": ("negative", "positive")[label],
        "patient": patient or f"{prefix}{number}",
        "split": split,
        "site": site,
        "seed": sum(map(ord, prefix)) * 10_000 + number,
    }


def two_sites(root, *, confounded):
    """Like COVIDx where confounded: all positives are of one institution, all negatives of another."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(160):
        label = number % 2
        south = label == 1 if confounded else rng.random() < 0.5
        split = "test" if number >= 120 else "val" if number >= 100 else "train"
        rows.append(row(number, split, label=label, site="south" if south else "north"))
    return read_set(write_set(root, rows))


def flagged(audit):
    return [finding.text for finding in summarise(audit) if finding.flagged]


def test_a_confound_is_flagged_with_what_a_network_can_read(tmp_path):
    audit = run_audit(two_sites(tmp_path / "confounded", confounded=True))
    assert len(flagged(audit)) == 1
    assert flagged(audit)[0].startswith("the site of confounded tells positive (decided, V 1.00, AUROC 1.00")
    assert "images tell it, so a network can use it" in flagged(audit)[0]
    by_split = audit.provenance.set_index("split")
    assert set(by_split.index) == {"all", "train", "validation", "test"}
    assert (by_split["v"] > 0.999).all()
    assert by_split.loc["test", "images"] == 40
    table = audit.contingency["confounded", "positive", "site"]
    assert table.loc[0, "north"] == table.loc[1, "south"] == 80
    assert table.to_numpy().sum() == 160
    text = markdown(audit)
    assert "| positive | north | south |" in text
    assert "| 1 | 0 | 80 |" in text


def test_sites_without_a_confound_are_not(tmp_path):
    audit = run_audit(two_sites(tmp_path / "control", confounded=False))
    assert flagged(audit) == []
    assert (audit.provenance["v"] < 0.5).all()
    assert audit.probes[0][1].readable  # the images tell the site, but the site does not tell the label
    assert any(finding.text.startswith("images of control tell the site") for finding in summarise(audit))


@pytest.fixture
def source_and_target(tmp_path):
    """A source of 60 images, and a target of 30 that holds 3 + 4 + 5 copies of source images."""
    source = [row(number, "train" if number < 40 else "val" if number < 50 else "test") for number in range(60)]
    write_set(tmp_path / "source", source)
    target = [row(number, "test" if number < 20 else "train", prefix="own") for number in range(30)]
    write_set(tmp_path / "target", target)
    plan = [(number, "file") for number in range(3)]  # of source's training images
    plan += [(number, "resized") for number in (3, 4, 5, 55)]  # the last one is a test image of source
    plan += [(number, "jpeg") for number in (6, 7, 8, 9, 45)]  # the last one is a validation image
    for place, (number, how) in enumerate(plan):  # all are test images of target
        copy, old = tmp_path / "target" / target[place]["file"], tmp_path / "source" / source[number]["file"]
        if how == "file":
            shutil.copy(old, copy)
        elif how == "resized":
            cv2.imwrite(str(copy), cv2.resize(cv2.imread(str(old), 0), (72, 72), interpolation=cv2.INTER_AREA))
        else:
            cv2.imwrite(str(copy.with_suffix(".jpg")), cv2.imread(str(old), 0), [cv2.IMWRITE_JPEG_QUALITY, 60])
            shutil.move(copy.with_suffix(".jpg"), copy)
    return tmp_path / "source", tmp_path / "target", plan


def test_copies_between_two_sets_are_found_and_counted(source_and_target):
    source, target, plan = source_and_target
    audit = run_audit(read_set(source), read_set(target))
    near, files = audit.near_duplicates, audit.same_files
    expected = {
        (f"images/scan_{number:06d}.png", f"images/own_{place:06d}.png") for place, (number, _) in enumerate(plan)
    }
    assert set(zip(near["path_a"], near["path_b"], strict=True)) == expected
    assert len(files) == 3
    assert set(near["split_b"]) == {"test"}
    assert near["leak"].sum() == len(plan) - 1  # a copy of a test image is none
    found = flagged(audit)
    assert "test images of target with the very file of training or validation images of source: 3" in found
    assert "test images of target that are copies of training or validation images of source: 11" in found
    assert audit.same_ids.empty
    assert any("not comparable: different releases" in note for note in audit.notes)


def test_equal_names_are_a_leak_only_where_pictures_agree(source_and_target, tmp_path):
    source, _, _ = source_and_target
    twins = [row(number, "test") for number in range(10)]
    write_set(tmp_path / "twins", twins)
    audit = run_audit(read_set(source), read_set(tmp_path / "twins"))
    assert "test images of twins with the name of training or validation images of source: 10" in flagged(audit)
    assert audit.same_ids["same_picture"].all()
    others = [one | {"seed": 77_000 + number} for number, one in enumerate(twins)]
    write_set(tmp_path / "others", others)
    audit = run_audit(read_set(source), read_set(tmp_path / "others"))
    assert len(audit.same_ids) == 10
    assert not audit.same_ids["leak"].any()
    assert flagged(audit) == []


def test_copies_do_not_fool_the_probe(source_and_target):
    """All of B is copied from A: each picture bears both answers, which must not look like a negative skill."""
    source, _, _ = source_and_target
    audit = run_audit(read_set(source), read_set(source, dataset_name="twin"))
    (_, probe), *_ = audit.probes
    assert probe.provenance == "data set"
    assert probe.images == 120
    assert probe.low <= 0.5 <= probe.high


def test_patients_and_names_within_one_release(tmp_path):
    rows = [row(number, "train" if number < 20 else "test", patient=f"p{number // 2}") for number in range(30)]
    rows[29]["patient"] = rows[0]["patient"]
    write_set(tmp_path / "a", rows)
    moved = [one | {"split": {"train": "test", "test": "train"}[one["split"]]} for one in rows[:25]]
    write_set(tmp_path / "b", moved)
    a, b = (read_set(tmp_path / name, dataset_name="clinic") for name in "ab")
    audit = run_audit(a, b, probe=0)
    assert audit.crossing == ["p0 (test, train)"]
    assert len(audit.patients) == 13  # of the 25 rows: p0 … p12
    assert audit.patients["leak"].all()
    assert audit.patients.set_index("patient").loc["p0", "splits_a"] == "test, train"
    by = audit.same_ids[audit.same_ids["set_a"] != audit.same_ids["set_b"]]
    assert len(by) == 25
    assert set(by["by"]) == {"path"}
    assert "patients of A: clinic in several splits: 1, such as p0 (test, train)" in flagged(audit)
    assert not audit.probes


def test_copies_across_the_splits_of_one_set(tmp_path):
    rows = [row(number, "test" if number < 10 else "train") for number in range(30)]
    root = write_set(tmp_path / "one", rows)
    for copy, old in ((20, 1), (21, 1), (22, 23)):
        shutil.copy(root / rows[old]["file"], root / rows[copy]["file"])
    (root / rows[29]["file"]).write_bytes(b"no picture")
    (root / rows[28]["file"]).unlink()
    audit = run_audit(read_set(root))
    # The two copies of one test image are a pair of training images, too.
    assert audit.same_files["leak"].tolist().count(True) == 2
    assert len(audit.same_files) == len(audit.near_duplicates) == 4
    leaks = audit.same_files[audit.same_files["leak"]]
    assert set(leaks["split_a"]) == {"train"}
    assert "test images of one with the very file of training or validation images of one: 1" in flagged(audit)
    lines = [finding.text for finding in summarise(audit)]
    assert "image files of one that are missing: 1 of 30" in lines
    assert "images of one that cannot be read: 1 (images/scan_000029.png)" in lines
    assert "| one | 30 |" in markdown(audit)


def test_only_files_of_equal_size_are_read(tmp_path):
    contents = [b"abcd", b"abce", b"abcd", b"ab", b"", b""]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    keys = content_keys([*paths, None, tmp_path / "nowhere"])
    assert keys[0] == keys[2] != keys[1]
    assert keys[1] != ""
    assert keys[3:].tolist() == [""] * 5


def test_distinctive_names():
    names = ["a/00000061_012.png", "b/x_00001.png", "c/x_00001.jpg", "123456.png", "img_0001.png", "IM.12345.dcm"]
    assert distinctive_names(np.array(names, dtype=object)).tolist() == ["00000061_012", "", "", "", "", "im.12345"]


def test_words_of_the_two_sets():
    rest, settings = split_words(
        ["audit", "A", "--a.root", "x", "B", "--b.root=y", "--images", "3", "--b.views", "[PA]"]
    )
    assert rest == ["audit", "A", "B", "--images", "3"]
    assert settings == {"a": ["--data.root", "x"], "b": ["--data.root=y", "--data.views", "[PA]"]}


def test_errors_name_the_side(tmp_path):
    with pytest.raises(DataError, match=r"give --b\.root FOLDER"):
        run(["audit", "Synthetic", "NIHChestXray14", "--b.root", str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="did you mean root"):
        run(["audit", "NIHChestXray14", "--a.rot", "x"])


def test_what_a_newcomer_sees(source_and_target, tmp_path, capsys):
    source, target, _ = source_and_target
    words = ["audit"]
    for side, root in (("a", source), ("b", target)):
        config = tmp_path / f"{root.name}.yaml"
        columns = "{path: file, label: label, group: patient, split: split, site: site}"
        config.write_text(
            f"data:\n  class_path: ImageTable\n  init_args:\n    root: {root}\n    table: labels.csv\n"
            f"    columns: {columns}\n    mode: grey\n"
        )
        words += [str(config), f"--{side}.val_fraction", "0"]
    run([*words, "--output", str(tmp_path / "report"), "--images", "60"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FLAGGED  test images of target with the very file of training or validation images of source: 3"
    assert lines[-1] == f"report:  {tmp_path / 'report' / 'report.md'}"
    assert len(lines) < 20
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "report").glob("*.csv")}
    assert set(tables) == {"same_files", "same_ids", "near_duplicates", "shared_patients", "provenance"}
    assert len(tables["near_duplicates"]) == 12
    assert {"path_a", "split_a", "path_b", "split_b", "leak", "bits", "correlation"} <= set(tables["near_duplicates"])
    assert (tmp_path / "report" / "report.md").read_text().startswith("# Audit of source and target\n")
