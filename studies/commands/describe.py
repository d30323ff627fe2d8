"""describe DATA: table 1 of a paper and the exclusion flow, from the metadata alone."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from datamodules.atomic import write_text
from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from studies import description, display
from studies.data_argument import read_data
from studies.parsing import ReadableParser
from studies.tables import to_latex

WIDTH = 100  # letters of a line: the tables are made for it, whatever the terminal


def run(words: Sequence[str]) -> None:
    """Print table 1 and the exclusion flow; with --output also write them and the counts of every label.

    Raises:
        DataError: The data set cannot be read or the folder cannot be made (exit code 2).
    """
    purpose = "Table 1 of a paper and the exclusion flow, from the metadata: images need not be there."
    datamodule, options = read_data(words[1:], "describe", purpose, add_options)
    if options.output is not None:
        make_folder(options.output)
    table = datamodule.read_table()
    usage = description.find_usage(datamodule)
    first = description.table_one(table, usage.rows, datamodule.class_names)
    flow = description.exclusion_frame(table, usage, drawn(datamodule))
    counts = description.label_counts(table, usage.rows, datamodule.class_names)
    policies = policies_of(datamodule, usage)
    for line in [place_of(datamodule), *policies, *warnings_of(datamodule, usage)]:
        display.say(line)
    show("Table 1", description.outline(first))
    show("Exclusion flow", with_commas(flow))
    if options.counts:
        blank = [name for name in ("view", "source") if not counts[name].any()]
        show("Effective counts", with_commas(counts.drop(columns=blank)), texts=4 - len(blank))
    if options.output is not None:
        caption = f"{datamodule.name}: the images in use; {'; '.join(policies)}."
        files = {
            "table1.csv": first.to_csv(),
            "table1.tex": to_latex(description.outline(first), caption),
            "flow.csv": flow.to_csv(index=False),
            "flow.tex": to_latex(with_commas(flow), f"{datamodule.name}: from the release to the images in use."),
            "label_counts.csv": counts.to_csv(index=False),
        }
        for name, text in files.items():
            write_text(options.output / name, text)
        display.say(f"written to {options.output}: {', '.join(files)}")


def add_options(parser: ReadableParser) -> None:
    """Add the folder of the files, and whether to print the counts."""
    parser.add_argument("--output", type=Path | None, default=None, help="Folder for CSV and LaTeX files.")
    parser.add_argument("--counts", type=bool, default=False, help="Print the counts per label, split, view, source.")


def make_folder(folder: Path) -> None:
    """Make the output folder.

    Raises:
        DataError: It cannot be made, or a file has its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"no folder {folder}: {error.strerror}", where="--output", valid="a folder") from error


def place_of(datamodule: BaseDataModule) -> str:
    """Name, size and files of the data set."""
    table = datamodule.read_table()
    files = list(dict.fromkeys(str(origin.path) for origin in table.origins)) or [str(datamodule.root)]
    more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
    return f"{datamodule.name}: {len(table):,} rows of {', '.join(files[:3])}{more}"


def policies_of(datamodule: BaseDataModule, usage: description.Usage) -> list[str]:
    """What the numbers depend on and a caption has to say: split, labels, draw, leaks."""
    lines = [f"split: {datamodule.split_policy}"]
    if datamodule.label_policy:
        lines.append(f"labels: {datamodule.label_policy}")
    if drawn(datamodule):
        lines.append(f"training images drawn: {drawn(datamodule)}")
    if usage.leaking:
        lines.append(f"LEAK: patients with images in several splits: {usage.leaking:,}")
    return lines


def warnings_of(datamodule: BaseDataModule, usage: description.Usage) -> list[str]:
    """What a description passes over and a run stops at."""
    lines = []
    by_choice = datamodule.leaky_rows(datamodule.raw_table).any()
    if usage.leaking and datamodule.leaks == "stop" and not by_choice:
        lines.append("a run stops at patients in several splits; --data.leaks record marks its results instead")
    if len(usage.missing):
        lines.append(
            f"{len(usage.missing):,} usable images have no file; a run stops there; --data.missing_images drop leaves "
            "them out"
        )
    return lines


def drawn(datamodule: BaseDataModule) -> str:
    """The few-shot settings in words, "" where all training images are used."""
    settings = {name: getattr(datamodule, name) for name in ("shots", "num_images", "fraction")}
    given = [f"{name} {value}" for name, value in settings.items() if value not in (None, "full")]
    return ", ".join([*given, f"seed {datamodule.few_shot_seed}"]) if given else ""


def with_commas(frame: pd.DataFrame) -> pd.DataFrame:
    """Turn whole numbers into text: 112,120."""
    return frame.map(lambda value: value if isinstance(value, str) else f"{value:,}")


def show(title: str, frame: pd.DataFrame, texts: int = 1) -> None:
    """Print a frame of text; the first `texts` columns are words, the others numbers."""
    grid = TextTable(title=f"\n{title}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for place, name in enumerate(frame.columns):
        left = place < texts
        grid.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for cells in frame.itertuples(index=False):
        grid.add_row(*(Text(cell) for cell in cells))
    Console(width=WIDTH, highlight=False).print(grid)
