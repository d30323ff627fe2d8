"""prepare DATA: decode, shrink and store a data set's images once, so that training reads small JPEG from shards."""

from collections.abc import Sequence
from pathlib import Path

from datamodules.errors import DataError
from studies.data_argument import read_data
from studies.display import say
from studies.encoding import Recipe
from studies.fingerprints import progress_bar
from studies.parsing import ReadableParser
from studies.prepare import prepare, rows_to_prepare, verify
from studies.processes import usable_cores


def run(words: Sequence[str]) -> None:
    """Prepare a data set and print what came of it.

    Raises:
        DataError: Images are missing or unreadable, or the folder was prepared with other settings (exit code 2).
    """
    text = "Decode, shrink and store the images of a data set once; --data.prepared FOLDER then reads them from there."
    datamodule, options = read_data(words[1:], "prepare", text, add_options)
    if options.workers < 1:
        raise DataError(f"workers: {options.workers} is out of range", where="--workers", valid="1 or more")
    recipe = Recipe(options.short_side, options.quality, options.raw, options.shard_mb)
    rows = rows_to_prepare(datamodule)
    with progress_bar(f"preparing {datamodule.name}", len(rows), shown=True) as advance:
        done = prepare(
            datamodule,
            rows,
            options.output,
            recipe,
            workers=options.workers,
            skip_unreadable=options.skip_unreadable,
            advance=advance,
            report=say,
        )
    speed = f"{done.made / done.seconds:.0f} images/s" if done.made else "it was finished already"
    left_out = f", {done.unreadable} unreadable images left out" if done.unreadable else ""
    say(
        f"{options.output}: {done.images} images of {datamodule.name}, {done.before / 1e6:.1f} MB -> "
        f"{done.after / 1e6:.1f} MB ({done.after / max(done.before, 1):.2f}x){left_out}; {speed}"
    )
    if options.verify:
        with progress_bar("verifying", done.images, shown=True) as advance:
            count = verify(options.output, workers=options.workers, advance=advance)
        say(f"{options.output}: the checksums of all {count} images are right")


def add_options(parser: ReadableParser) -> None:
    """Add where the images go and how they are stored."""
    parser.add_argument("--output", type=Path, required=True, help="Folder of the prepared images.")
    parser.add_argument("--short-side", type=int, default=320, help="Larger images shrink to this short side, pixels.")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality, 1-100.")
    parser.add_argument("--raw", type=bool, default=False, help="One uint8 array, for small images of one shape.")
    parser.add_argument("--shard-mb", type=float, default=256, help="Size of a shard, about, MB.")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="Processes that decode and encode.")
    parser.add_argument(
        "--skip-unreadable", type=bool, default=False, help="Leave unreadable images out, named in the settings."
    )
    parser.add_argument("--verify", type=bool, default=False, help="Read everything again and compare the checksums.")
