"""Features of a data set under frozen weights: extracted once, kept on disk, read by any number of processes.

Where they are kept and for how long: `studies.feature_cache`. What tells that they are the ones: `studies.feature_key`.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from studies import feature_cache
from studies.feature_key import feature_key, net_hash
from studies.fingerprints import progress_bar

if TYPE_CHECKING:
    import torch

    from datamodules.base import BaseDataModule
    from lightning_modules.classification import Classification

RANDOM_SEED = 0  # of the initialisation without weights
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
    on = choose_device(device)
    feature_cache.limit_bytes()  # now, and not after hours
    folder = feature_cache.folder_of(feature_key(net, data, rows))
    stored = feature_cache.read_features(folder, reader.groups, len(rows))
    if len(stored) < len(reader.groups):
        with feature_cache.locked(folder):
            stored = feature_cache.read_features(folder, reader.groups, len(rows))
            lacking = [name for name in reader.groups if name not in stored]
            if lacking:  # not where another process has been faster
                batches = _read_batches(_to_device(net, on), lacking, data, rows, batch_size, num_workers)
                feature_cache.write_features(folder, lacking, batches, len(rows))
                stored |= feature_cache.read_features(folder, lacking, len(rows))
                feature_cache.prune(keep=folder)
    feature_cache.mark_used(folder)
    labels = data.read_table().labels[rows]
    return {
        name: FeatureSet(name, reader.depths[name], net.backbone_name, source_hash, stored[name], rows, labels)
        for name in reader.groups
    }


def choose_device(device: str | None) -> "torch.device":
    """Device of a name; None = the GPU if there is one.

    Raises:
        DataError: There is no such device.
    """
    import torch

    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise DataError(f"there is no device {device!r}", where="device", valid=found) from error
    return chosen


# The net -------------------------------------------------------------------------------------------------------------


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
    return net, weights_hash(loaded) if loaded is not None else net_hash(net)


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


def _to_device(net: "Classification", device: "torch.device") -> "Classification":
    """Move a net, its kernels channels-last: 1.0 to 1.8 times as fast on a CPU (test_resnet at 32 px the most)."""
    import torch

    net.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.to(device)


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
    data.max_batch_per_device = batch_size
    data.num_workers = data.num_workers if num_workers is None else num_workers
    done = 0
    with progress_bar(f"features of {data.name}", len(rows), shown=len(rows) >= SHOWN_FROM) as advance:
        for batch in data.evaluation_dataloader(rows):
            normalised = net.normalise(batch["image"].to(net.device, non_blocking=True))
            tensors = reader(normalised.contiguous(memory_format=torch.channels_last))
            features = {name: np.ascontiguousarray(values.cpu().numpy()) for name, values in tensors.items()}
            _check_finite(features, rows[done : done + len(normalised)], data)
            yield features
            done += len(normalised)
            advance(len(normalised))


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
