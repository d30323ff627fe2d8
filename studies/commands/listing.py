"""list datasets|models: read from the sources' text, so that neither torch nor Lightning is imported."""

import ast
from collections.abc import Sequence
from pathlib import Path

import datamodules
from datamodules.errors import DataError, closest
from lightning_modules.backbones.catalogue import CATALOGUE

PACKAGE = Path(datamodules.__file__).parent


def run(words: Sequence[str]) -> None:
    """Print the data sets or the tested backbones; of one data set its data card.

    Raises:
        DataError: Another word than datasets or models, or a data set that does not exist.
    """
    kinds = {"datasets": list_datasets, "models": list_models}
    what = words[1] if len(words) > 1 else ""
    if what in ("-h", "--help"):
        print("usage: python cli.py list datasets [NAME]|models")
        return
    if what == "datasets" and len(words) > 2:
        print(data_card(words[2]))
        return
    if what not in kinds:
        near = closest(what, kinds)
        problem = f"cannot list {what!r}" if what else "list needs to know what"
        raise DataError(problem + (f"; did you mean {near!r}?" if near else ""), valid=list(kinds))
    for line in kinds[what]():
        print(line)


def list_datasets() -> list[str]:
    """One line a data set: its class and the first sentence of its data card."""
    lines = [f"{name:22} {data_card(name).splitlines()[0]}" for name in _datasets()]
    return [
        *lines,
        "",
        "source, licence, layout of one: python cli.py list datasets NAME",
        "arguments of one:               python cli.py fit --data.help NAME",
    ]


def data_card(name: str) -> str:
    """What a data set is, where it comes from, who may use it, and how its files lie: the class's documentation.

    Raises:
        DataError: There is no such data set.
    """
    if name not in _datasets():
        near = closest(name, _datasets())
        raise DataError(f"no data set {name!r}" + (f"; did you mean {near!r}?" if near else ""), valid=_datasets())
    module = PACKAGE / (datamodules.module_of(name).replace(".", "/") + ".py")
    tree = ast.parse(module.read_text())
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return ast.get_docstring(node) or ""


def _datasets() -> list[str]:
    return [name for name in datamodules.__all__ if name != "BaseDataModule"]


def list_models() -> list[str]:
    """One line a tested backbone; any other timm name works too."""
    lines = [f"{entry.name:24} {entry.parameters:7.1f} M  {entry.input_size:3d} px  {entry.use}" for entry in CATALOGUE]
    return [
        *lines,
        "",
        "any other timm model works by its name; a trailing tag such as .goog_in21k names weights",
    ]
