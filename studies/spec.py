"""A study as data: a YAML file of named parts and blocks becomes cells with stable names.

    name: quickstart
    config: ../trainer/cpu.yaml          layers of every cell: files (relative to this one) or inline settings
    architectures: {small: {...}}        named layers; so are sources, targets and protocols
    sources: {scratch: null, near: {...}}
    targets: {far: {...}}
    protocols: {finetune: {...}}
    blocks:                              each block is the product of its lists
      - {sources: [scratch, near], architectures: [small], targets: [far], protocols: [finetune],
         shots: [1, 5, full], seeds: [0, 1, 2], config: {...}}

A layer is a mapping like any configuration, and may name files of further layers below it by `config`. No import of
torch: status and listing answer at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from datamodules.errors import DataError, closest
from studies.runs import hash_of, identity

PARTS = ("architectures", "sources", "targets", "protocols")
BUDGETS = ("shots", "num_images", "fraction")
KEYS = ("name", "config", "title", "keep", "metrics", *PARTS, "blocks")
BLOCK_KEYS = (*PARTS, *BUDGETS, "seeds", "pretrain_seeds", "config")
SCRATCH = "scratch"


class StudyError(DataError):
    """A study file that cannot be used. Ends the command with exit code 2."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: Readable, unique, and with a hash of all that decides the result: the run folder's name.
        kind: pretrain or transfer.
        config: The run's configuration; a transfer's weights are filled in from `needs` when it runs.
        columns: Result-row columns that the study decides.
        needs: Name of the pre-training cell whose weights it starts from, or None.
    """

    name: str
    kind: Literal["pretrain", "transfer"]
    config: dict[str, Any]
    columns: dict[str, Any]
    needs: str | None = None


@dataclass(frozen=True)
class Study:
    """A study file, read and checked.

    Attributes:
        name: Folder of its runs.
        path: The file.
        cells: Pre-training cells first, each once, then the transfers.
        title: Heading of the report.
        keep: Which checkpoints of transfer cells stay.
        metrics: Target → headline metric of the report, where the usual one is not wanted.
    """

    name: str
    path: Path
    cells: tuple[Cell, ...]
    title: str
    keep: Literal["none", "last"] = "none"
    metrics: dict[str, str] = field(default_factory=dict)


@dataclass
class _Reader:
    """Reads one study file; `where` names the spot in messages."""

    path: Path
    spec: dict[str, Any]
    cells: dict[str, Cell] = field(default_factory=dict)

    def layer(self, part: str, name: str) -> dict[str, Any]:
        parts = self.spec.get(part) or {}
        if name not in parts:
            near = closest(name, parts)
            raise StudyError(
                f"{part} has no {name!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=f"{self.path}, blocks",
                valid=list(parts),
            )
        return read_layer(parts[name], self.path)

    def values(self, block: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
        value = block.get(key, default)
        if not isinstance(value, list) or not value:
            raise StudyError(f"{key} should be a list that is not empty, not {value!r}", where=f"{self.path}, blocks")
        return value

    def block(self, block: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Cell]:
        check_keys(block, BLOCK_KEYS, f"{self.path}, blocks")
        budgets = [key for key in BUDGETS if key in block]
        if len(budgets) != 1:
            raise StudyError(
                f"a block needs exactly one of {', '.join(BUDGETS)}, not {budgets or 'none'}",
                where=f"{self.path}, blocks",
            )
        own = read_layer(block.get("config"), self.path)
        axes = [self.values(block, part) for part in PARTS]
        seeds, pretrain_seeds = self.values(block, "seeds", [0]), self.values(block, "pretrain_seeds", [0])
        for architecture, source, target, protocol in product(*axes):
            common = merge(base, self.layer("architectures", architecture))
            transfer = merge(common, self.layer("protocols", protocol), self.layer("targets", target), own)
            for pretrain_seed in pretrain_seeds if source != SCRATCH else [None]:
                weights = self.pretrain(common, architecture, source, pretrain_seed)
                for value, seed in product(self.values(block, budgets[0]), seeds):
                    yield self.transfer(
                        transfer,
                        weights,
                        {
                            "architecture": architecture,
                            "source": source,
                            "target": target,
                            "protocol": protocol,
                        }
                        | {
                            "pretrain_seed": pretrain_seed,
                            budgets[0]: str(value) if budgets[0] == "shots" else value,
                        },
                        budget=(budgets[0], value),
                        seed=seed,
                    )

    def pretrain(self, common: Mapping[str, Any], architecture: str, source: str, seed: int | None) -> Cell | None:
        if source == SCRATCH:
            return None
        config = merge(common, self.layer("sources", source), {"seed_everything": seed})
        name = f"pretrain-{source}-{architecture}-p{seed}-{hash_of(identity(config))[:8]}"
        if name not in self.cells:
            columns = {"study": self.spec["name"], "cell": name, "source": SCRATCH, "target": source}
            self.cells[name] = Cell(name, "pretrain", config, columns | {"protocol": "pretrain"})
        return self.cells[name]

    def transfer(
        self,
        layers: Mapping[str, Any],
        weights: Cell | None,
        columns: dict[str, Any],
        *,
        budget: tuple[str, Any],
        seed: int,
    ) -> Cell:
        draw = {budget[0]: budget[1], "few_shot_seed": seed}
        config = merge(layers, {"seed_everything": seed, "data": {"init_args": draw}})
        if weights is None:  # from scratch there is nothing to transfer or freeze
            bare = {"weights": None, "transfer_depth": None, "frozen_depth": 0}
            config = merge(config, {"model": {"init_args": bare}})
        decides = identity(config, weights.name if weights is not None else None)
        words = [columns["target"], "from", columns["source"], columns["architecture"], columns["protocol"]]
        name = "-".join([*words, f"{budget[0]}{budget[1]}", f"s{seed}", hash_of(decides)[:8]])
        columns = {"study": self.spec["name"], "cell": name, **columns, "seed": seed}
        return Cell(name, "transfer", config, columns, needs=weights.name if weights is not None else None)


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        StudyError: Missing or broken file, unknown key or name, empty list.
    """
    spec = read_yaml(path)
    check_keys(spec, KEYS, str(path))
    for key in ("name", *PARTS, "blocks"):
        if not spec.get(key):
            raise StudyError(f"the study lacks {key}", where=str(path), valid=KEYS)
    reader = _Reader(path, spec)
    base = read_layer(spec.get("config"), path)
    for block in spec["blocks"]:
        for cell in reader.block(block, base):
            reader.cells.setdefault(cell.name, cell)
    cells = sorted(reader.cells.values(), key=lambda cell: cell.kind != "pretrain")
    title, keep = str(spec.get("title", spec["name"])), spec.get("keep", "none")
    if keep not in ("none", "last"):
        raise StudyError(f"keep: {keep!r}", where=str(path), valid=["none", "last"])
    return Study(str(spec["name"]), path, tuple(cells), title, keep, dict(spec.get("metrics") or {}))


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
