"""What a user wrote: options of a command line and keys of config files, each with its file and line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

SUFFIXES = {".yaml", ".yml", ".json"}
Key = tuple[str, ...]


def to_key(dotted: str) -> Key:
    """Split a dotted key into names; `data.init_args.shots` is `data.shots`, and places in lists drop out."""
    return tuple(name.rstrip("+") for name in dotted.split(".") if name != "init_args" and not name.isdigit())


def rows_of(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield (dotted key, text or "" for a mapping or list, line from 1) of everything below a YAML node."""
    children: list[tuple[str, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(name.value), name.start_mark.line, child) for name, child in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(place), child.start_mark.line, child) for place, child in enumerate(node.value)]
    for name, line, child in children:
        dotted = f"{prefix}.{name}" if prefix else name
        yield dotted, str(child.value) if isinstance(child, yaml.ScalarNode) else "", line + 1
        yield from rows_of(child, dotted)


def find_line(yaml_text: str, dotted_key: str) -> int | None:
    """Return the line (from 1) of a key in a YAML text; None where it is absent or the text is broken."""
    try:
        rows = list(rows_of(yaml.compose(yaml_text, yaml.SafeLoader)))
    except yaml.YAMLError:
        return None
    return next((line for dotted, _, line in rows if to_key(dotted) == to_key(dotted_key)), None)


class Entry(NamedTuple):
    """A key that the user wrote, its text ("" for a mapping or list), and its file (None: command line)."""

    dotted: str
    value: str
    file: Path | None = None
    line: int = 0

    def __str__(self) -> str:
        if self.file is None:
            return f"command line, --{self.dotted} {self.value}".rstrip()
        return f"{self.file}, line {self.line}, key {self.dotted}"


def options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (option, value) of a command line; the value is "" where there is none."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        if arg.startswith("-"):
            option, equals, value = arg.partition("=")
            yield option, value if equals or following.startswith("--") else following


class Given:
    """All that the user wrote, in order: options, config files and the files that these name by a path."""

    def __init__(self, args: Sequence[str]) -> None:
        self.args = list(args)
        self.entries: list[Entry] = []
        self.broken: list[tuple[Path, Exception]] = []
        self.empty: list[str] = []
        self.configs: list[str] = []
        for option, value in options(args):
            if option in ("-c", "--config"):
                self.configs.append(value)
                self._read(Path(value), "")
            else:
                self._add(Entry(option.lstrip("-"), value), Path())

    def _add(self, entry: Entry, folder: Path) -> None:
        self.entries.append(entry)
        if Path(entry.value).suffix in SUFFIXES:
            self._read(folder / entry.value, "" if entry.dotted == "config" else entry.dotted)

    def _read(self, file: Path, prefix: str) -> None:
        if not file.is_file() or any(entry.file == file for entry in self.entries):
            return
        try:
            node = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.broken.append((file, error))
            return
        entries = [Entry(dotted, value, file, line) for dotted, value, line in rows_of(node, prefix)]
        if not isinstance(node, yaml.MappingNode) or not any(entry.value for entry in entries):
            self.empty.append(str(file))
        for entry in entries:
            self._add(entry, file.parent)

    def find(self, key: Key, value: str | None = None) -> Entry | None:
        """Return the last entry of a key or of its class_path, preferring one that has this value."""
        named = [entry for entry in self.entries if not entry.dotted.endswith("init_args")]
        found = [entry for entry in named if to_key(entry.dotted) in (key, (*key, "class_path"))]
        exact = [entry for entry in found if entry.value == value]
        return (exact or found)[-1] if found else None

    def beside_class_path(self, key: Key) -> Entry | None:
        """Return an entry that stands beside class_path or misspells it, where only init_args may stand."""
        for entry in self.entries:
            parent, _, name = entry.dotted.rpartition(".")
            inside = parent and to_key(parent) == key and not parent.endswith(("init_args", "dict_kwargs"))
            if entry.file and inside and name not in ("class_path", "init_args", "dict_kwargs"):
                return None if name.isdigit() else entry
        return None
