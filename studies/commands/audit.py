"""audit A [B]: what would make results on a data set doubtful, alone or beside another one."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import DataError
from studies import display

if TYPE_CHECKING:
    from datamodules.base import BaseDataModule


def run(words: Sequence[str]) -> None:
    """Print a line for each finding, and write the report with its tables. Findings are no error."""
    words, settings = split_words(words[1:])
    options = _parser().parse_args(words)
    # Only now: --help and mistakes in the options need none of the heavy packages.
    from studies.audit import run_audit
    from studies.audit_report import summarise, write_audit

    a = _build(options.a, settings["a"], "a")
    b = _build(options.b, settings["b"], "b") if options.b else None
    folder = options.output or Path("audit") / (a.name if b is None else f"{a.name}_{b.name}")
    audit = run_audit(a, b, images=options.images, probe=options.probe, seed=options.seed)
    report = write_audit(audit, folder)
    for finding in summarise(audit):
        display.say(f"{'FLAGGED' if finding.flagged else '       '}  {finding.text}")
    for note in audit.notes:
        display.say(f"note     {note}")
    display.say(f"report:  {report}")


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take `--a.NAME VALUE` and `--b.NAME VALUE` out of the words: (the others, the `--data.NAME VALUE` of each)."""
    rest: list[str] = []
    settings: dict[str, list[str]] = {"a": [], "b": []}
    owner: list[str] | None = None
    for word in words:
        side = word[2:3] if word[:4] in ("--a.", "--b.") else ""
        if side:
            settings[side].append(f"--data.{word[4:]}")
            owner = None if "=" in word else settings[side]
        elif owner is not None:
            owner.append(word)
            owner = None
        else:
            rest.append(word)
    return rest, settings


def _build(word: str, settings: Sequence[str], side: str) -> "BaseDataModule":
    from studies.data_argument import build_data

    try:
        datamodule = build_data(word, settings, "audit")
        datamodule.read_table()  # errors of the data set's files name its settings, too
    except DataError as error:  # the user writes --a.root, not --data.root
        raise DataError(re.sub(r"--data\.(?!help)", f"--{side}.", str(error))) from error
    return datamodule


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py audit",
        description="Find copies, shared patients, and labels that go with where an image comes from: in one data set "
        "across its splits, or between two.",
        epilog="Settings of the sets: --a.NAME VALUE and --b.NAME VALUE, such as --a.root FOLDER.",
    )
    parser.add_argument("a", metavar="A", help="data set: a class name, or a YAML file with a data section")
    parser.add_argument("b", metavar="B", nargs="?", help="another one, such as the target of a transfer from A")
    parser.add_argument("--images", type=_count, help="compare the pictures of this many images of each set (all)")
    parser.add_argument("--probe", type=_count, default=1000, help="images of a guess-the-source probe; 0: none (1000)")
    parser.add_argument("--seed", type=_count, default=0, help="seed of these draws (0)")
    parser.add_argument("--output", type=Path, help="folder of the report (audit/A or audit/A_B)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: 0 or more")
    return value
