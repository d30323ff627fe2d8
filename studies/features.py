"""Features of a data set under frozen weights: extracted once, kept on disk, read by any number of processes.

$FARSHOT_CACHE/features/<key>/<group>.npy   float32 (N, D), the pooled features of one layer group
$FARSHOT_CACHE/features/<key>/lock          held by the process that extracts; its end releases it, however it ends

The key covers all that decides the values, so that nothing here is ever out of date; delete what is no longer needed.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.atomic import clear_temporaries, replace_file
from datamodules.errors import DataError
from datamodules.hashing import hash_ids
from datamodules.shards import cache_folder
from datamodules.transforms import create_transform
from studies import display
from studies.fingerprint_cache import file_keys
from studies.fingerprints import image_sources, progress_bar

if TYPE_CHECKING:
    from torch import nn

    from datamodules.base import BaseDataModule
    from lightning_modules.classification import Classification

FORMAT = 1  # raised when the meaning of stored features changes
RANDOM_SEED = 0  # of the initialisation without weights
KEY_ROWS = 65_536  # rows whose files are looked at at a time
KEY_IMAGES = 1_024
"""Images whose pixels enter the key where images are no files of their own, evenly over the rows: another world of the
generator changes 3 in 100 images at least, of which so many images miss all in 1 of 10^13 cases."""
SHOWN_FROM = 2_048  # images from which a progress bar is worth showing


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The pooled features of one layer group for some images of a data set.

    Attributes:
        group: The layer group.
        depth: Number of layer groups, of its granularity, from the input to this one.
        architecture: The net's name in timm.
        weights_hash: Hash of the weights, as in result rows.
        values: float32 (N, D), a memory map that cannot be written to.
        rows: Table rows of the images, int64 (N,).
        labels: Their labels, int64 (N,) or float32 (N, L), as the data set's table has them.
    """

    group: str
    depth: int
    architecture: str
    weights_hash: str
    values: NDArray[np.float32]
    rows: NDArray[np.int64]
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)


def extract_features(
    weights: str | None,
    data: "BaseDataModule",
    rows: NDArray[np.int64],
    *,
    backbone: str | None = None,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
) -> dict[str, FeatureSet]:
    """Features of images under the data set's evaluation transform; what the cache has is not computed again.

    Of several processes that want the same features one extracts them and the others wait. Memory holds a few batches,
    whatever the number of images.

    Args:
        weights: What `read_weights` takes; None = random initialisation, always the same.
        data: The data set.
        rows: Rows of its table (N,), in any order, also repeated.
        backbone: A timm model; needed where the weights do not name one.
        groups: Names of layer groups, stages or blocks; default the last, whose features the classifier is given.
        batch_size: Images of one forward pass.
        num_workers: Loader processes; default the data set's own.
        device: Where the net runs; default the GPU if there is one.

    Returns:
        Features by group, each with the rows in the order asked for.

    Raises:
        DataError: Impossible rows, no architecture, an unreadable image, features that are not finite, or a cache that
            cannot be written.
        ModelError: The weights cannot be read or do not fit, or there is no such layer group.
    """
    from lightning_modules.backbones.features import FeatureReader
    from lightning_modules.backbones.layers import layer_groups

    rows = _checked_rows(rows, data)
    if batch_size < 1:
        raise DataError(f"a batch size of {batch_size} is impossible", where="batch_size", valid="1 or more")
    net, source_hash = build_net(weights, backbone)
    reader = FeatureReader(net.backbone, groups if groups is not None else [layer_groups(net.backbone)[-1].name])
    folder = cache_folder() / "features" / feature_key(net, data, rows)
    paths = {name: folder / f"{name}.npy" for name in reader.groups}
    if any(_stored(path, len(rows)) is None for path in paths.values()):
        with _locked(folder):
            lacking = [name for name, path in paths.items() if _stored(path, len(rows)) is None]
            for name in lacking:
                clear_temporaries(paths[name])
            if lacking:  # not where another process has been faster
                on_device = _to_device(net, device)
                batches = _read_batches(on_device, lacking, data, rows, batch_size, num_workers)
                _replace_files(
                    [paths[name] for name in lacking],
                    lambda files: _write(dict(zip(lacking, files, strict=True)), batches, len(rows)),
                )
    labels = data.read_table().labels[rows]
    return {
        name: FeatureSet(name, reader.depths[name], net.backbone_name, source_hash, _open(path), rows, labels)
        for name, path in paths.items()
    }


