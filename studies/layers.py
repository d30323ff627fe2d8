"""Layers of configuration: YAML files and inline settings that are laid over each other."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import DataError, closest
from studies.given import rows_of

VARY, BY_ARCHITECTURE = "vary", "by_architecture"


class StudyError(DataError):
    """A study file that cannot be used. Ends the command with exit code 2."""


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and the command line do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Place:
    """A key of a file, for messages: its line is looked up when it is shown.

    Attributes:
        file: The file.
        keys: Names and places in lists from its top.
    """

    file: Path
    keys: tuple[str, ...] = ()

    def at(self, *keys: object) -> "Place":
        """A place below."""
        return Place(self.file, (*self.keys, *map(str, keys)))

    def __str__(self) -> str:
        try:
            rows = rows_of(yaml.compose(self.file.read_text(encoding="utf-8"), yaml.SafeLoader))
            lines = {dotted: line for dotted, _, line in reversed(list(rows))}
        except (OSError, ValueError, yaml.YAMLError):
            lines = {}
        above = (".".join(self.keys[:size]) for size in range(len(self.keys), 0, -1))
        line = next((f"line {lines[dotted]}" for dotted in above if dotted in lines), "")
        return ", ".join(filter(None, [str(self.file), line, ".".join(self.keys)]))


def read_yaml(path: Path, where: str | None = None) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        path: The file.
        where: Who names it, for the message where it is missing.

    Raises:
        StudyError: The file is missing, broken or holds a key twice (with its line), or no mapping.
    """
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = closest(path.name, siblings)
        raise StudyError(
            f"no file {path}" + (f"; did you mean {path.parent / near}?" if near else ""),
            where=where,
            valid=sorted(siblings) or None,
        )
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _refuse_twins(node, path)
        content = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else "?"
        raise StudyError(f"broken YAML: {error.problem}", where=f"{path}, line {line}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"cannot read {path}: {' '.join(str(error).split())}", where=where or str(path)) from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} holds no settings", where=str(path), hint="write key: value lines")
    return content


def _refuse_twins(root: yaml.Node | None, path: Path) -> None:
    """Raise a StudyError where a mapping names a key twice: YAML would let the last one win without a word."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias is the node of its anchor
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                waiting.append(value)
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines and name != "<<":
                    first = f"the first is in line {lines[name]}; keep one of them"
                    raise StudyError(f"{name!r} stands twice", where=f"{path}, line {line}", hint=first)
                lines[name] = line


def read_layer(layer: Any, file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Resolve a layer: a file, a list of files, or settings, which may name files of layers below them by `config`.

    Args:
        layer: The layer.
        file: What its paths are relative to.
        above: Files that led here.

    Raises:
        StudyError: A file is missing or broken, files name each other in a circle, or it is no layer.
    """
    if layer is None:
        return {}
    if isinstance(layer, (str, list)):
        layer = {"config": layer}
    if not isinstance(layer, dict):
        raise StudyError(f"a layer should be a file or settings, not {layer!r}", where=str(file))
    names = layer.get("config") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StudyError(f"config should be a file or a list of files, not {names!r}", where=str(file))
    below: dict[str, Any] = {}
    for name in names:
        path = (file.parent / name).resolve()
        if path in above:
            raise StudyError(f"{_shortest(path)} names itself by config", where=str(file))
        below = merge(below, read_layer(read_yaml(_shortest(path), str(file)), path, (*above, path)))
    return merge(below, {key: value for key, value in layer.items() if key != "config"})


def _shortest(path: Path) -> Path:
    """The path as a person would write it: relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay configurations over each other; another `class_path` starts its `init_args` anew."""
    result: dict[str, Any] = {}
    for layer in layers:
        if "class_path" in layer and layer["class_path"] != result.get("class_path", layer["class_path"]):
            result.pop("init_args", None)
        for key, value in layer.items():
            below = result.get(key)
            result[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """Turn "a.b.c" and a value into {"a": {"b": {"c": value}}}."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return dict(value)


def split_layer(layer: Any) -> tuple[dict[str, Any], Any]:
    """Part a named layer from what is said of it: its variants, and settings for single architectures."""
    if not isinstance(layer, Mapping):
        return {}, layer
    special = {key: layer[key] for key in (VARY, BY_ARCHITECTURE) if key in layer}
    return special, {key: value for key, value in layer.items() if key not in special}


def vary_layers(
    vary: Any, where: Place, shown_elsewhere: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (label, label without values that other columns show, settings) for the product of dotted settings.

    Args:
        vary: Mapping from a dotted setting, "data.init_args.fraction", to its values; None for a single bare layer.
        where: The spot in messages.
        shown_elsewhere: Dotted settings that result rows have columns for.

    Raises:
        StudyError: It is no such mapping, or a value stands twice.
    """
    varied = {} if vary is None else read_grid(vary, where, "vary", "vary: {data.init_args.fraction: [0.1, 1.0]}")
    for values in product(*varied.values()):
        pairs = list(zip(varied, values, strict=True))
        label, column = (
            ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen)
            for chosen in (pairs, [pair for pair in pairs if pair[0] not in shown_elsewhere])
        )
        layer = merge(*(nest(key, value) for key, value in pairs))
        yield f" ({label})" if label else "", f" ({column})" if column else "", layer


def read_grid(value: Any, where: Place, name: str, example: str) -> dict[str, list[Any]]:
    """Read a mapping from dotted settings to the values that they take.

    Raises:
        StudyError: It is no such mapping, a list is empty, or a value stands twice.
    """
    lists = isinstance(value, Mapping) and all(isinstance(v, list) and v for v in value.values())
    if not lists or not all(isinstance(key, str) for key in value):
        raise StudyError(
            f"{name} should map settings to lists of values, not {value!r}", where=str(where), valid=example
        )
    for key, values in value.items():
        refuse_repeats(values, where.at(key), key)
    return {key: list(values) for key, values in value.items()}


def refuse_repeats(values: list[Any], where: Place, name: str) -> None:
    """Raise a StudyError that names the first value that stands twice: it would count as two."""
    for index, value in enumerate(values):
        if any(other == value and isinstance(other, bool) == isinstance(value, bool) for other in values[:index]):
            raise StudyError(f"{name}: {value!r} stands twice", where=str(where))


def check_keys(mapping: Any, valid: tuple[str, ...], where: str | Place) -> None:
    """Raise a StudyError that names the first unknown key and the nearest one."""
    if not isinstance(mapping, Mapping):
        raise StudyError(f"expected settings, not {mapping!r}", where=str(where), valid=valid)
    for key in mapping:
        if key not in valid:
            near = closest(key, valid)
            raise StudyError(
                f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=str(where.at(key) if isinstance(where, Place) else where),
                valid=valid,
            )
