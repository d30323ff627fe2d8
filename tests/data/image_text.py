"""Shards of image–text pairs as img2dataset writes them, and Parquet files that hold images, tiny but real."""

import hashlib
import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules import shards


def jpeg(seed):
    image = np.random.default_rng(seed).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def samples(count, first=0):
    """Dictionaries key, jpg, txt and what the JSON member and the Parquet file beside the shard say."""
    found = []
    for number in range(first, first + count):
        image = jpeg(number)
        meta = {"key": f"{number:09d}", "url": f"https://x/{number}.jpg", "caption": f"caption of {number}"}
        meta |= {"status": "success", "sha256": hashlib.sha256(image).hexdigest(), "similarity": number / 1000}
        found.append({"jpg": image, "txt": meta["caption"].encode(), "meta": meta})
    return found


def write_tar(path, pairs, beside=True, with_json=True):
    """Write one shard; a sample's jpg or txt that is None is left out, as are failed downloads."""
    members = []
    for pair in pairs:
        key = pair["meta"]["key"]
        parts = {"jpg": pair["jpg"], "txt": pair["txt"]}
        if with_json:
            parts["json"] = pair.get("json", json.dumps(pair["meta"], indent=4).encode())
        members += [(f"{key}.{extension}", content) for extension, content in parts.items() if content is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    shards.write_shard(path, members)
    if beside:
        failed = {**pairs[0]["meta"], "key": "999999999", "status": "failed_to_download", "sha256": None}
        table = pa.Table.from_pylist([failed, *(pair["meta"] for pair in pairs)])  # listed, though not in the shard
        pq.write_table(table, path.with_suffix(".parquet"))


def write_parquet(path, pairs, layout="binary", rows=7):
    """Write images and captions as rows, a few in a row group."""
    images = [pair["jpg"] for pair in pairs]
    meta = {name: [pair["meta"][name] for pair in pairs] for name in ("caption", "similarity", "sha256")}
    column = pa.array(images, pa.binary())
    if layout == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": image, "path": "x.jpg"} for image in images], kind)
    name = "image" if layout == "struct" else "jpg"
    pq.write_table(pa.table({**meta, name: column}), path, row_group_size=rows)


def create(root, shard_count=2, count=60):
    """A whole set in img2dataset's layout."""
    for shard in range(shard_count):
        write_tar(root / f"{shard:05d}.tar", samples(count, first=shard * count))
