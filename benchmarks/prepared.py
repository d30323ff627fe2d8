"""Images per second and core from prepared folders, against the usual loaders on the originals; and a large manifest.

    python benchmarks/prepared.py [--photos FOLDER] [--radiographs FOLDER] [--small FOLDER] [--images N] [--rounds N]
                                  [--rows N] [--only PART ...]

Photos: JPEG to a 224 px random resized crop, flip, collate, from shards of 320 px and 256 px, against Pillow and
torchvision v1 in float32 on the originals. Radiographs: 1024 px PNG, from shards of 512 px, against the loader of
Cherti & Jitsev 2022. Small images: one uint8 array against torchvision's ImageFolder. One process and thread,
rounds interleaved. Without folders, images are generated as in `input_pipeline.py`; `--small` is a folder of class
folders. Manifest: opening, finding every path, and what a process and its forked workers hold.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.input_pipeline import (
    Pipeline,
    cherti2022_loader,
    compare,
    paint,
    timm_loader,
    torchvision_float,
    write_radiographs,
)
from datamodules.image_table import ImageTable
from datamodules.io import list_images
from datamodules.prepared import PreparedImages, hash_paths
from datamodules.transforms import create_transform
from studies.encoding import Recipe
from studies.prepare import prepare, rows_to_prepare


class Folder(ImageTable):
    """All images below a folder, whatever its layout; their labels do not matter here."""

    def load_table(self):
        """All images as training images, but for two."""
        from datamodules.table import Table, split_column, strings

        paths = list_images(self.root)
        split = ["train", "validation", "test"] + ["train"] * (len(paths) - 3)
        return Table(strings(paths), np.zeros(len(paths), np.int64), strings(paths), split_column(split))


def prepared_pipeline(images: PreparedImages, rows: dict[str, int], policy: str, size: int, *, train: bool) -> Pipeline:
    """From a prepared folder to a uint8 batch."""
    transform = create_transform(policy, size, train=train)

    def load(paths: Sequence[str]) -> torch.Tensor:
        found = images.read([rows[path] for path in paths], transform.whole)
        return torch.from_numpy(np.stack([transform(image, seed) for seed, image in enumerate(found)]))

    return load


def prepare_folder(root: Path, out: Path, *, mode: str, **recipe) -> tuple[PreparedImages, dict[str, int]]:
    """Prepare the images of a folder; prints the bytes, and gives the row of each path."""
    data = Folder(root=str(root), class_names=["all", "none"], mode=mode)
    done = prepare(data, rows_to_prepare(data), out, Recipe(**recipe))
    images = PreparedImages(out)
    paths = data.raw_table.paths
    kind = "array" if recipe.get("raw") else f"{recipe['short_side']} px"
    print(
        f"{root.name}, {kind}: {done.images} images, {done.before / 1e6:.1f} MB -> {done.after / 1e6:.1f} MB "
        f"({done.after / done.before:.2f}x the bytes), prepared at {done.made / done.seconds:.0f} images/s"
    )
    return images, {str(root / path): row for path, row in zip(paths, images.find(paths).tolist(), strict=True)}


def write_photos(folder: Path, count: int) -> None:
    """Photo-like JPEG of 500 x 375 px; quality 96 is what most of ImageNet has, about 0.5 bytes a pixel."""
    for number in range(count):
        Image.fromarray(paint(375, 500, number)).save(folder / f"{number}.jpg", quality=96)


def photos(scratch: Path, arguments: argparse.Namespace) -> None:
    """Photos from 320 px and 256 px shards, against torchvision and timm on the originals."""
    root = arguments.photos or scratch / "photos"
    if not arguments.photos:
        root.mkdir()
        write_photos(root, arguments.images)
    for side in (320, 256):
        images, rows = prepare_folder(root, scratch / f"photos{side}", mode="rgb", short_side=side)
        mine = prepared_pipeline(images, rows, "inception_crop", 224, train=True)
        title = f"photo -> random crop 224, from {side} px"
        compare(title, torchvision_float(), mine, [*rows], arguments.rounds)
        compare(f"{title}, against timm on the originals", timm_loader(), mine, [*rows], arguments.rounds)


def radiographs(scratch: Path, arguments: argparse.Namespace) -> None:
    """Radiographs from 512 px shards, against the loader of Cherti & Jitsev 2022."""
    root = arguments.radiographs or scratch / "radiographs"
    if not arguments.radiographs:
        root.mkdir()
        write_radiographs(root, max(8, arguments.images // 8))
    images, rows = prepare_folder(root, scratch / "radiographs512", mode="grey", short_side=512)
    mine = prepared_pipeline(images, rows, "chest_xray_cherti2022", 224, train=False)
    compare("radiograph -> 224, from 512 px", cherti2022_loader, mine, [*rows], arguments.rounds)


def small(scratch: Path, arguments: argparse.Namespace) -> None:
    """32 px images: short side to 40 px, random crop of 32 px, flip and collate; and no transform at all."""
    root = arguments.small or scratch / "small"
    if not arguments.small:
        for number in range(1000):
            (root / str(number % 10)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(paint(32, 32, number)).save(root / str(number % 10) / f"{number}.jpg", quality=95)
    images, rows = prepare_folder(root, scratch / "small_array", mode="rgb", short_side=32, raw=True)
    normalise = [tv.ToTensor(), tv.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
    recipes = {
        "read only": (normalise, None),
        "resize 40, random crop 32, flip": (
            [tv.Resize(40), tv.RandomCrop(32), tv.RandomHorizontalFlip(), *normalise],
            "bit",
        ),
    }
    paths = list(rows)[:: max(1, len(rows) // 2000)]
    for name, (steps, policy) in recipes.items():
        theirs = image_folder(root, steps)
        mine = prepared_pipeline(images, rows, policy, 32, train=True) if policy else read_only(images, rows)
        compare(f"32 px, {name}, from the array", theirs, mine, paths, arguments.rounds)


def read_only(images: PreparedImages, rows: dict[str, int]) -> Pipeline:
    """A uint8 batch without any transform."""
    return lambda paths: torch.from_numpy(np.stack(images.read([rows[path] for path in paths])))


def image_folder(root: Path, steps: Sequence[Callable]) -> Pipeline:
    """The ImageFolder of torchvision, and its usual float recipe."""
    dataset = ImageFolder(str(root), tv.Compose(list(steps)))
    places = {path: place for place, (path, _) in enumerate(dataset.samples)}
    return lambda paths: torch.stack([dataset[places[path]][0] for path in paths])


# A large manifest ----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, rows: int) -> None:
    """A manifest of ImageNet-21k's size, its settings, and the tables of images and classes that it belongs to.

    The shards are empty but long enough. The tables are `same.parquet`, in the manifest's order, and
    `shuffled.parquet`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    per_shard, size = 10_000, 20_000
    (folder / "shards").mkdir(parents=True)
    settings = {"release": "imagenet21k", "channels": 3, "window": None, "shape": None, "shards": -(-rows // per_shard)}
    (folder / "settings.json").write_text(json.dumps(settings))
    for number in range(settings["shards"]):
        with (folder / "shards" / f"{number:06d}.tar").open("wb") as file:
            file.truncate(per_shard * (size + 1000))
    writer = None
    for first in range(0, rows, 1 << 20):
        number = np.arange(first, min(first + (1 << 20), rows))
        paths = large_paths(number)
        table = pa.table(
            {
                "key": pc.utf8_lpad(pc.cast(pa.array(number), pa.string()), 9, "0"),
                "shard": pa.array((number // per_shard).astype(np.int32)),
                "offset": pa.array(number % per_shard * (size + 1000) + 512),
                "size": pa.array(np.full(len(number), size, np.int32)),
                "group": paths,
                "split": pa.array(np.full(len(number), "train")).dictionary_encode(),
                "path": paths,
                "checksum": pa.array((number * 2654435761 % (1 << 32)).astype(np.uint32)),
                "path_hash": pa.array(hash_paths(paths.to_numpy(zero_copy_only=False))),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "manifest.parquet", table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()
    paths = large_paths(np.arange(rows))
    for name, order in (("same", np.arange(rows)), ("shuffled", np.random.default_rng(0).permutation(rows))):
        taken = paths.take(pa.array(order))
        table = pa.table({"path": taken, "label": pc.utf8_slice_codeunits(taken, 0, 9)})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=1 << 20)


def large_paths(number: np.ndarray):
    """Paths as ImageNet-21k has them: n01234567/n01234567_123.JPEG; an Arrow array."""
    import pyarrow as pa
    import pyarrow.compute as pc

    classes = pa.array([f"n{place * 691:08d}" for place in range(21_841)]).take(pa.array(number % 21_841))
    stems = pc.binary_join_element_wise(classes, pc.cast(pa.array(number), pa.string()), "_")
    return pc.binary_join_element_wise(classes, pc.binary_join_element_wise(stems, ".JPEG", ""), "/")


def memory_mb(name: str) -> float:
    """A figure of this process's memory, MB: VmRSS, or its peak VmHWM."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1e3


def private_mb() -> float:
    """Memory that only this process holds, MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean"))) / 1e3


def _open_manifest(folder: str, order: str, results) -> None:
    """In a process of its own: read the table, open the manifest, join, draw; fork a worker that reads numbers."""
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    images = PreparedImages(folder)
    opened = time.perf_counter() - start
    del images
    start = time.perf_counter()
    data = ImageTable(
        root=folder,
        table=f"{order}.parquet",
        columns={"path": "path", "label": "label"},
        dataset_name="imagenet21k",
        prepared=folder,
        shots=10,
    )
    data.setup("fit")
    done = time.perf_counter() - start
    rows, peak, held = data.rows("train"), memory_mb("VmHWM"), memory_mb("VmRSS")
    pipe, end = multiprocessing.Pipe()

    def worker() -> None:
        for row in data.prepared_rows[rows[::10]].tolist():
            data.prepared_images.file(row)
        end.send(private_mb())

    child = multiprocessing.get_context("fork").Process(target=worker)
    child.start()
    private = pipe.recv()
    child.join()
    results.send((opened, done, len(rows), before, peak, held, private))


def manifest(scratch: Path, arguments: argparse.Namespace) -> None:
    """Open a manifest of millions of rows, join it with a table and draw 10 shots; each order in its own process."""
    folder = scratch / "manifest"
    write_manifest(folder, arguments.rows)
    size = (folder / "manifest.parquet").stat().st_size / 1e6
    for order in ("same", "shuffled"):
        pipe, end = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=_open_manifest, args=(str(folder), order, end))
        child.start()
        opened, done, drawn, before, peak, held, private = pipe.recv()
        child.join()
        print(
            f"manifest of {arguments.rows:,} rows ({size:.0f} MB): opened in {opened:.1f} s; a table in {order} order "
            f"read, split, joined and {drawn:,} images of 10 shots drawn in {done:.1f} s\n  MB: imports {before:.0f}, "
            f"peak {peak:.0f}, then held {held:.0f}; a forked worker's own {private:.0f}"
        )


PARTS = {"photos": photos, "radiographs": radiographs, "small": small, "manifest": manifest}


def main() -> None:
    """Run the chosen parts in a scratch folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of your own photos")
    parser.add_argument("--radiographs", type=Path, help="folder of your own radiographs")
    parser.add_argument("--small", type=Path, help="class folders of small images of one size")
    parser.add_argument("--images", type=int, default=128, help="generated photos (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--rows", type=int, default=14_000_000, help="rows of the manifest (default 14 million)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as scratch:
        for part in arguments.only:
            PARTS[part](Path(scratch), arguments)


if __name__ == "__main__":
    main()
