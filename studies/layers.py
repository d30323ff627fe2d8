"""Layers of configuration: YAML files and inline settings that are laid over each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import DataError, closest


class StudyError(DataError):
    """A study file that cannot be used. Ends the command with exit code 2."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        StudyError: The file is missing, broken (with its line) or no mapping.
    """
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = closest(path.name, siblings)
        raise StudyError(
            f"no file {path}" + (f"; did you mean {path.parent / near}?" if near else ""),
            valid=siblings or None,
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else "?"
        raise StudyError(f"broken YAML: {error.problem}", where=f"{path}, line {line}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} holds no settings", where=str(path), hint="write key: value lines")
    return content


def read_layer(layer: Any, file: Path) -> dict[str, Any]:
    """Resolve a layer: a file, a list of files, or settings, which may name files of layers below them by `config`.

    Paths are relative to `file`.
    """
    if layer is None:
        return {}
    if isinstance(layer, (str, list)):
        layer = {"config": layer}
    if not isinstance(layer, dict):
        raise StudyError(f"a layer should be a file or settings, not {layer!r}", where=str(file))
    names = layer.get("config") or []
    below: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        path = (file.parent / name).resolve()
        below = merge(below, read_layer(read_yaml(_shortest(path)), path))
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


def check_keys(mapping: Any, valid: tuple[str, ...], where: str) -> None:
    """Raise a StudyError that names the first unknown key and the nearest one."""
    if not isinstance(mapping, Mapping):
        raise StudyError(f"expected settings, not {mapping!r}", where=where, valid=valid)
    for key in mapping:
        if key not in valid:
            near = closest(key, valid)
            raise StudyError(
                f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=where,
                valid=valid,
            )
