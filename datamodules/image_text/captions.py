"""Captions made of class names by templates. Pure functions; which template an image gets depends on its seed alone."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules import readers
from datamodules.errors import DataError, closest, shorten
from datamodules.random_numbers import random_words
from datamodules.rows import reject_rows
from datamodules.table import Origin

SLOT = "{}"
"""Where a template takes the name."""

PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a picture that shows a {}.",
    "a {} seen from close by.",
    "a small {} in a large scene.",
    "a blurred photo of a {}.",
    "one of many photos of a {}.",
    "somebody's snapshot of a {}.",
)
"""Captions of photos."""

RADIOGRAPH_TEMPLATES = (
    "a chest X-ray showing {}.",
    "a chest radiograph with {}.",
    "a frontal view of a chest with {}.",
    "findings on this radiograph: {}.",
    "a patient's chest X-ray; the reader notes {}.",
)
"""Captions of chest radiographs."""

_WORDNET_ID = re.compile(r"^n\d{8}\b")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def check_templates(templates: Sequence[str]) -> None:
    """Make sure that every template takes exactly one name.

    Raises:
        DataError: No template at all, or one without `{}`, with several, or with another brace; names it.
    """
    if isinstance(templates, str) or not len(templates):
        raise DataError(f"captions: {templates!r} is no list of templates", valid='["a photo of a {}.", ...]')
    for number, template in enumerate(templates):
        if template.count(SLOT) != 1 or set("{}") & set(template.replace(SLOT, "")):
            raise DataError(
                f"template {template!r} does not take one name",
                where=f"template {number + 1} of {len(templates)}",
                valid='text with exactly one {} and no other brace, such as "a photo of a {}."',
            )


def fill(templates: Sequence[str], names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Put each name into the template that its seed draws.

    Args:
        templates: Templates that `check_templates` has passed.
        names: What each caption is about, one a sample.
        seeds: Seed of each sample, 0 … 2^63 − 1; the template is independent of what else the seed draws.
    """
    places = draw_one(seeds, np.full(len(names), len(templates)), "caption template")
    # Not str.format: a name may hold braces.
    return [templates[place].replace(SLOT, name) for place, name in zip(places.tolist(), names, strict=True)]


def draw_one(seeds: Sequence[int], counts: np.ndarray, purpose: str) -> np.ndarray:
    """Draw one of `counts` (B,) things for every seed: int64 (B,) in [0, count), a function of seed and purpose."""
    words = random_words(0, purpose, np.asarray(seeds, dtype=np.int64), 1)[:, 0]
    return np.asarray((words % np.maximum(counts, 1).astype(np.uint64)).astype(np.int64))


def readable_names(class_names: Sequence[str], file: Path | None = None, further: Sequence[str] = ()) -> list[str]:
    """What captions call the classes, in their order.

    Without a file, underscores become blanks and a WordNet id before a name goes: "n01440764 tench" is "tench".

    Args:
        class_names: Names as the data set has them.
        file: CSV or Parquet file with columns class (as the data set names it) and name (as captions call it).
        further: Classes that the file may name, too: those that the run does not use.

    Raises:
        DataError: A class name is a bare number or a WordNet id and there is no file; or the file lacks a class, names
            an unknown one or one twice, or has a blank name.
    """
    names = _from_names(class_names) if file is None else _from_file(class_names, file, further)
    same = [name for name, count in Counter(name.casefold() for name in names).items() if count > 1]
    if same:
        examples = shorten([own for own, name in zip(class_names, names, strict=True) if name.casefold() == same[0]])
        warnings.warn(
            f"captions cannot tell {len(same)} groups of classes apart, such as {examples}: all are {same[0]!r}; "
            "--data.caption_names FILE gives them names of their own",
            stacklevel=2,
        )
    return names


def _from_names(class_names: Sequence[str]) -> list[str]:
    names = [" ".join(_WORDNET_ID.sub("", name, count=1).replace("_", " ").split()) for name in class_names]
    codes = [own for own, name in zip(class_names, names, strict=True) if not name or _NUMBER.fullmatch(name)]
    if codes:
        raise DataError(
            f"{len(codes)} of {len(names)} class names are numbers or ids, which say nothing in a caption: "
            f"{shorten(codes, 5)}",
            where="data.init_args.caption_names",
            hint="give a CSV file with columns class and name",
        )
    return names


def _from_file(class_names: Sequence[str], file: Path, further: Sequence[str]) -> list[str]:
    if not file.is_file():
        raise DataError(
            f"no file {file}",
            where="data.init_args.caption_names",
            valid="a CSV or Parquet file with columns class and name",
        )
    frame = readers.read_frame(file, ["class", "name"])
    classes, names = readers.text_column(frame["class"]), readers.text_column(frame["name"])
    reject_rows(names == "", classes, "no caption name for class", file)
    reject_rows(classes.duplicated(), classes, "a class listed twice:", file)
    unknown = np.flatnonzero(~classes.isin([*class_names, *further]).to_numpy())
    if len(unknown):
        value = str(classes.iloc[unknown[0]])
        near = closest(value, class_names)
        raise DataError(
            f"unknown class {value!r}" + (f"; did you mean {near!r}?" if near else "") + f" ({len(unknown)} such rows)",
            where=Origin(file).place(int(unknown[0])),
            valid=class_names,
        )
    called = dict(zip(classes, names, strict=True))
    missing = [name for name in class_names if name not in called]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(class_names)} classes have no caption name: {shorten(missing, 5)}",
            where=str(file),
            hint="give every class a row",
        )
    return [called[name] for name in class_names]