# The net and the key -------------------------------------------------------------------------------------------------


def build_net(weights: str | None, backbone: str | None = None) -> tuple["Classification", str]:
    """Build the net, in eval mode on the CPU, and hash its weights: the source's, or its own where there is none.

    Normalisation is that of the weights; the classifier means nothing.

    Raises:
        DataError: Neither the weights nor `backbone` name an architecture, or they name two.
        ModelError: The weights cannot be read or do not fit.
    """
    import torch

    from lightning_modules.backbones.checkpoints import read_weights, weights_hash
    from lightning_modules.classification import Classification

    loaded = read_weights(weights) if weights is not None else None
    stated = loaded.architecture if loaded is not None else None
    name = stated or backbone
    if name is None:
        raise DataError(
            f"the weights {weights} do not say which net they belong to" if weights else "no weights and no net",
            where="backbone",
            hint="name the timm model, such as backbone resnet50; `python cli.py list models` shows the tested ones",
        )
    if backbone is not None and name.partition(".")[0] != backbone.partition(".")[0]:
        raise DataError(
            f"the weights {weights} are of {name}, not of {backbone}", where="backbone", hint="leave it out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        # One output, so that the initialisation without weights does not depend on the data set.
        net = Classification(backbone=name, num_classes=1, task="binary", weights=weights).eval()
    return net, weights_hash(loaded) if loaded is not None else _hash_of_net(net)


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
        "weights": _hash_of_net(net),
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

    Of images that are no files of their own (rendered, or in an archive) `KEY_IMAGES` are read.
    """
    table_paths = data.raw_table.paths
    files = np.zeros(len(rows), np.uint64)
    for start in range(0, len(rows), KEY_ROWS):
        part = rows[start : start + KEY_ROWS]
        files[start : start + KEY_ROWS] = file_keys(image_sources(data, part))
        yield hash_ids(table_paths[part], "paths of features").tobytes()
    yield files.tobytes()
    without = rows[files == 0]
    if len(without):
        whole = create_transform(data.transform, data.image_size, train=False).whole
        sample = without[np.linspace(0, len(without) - 1, min(len(without), KEY_IMAGES)).astype(np.int64)]
        for row in sample.tolist():
            (image,) = data.images([row], whole)
            yield repr(image.shape).encode() + image.tobytes()


def _hash_of_net(net: "Classification") -> str:
    from lightning_modules.backbones.checkpoints import LoadedWeights, weights_hash

    return weights_hash(LoadedWeights(net.backbone.state_dict(), origin="the net as built"))


def _constants(model: "nn.Module") -> list[tuple[str, str, float | str]]:
    """Numbers and words that the modules compute with, by module and name."""
    return [
        (path, name, value)
        for path, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str) and name != "training"
    ]


def _checked_rows(rows: NDArray[np.int64], data: "BaseDataModule") -> NDArray[np.int64]:
    rows, count = np.asarray(rows), len(data.read_table())
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not len(rows):
        raise DataError(
            f"rows of type {rows.dtype} and shape {rows.shape}", where="rows", valid="one or more whole numbers (N,)"
        )
    wrong = (rows < 0) | (rows >= count)
    if wrong.any():
        raise DataError(f"{data.name} has no row {rows[wrong][0]}", where="rows", valid=f"0 to {count - 1}")
    return rows.astype(np.int64)


# Extraction ----------------------------------------------------------------------------------------------------------


def _to_device(net: "Classification", device: str | None) -> "Classification":
    """Move a net, its kernels channels-last: 1.0 to 1.8 times as fast on a CPU (test_resnet at 32 px the most)."""
    import torch

    net.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _read_batches(
    net: "Classification",
    groups: Sequence[str],
    data: "BaseDataModule",
    rows: NDArray[np.int64],
    batch_size: int,
    num_workers: int | None,
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Features by group of the rows, a batch at a time, in their order."""
    import torch

    from lightning_modules.backbones.features import FeatureReader

    reader = FeatureReader(net.backbone, groups)
    data = copy(data)  # the caller's keeps its settings
    data.trainer = None  # whose ranks would share the rows
    data.num_workers = data.num_workers if num_workers is None else num_workers
    done = 0
    with progress_bar(f"features of {data.name}", len(rows), shown=len(rows) >= SHOWN_FROM) as advance:
        for batch in data.evaluation_dataloader(rows):
            for images in torch.split(batch["image"], batch_size):
                normalised = net.normalise(images.to(net.device, non_blocking=True))
                tensors = reader(normalised.contiguous(memory_format=torch.channels_last))
                features = {name: np.ascontiguousarray(values.cpu().numpy()) for name, values in tensors.items()}
                _check_finite(features, rows[done : done + len(images)], data)
                yield features
                done += len(images)
                advance(len(images))


def _check_finite(features: dict[str, NDArray[np.float32]], rows: NDArray[np.int64], data: "BaseDataModule") -> None:
    for name, values in features.items():
        wrong = ~np.isfinite(values).all(axis=1)
        if wrong.any():
            row = int(rows[wrong][0])
            raise DataError(
                f"features of {name} are not finite for {data.raw_table.paths[row]} and {int(wrong.sum()) - 1} more "
                f"of {len(rows)} images",
                where=data.raw_table.where(row),
                hint="where all images are hit, the weights are damaged or too large for their architecture",
            )


# Files ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache for one process."""
    elsewhere = "let FARSHOT_CACHE name a folder with room"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("wb")
    except OSError as error:
        problem = f"the cache of features cannot be written: {error.strerror}"
        raise DataError(problem, where=str(folder), hint=elsewhere) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.say("another process extracts these features; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            problem = f"the features do not fit on the disk: {error.strerror}"
            raise DataError(problem, where=str(folder), hint=elsewhere) from error


def _stored(path: Path, count: int) -> NDArray[np.float32] | None:
    """Features as stored, or None where there are none, or not what was written: files are copied and cut short."""
    try:
        values = _open(path)
    except (OSError, ValueError):
        return None
    return values if values.ndim == 2 and len(values) == count and values.dtype == np.float32 else None


def _open(path: Path) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.lib.format.open_memmap(path, mode="r")
    return values


def _replace_files(
    paths: Sequence[Path], write: Callable[[Sequence[Path]], object], temporaries: Sequence[Path] = ()
) -> None:
    """Let one `write` fill a temporary file for each of `paths`; each is complete when it appears."""
    if len(temporaries) == len(paths):
        write(temporaries)
    else:
        path = paths[len(temporaries)]
        replace_file(path, lambda temporary: _replace_files(paths, write, [*temporaries, temporary]))


def _write(paths: dict[str, Path], batches: Iterator[dict[str, NDArray[np.float32]]], count: int) -> None:
    """Write batches to .npy files of `count` rows.

    Not through a memory map: where the disk is full, writing to one ends the process by a signal.
    """
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
        for batch in batches:
            for name, values in batch.items():
                file = files[name]
                if not file.tell():
                    shape = (count, values.shape[1])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    if hasattr(os, "posix_fallocate"):  # so that a full disk is noticed now and not after hours
                        os.posix_fallocate(file.fileno(), 0, file.tell() + 4 * count * values.shape[1])
                file.write(values.astype("<f4", copy=False).data)
