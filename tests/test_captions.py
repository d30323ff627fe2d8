"""Captions from class names: templates, names that can be read, and what is drawn by a seed."""

import numpy as np
import pandas as pd
import pytest

from datamodules import Synthetic
from datamodules.errors import DataError
from datamodules.image_text.captions import (
    PHOTO_TEMPLATES,
    RADIOGRAPH_TEMPLATES,
    check_templates,
    draw_one,
    fill,
    readable_names,
)
from datamodules.image_text.label_texts import label_texts


@pytest.mark.parametrize("templates", [PHOTO_TEMPLATES, RADIOGRAPH_TEMPLATES])
def test_own_templates(templates):
    check_templates(templates)
    assert len(set(templates)) == len(templates) >= 5


@pytest.mark.parametrize(
    "template", ["a photo.", "{} and {}", "a {0}", "a {name}", "a {{}}", "a {}}", "a { }", "a }{", ""]
)
def test_a_bad_template_is_named(template):
    with pytest.raises(DataError, match="does not take one name") as error:
        check_templates(["a {}.", template])
    assert repr(template) in str(error.value)
    assert "template 2 of 2" in str(error.value)


@pytest.mark.parametrize("templates", [[], (), "a photo of a {}."])
def test_no_list_of_templates(templates):
    with pytest.raises(DataError, match="no list of templates"):
        check_templates(templates)


def test_fill_is_a_function_of_template_name_and_seed():
    names = ["cat", "{0} \\1", "a {} b", "Ä"] * 50
    seeds = np.random.default_rng(0).integers(0, 2**63, len(names)).tolist()
    captions = fill(PHOTO_TEMPLATES, names, seeds)
    # One by one it is the same: no sample's draw depends on another's.
    assert captions == [fill(PHOTO_TEMPLATES, [name], [seed])[0] for name, seed in zip(names, seeds, strict=True)]
    for name, caption in zip(names, captions, strict=True):
        assert caption in [before + name + after for before, after in (t.split("{}") for t in PHOTO_TEMPLATES)]


def test_templates_are_equally_likely():
    seeds = np.random.default_rng(1).integers(0, 2**63, 14_000)
    drawn = draw_one(seeds.tolist(), np.full(14_000, 7), "caption template")
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn, minlength=7)
    assert ((counts - 2000) ** 2 / 2000).sum() < 22.5  # chi-squared, 6 degrees of freedom, p = 0.001
    neighbours = draw_one(range(14_000), np.full(14_000, 7), "caption template")
    assert ((np.bincount(neighbours, minlength=7) - 2000) ** 2 / 2000).sum() < 22.5
    other = draw_one(seeds.tolist(), np.full(14_000, 7), "caption")
    assert (drawn == other).mean() == pytest.approx(1 / 7, abs=0.02)  # another purpose is another draw
    assert draw_one(seeds.tolist(), np.full(14_000, 1), "caption").max() == 0


def test_names_are_made_readable():
    names = ["golden_retriever", "n01440764 tench", "lilac", " two  words ", "747 airplane", "sea_lion"]
    assert readable_names(names) == ["golden retriever", "tench", "lilac", "two words", "747 airplane", "sea lion"]
    assert readable_names(["No Finding", "n95 mask"]) == ["No Finding", "n95 mask"]


@pytest.mark.parametrize("names", [["0", "1"], ["n01440764", "n01443537"], ["cat", "7"], ["1.5"], ["_"]])
def test_codes_want_a_file(names):
    with pytest.raises(DataError, match=r"numbers or ids[\s\S]*columns class and name"):
        readable_names(names)


def test_names_from_a_file(tmp_path):
    classes = ["n02012849", "n03126707", "7"]
    frame = pd.DataFrame({"name": ["lucky seven", "crane (bird)", "crane (machine)"], "class": ["7", *classes[:2]]})
    frame.to_csv(tmp_path / "names.csv", index=False)
    assert readable_names(classes, tmp_path / "names.csv") == ["crane (bird)", "crane (machine)", "lucky seven"]
    frame.to_parquet(tmp_path / "names.parquet")
    assert readable_names(classes, tmp_path / "names.parquet") == ["crane (bird)", "crane (machine)", "lucky seven"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("cat,a\ndgo,b\n", r"unknown class 'dgo'; did you mean 'dog'[\s\S]*line 3"),
        ("cat,a\n", "1 of 2 classes have no caption name: dog"),
        ("cat,a\ndog,b\ncat,c\n", r"a class listed twice: 'cat'[\s\S]*line 4"),
        ("cat,a\ndog, \n", r"no caption name for class 'dog'[\s\S]*line 3"),
    ],
)
def test_bad_files(tmp_path, rows, words):
    (tmp_path / "names.csv").write_text("class,name\n" + rows)
    with pytest.raises(DataError, match=words):
        readable_names(["cat", "dog"], tmp_path / "names.csv")
    (tmp_path / "names.csv").write_text("klass,name\n" + rows)
    with pytest.raises(DataError, match="no column 'class'; did you mean 'klass'"):
        readable_names(["cat", "dog"], tmp_path / "names.csv")


def test_equal_names_are_pointed_out():
    with pytest.warns(UserWarning, match=r"cannot tell 1 groups of classes apart.*n02012849 crane, n03126707 Crane"):
        assert readable_names(["n02012849 crane", "n03126707 Crane", "cat"]) == ["crane", "Crane", "cat"]


def test_labels_in_words_say_what_is_known_and_no_more():
    nan, names = np.nan, ["edema", "effusion", "mass"]
    labels = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, nan, 0], [nan, 0, nan], [0.5, nan, nan], [nan, nan, 1]])
    found = label_texts(labels.astype(np.float32), names, complete=True)
    assert found[:3] == ["edema and mass", "edema, effusion and mass", "no finding"]
    assert found[3:] == ["no edema or mass", "no effusion", "something unknown", "mass"]
    assert label_texts(labels[2:3], names, complete=False) == ["no edema, effusion or mass"]
    assert label_texts(np.array([1, -1, 0]), names, complete=True) == ["effusion", "something unknown", "edema"]


def test_a_file_of_names_serves_a_part_of_the_classes(tmp_path):
    small = {"classes": 4, "num_train": 40, "num_test": 10, "captions": ["a {}."]}
    every = Synthetic(**small).class_names
    lines = "".join(f"{name},thing {number}\n" for number, name in enumerate(every))
    (tmp_path / "names.csv").write_text("class,name\n" + lines)
    part = Synthetic(**small, num_classes_kept=2, caption_names=str(tmp_path / "names.csv"))
    assert part.readable_names == [f"thing {every.index(name)}" for name in part.class_names]
    with pytest.raises(DataError, match=r"no file[\s\S]*data.init_args.caption_names"):
        readable_names(every, tmp_path / "none.csv")
