"""Key of features: what decides their values, so that those kept on disk are never out of date."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datamodules.hashing import hash_ids
from datamodules.transforms import create_transform
from studies.fingerprints import image_sources
from studies.processes import parallel, usable_cores

if TYPE_CHECKING:
    from torch import nn

    from datamodules.base import BaseDataModule
    from lightning_modules.classification import Classification

FORMAT = 2  # raised when the meaning of stored features or of their key changes
KEY_ROWS = 16_384  # rows whose files are looked at at a time
PARALLEL_FROM = 8 * KEY_ROWS  # rows from which processes are worth starting
MOST_WORKERS = 16
KEY_IMAGES = 1_024
"""Images whose pixels enter the key where images are no files of their own, evenly over the rows: another world of the
generator changes 3 in 100 images at least, of which so many images miss all in 1 of 10^13 cases."""


def feature_key(net: "Classification", data: "BaseDataModule", rows: NDArray[np.int64]) -> str:
    """Key of the features of some rows: 32 hexadecimal digits (blake2b) over all that decides their values.

    The net enters as it was built: its tensors but the classifier's, constants that no state dict holds (the ε of a
    norm), normalisation and layer groups. The data enter by release, transform, the paths of the rows in their order
    and the files behind them; see `image_keys`.
    """
    from lightning_modules.backbones.layers import layer_groups

    facts = net.hyper_parameters()
    settings = {
        "format": FORMAT,
        "weights": net_hash(net),
        "constants": _constants(net.backbone),
        "net": [facts[name] for name in ("backbone", "in_chans", "mean", "std")],
        "groups": [
            [group.name, group.tensors] for cut in ("coarse", "block") for group in layer_groups(net.backbone, cut)
        ],
        "transform": [data.transform, data.image_size, data.channels, data.window],
        "release": data.release,
    }
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for keys in image_keys(data, rows):
        digest.update(keys)
    return digest.hexdigest()


def image_keys(data: "BaseDataModule", rows: NDArray[np.int64]) -> Iterator[bytes]:
    """Bytes that identify the images of some rows, in their order: paths, and each file's size and time of change.

    Every file is asked for at every use, since nothing else tells that one was replaced: 20 µs an image of a core, so
    many are divided over forked processes. Of images that are no files of their own (rendered, or in an archive)
    `KEY_IMAGES` are read.
    """

    def look_at(part: NDArray[np.int64]) -> tuple[bytes, NDArray[np.bool_]]:
        return _look_at(image_sources(data, part))

    parts = [rows[start : start + KEY_ROWS] for start in range(0, len(rows), KEY_ROWS)]
    workers = min(usable_cores(), MOST_WORKERS) if len(rows) >= PARALLEL_FROM else 1
    lacking = []
    for part, (digest, found) in zip(parts, parallel(look_at, parts, workers), strict=True):
        yield hash_ids(data.raw_table.paths[part], "paths of features").tobytes() + digest
        lacking.append(part[~found])
    without = np.concatenate(lacking)
    if len(without):
        whole = create_transform(data.transform, data.image_size, train=False).whole
        sample = without[np.linspace(0, len(without) - 1, min(len(without), KEY_IMAGES)).astype(np.int64)]
        for row in sample.tolist():
            (image,) = data.images([row], whole)
            yield repr(image.shape).encode() + image.tobytes()


def net_hash(net: "Classification") -> str:
    """Hash of the weights that a net has, in the form of result rows."""
    from lightning_modules.backbones.checkpoints import LoadedWeights, weights_hash

    return weights_hash(LoadedWeights(net.backbone.state_dict(), origin="the net as built"))


def _look_at(files: Sequence[tuple[Path, str] | None]) -> tuple[bytes, NDArray[np.bool_]]:
    """Hash of paths, decodings, sizes and times of change of some files, and which of them there are, bool (N,)."""
    facts: list[str] = []
    last, state = None, ""
    for entry in files:
        if entry is None:
            facts.append("")
            continue
        path, decoding = os.fspath(entry[0]), entry[1]
        if path != last:  # neighbours in a prepared set share a file
            try:
                status = os.stat(path)
                state = f"{os.path.abspath(path)}|{status.st_size}|{status.st_mtime_ns}"
            except OSError:
                state = ""
        last = path
        facts.append(f"{state}|{decoding}" if state else "")
    text = "\n".join(facts).encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=16).digest(), np.array([fact != "" for fact in facts])


def _constants(model: "nn.Module") -> list[tuple[str, str, float | str]]:
    """Numbers and words that the modules compute with, by module and name."""
    return [
        (path, name, value)
        for path, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str) and name != "training"
    ]
