"""check DATA: decode every image of a data set and list the bad files."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from datamodules.atomic import write_text
from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from datamodules.exclusions import exclusion_flow, usable_rows
from studies.data_argument import read_data
from studies.parsing import ReadableParser

CHUNK = 64  # images read by one task of the pool


def run(words: Sequence[str]) -> None:
    """Decode every image; print the counts and write the list of bad files.

    Raises:
        DataError: Some files are missing or cannot be decoded (exit code 2).
    """
    datamodule, options = read_data(words[1:], "check", "Decode every image of a data set.", add_options)
    table = datamodule.read_table()
    left_out = exclusion_flow(datamodule.exclusions(table))
    wanted = np.flatnonzero(usable_rows(table, left_out))
    missing = set(datamodule.missing_files(table, wanted).tolist())
    present = [row for row in wanted.tolist() if row not in missing]
    bad = [f"{table.paths[row]}\tmissing" for row in sorted(missing)]
    bad += decode_all(datamodule, present, options.threads)
    if not bad:
        without = "".join(f"; without {len(step.rows)}: {step.reason}" for step in left_out)
        print(f"{datamodule.name}: all {len(wanted)} images decode{without}")
        return
    write_text(options.output, "\n".join(bad) + "\n")
    raise DataError(
        f"{len(bad)} of {len(wanted)} images of {datamodule.name} are bad, the first is {bad[0].partition(chr(9))[0]}",
        where=str(datamodule.root),
        hint=f"the list is in {options.output}",
    )


def add_options(parser: ReadableParser) -> None:
    """Add where the list goes, and how many images are decoded at a time."""
    parser.add_argument("--output", type=Path, default=Path("bad_files.tsv"), help="List of bad files: path, reason.")
    parser.add_argument("--threads", type=int, default=2, help="Images decoded at a time.")


def decode_all(datamodule: BaseDataModule, rows: Sequence[int], threads: int) -> list[str]:
    """Decode images with a progress bar; returns "path<tab>reason" of those that cannot be."""
    from rich.progress import track

    def decode(part: Sequence[int]) -> list[str]:
        bad = []
        for row in part:
            try:
                datamodule.read_images([row])
            except DataError as error:  # also a wrong bit depth, or several frames
                bad.append(f"{datamodule.read_table().paths[row]}\t{error.problem}")
        return bad

    parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        results = track(pool.map(decode, parts), description=f"decoding {datamodule.name}", total=len(parts))
        return [line for part in results for line in part]
