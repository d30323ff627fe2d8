"""Blocks of a study become cells: the product of their axes, each weights once, trials before what they choose."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from datamodules.errors import closest
from studies.cells import SCRATCH, Cell
from studies.layers import StudyError, check_keys, merge, nest, read_layer
from studies.runs import hash_of, identity
from studies.tuning import Candidate, Tuning, read_tuning

PARTS = ("architectures", "sources", "targets", "protocols")
BUDGETS = ("shots", "num_images", "fraction")
BLOCK_KEYS = (
    *PARTS, "weights", "depths", *BUDGETS, "seeds", "pretrain_seeds", "folds", "vary", "tune", "config",
)  # fmt: skip
DIALS = tuple(
    f"data.init_args.{name}"
    for name in ("fraction", "num_images", "few_shot_seed", "num_classes_kept", "label_noise", "curation")
)
"""Settings of a source that result rows show in columns of their own (source_n, source_dials)."""
VARY, BY_ARCHITECTURE = "vary", "by_architecture"
WORD = "-"  # joins the words of a cell's name


@dataclass(frozen=True)
class Variant:
    """A named layer, or one combination of what it varies.

    Attributes:
        label: Its name, with the values that it stands for: "near (fraction=0.1)".
        column: What result rows call it: without values that other columns show.
        layer: Its settings.
        by_architecture: Further settings of a source for the architectures named.
    """

    label: str
    column: str
    layer: dict[str, Any]
    by_architecture: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """Where a transfer starts from: nothing, the weights of another cell, or given weights.

    Attributes:
        source: What result rows call it; None: the run itself finds out.
        words: What a cell's name calls it.
        seed: Seed of its pre-training.
        cell: The pre-training cell, or None.
        weights: Given weights, or None.
    """

    source: str | None
    words: str
    seed: int | None = None
    cell: Cell | None = None
    weights: str | None = None


@dataclass
class Expansion:
    """Turns the blocks of one study file into cells.

    Attributes:
        path: The study file, for paths and messages.
        spec: Its content, a scale already applied.
        axes: Axes of a scale, which replace those of every block that has them.
        over: Settings of a scale, laid over every cell.
        cells: Cells by name, in the order in which they were met.
    """

    path: Path
    spec: Mapping[str, Any]
    axes: Mapping[str, Any] = field(default_factory=dict)
    over: Mapping[str, Any] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def _where(self) -> str:
        return f"{self.path}, blocks"

    def add(self, block: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        """Add the cells of one block; cells that are there already stay.

        Raises:
            StudyError: Unknown keys or names, empty lists, no or several budgets.
        """
        check_keys(block, BLOCK_KEYS, self._where)
        block = {**block, **{axis: values for axis, values in self.axes.items() if axis in block}}
        budgets = [key for key in BUDGETS if key in block]
        if len(budgets) != 1:
            raise StudyError(
                f"a block needs exactly one of {', '.join(BUDGETS)}, not {budgets or 'none'}", where=self._where
            )
        if ("weights" in block) == ("sources" in block):
            raise StudyError("a block needs either sources or weights", where=self._where)
        own = read_layer(block.get("config"), self.path)
        tuning = read_tuning(block["tune"], self._where) if "tune" in block else None
        targets, protocols = (self._variants(block, part) for part in ("targets", "protocols"))
        axes = (targets, protocols, _depths(block, self._where), _folds(block, self._where), self._varied(block))
        for start, architecture, common in self._starts(block, base):
            for target, protocol, depth, fold, varied in product(*axes):
                layers = merge(common, protocol.layer, target.layer, own, depth, fold, varied.layer)
                columns = {
                    "source": start.source,
                    "architecture": architecture,
                    "target": target.column,
                    "protocol": " ".join(filter(None, (protocol.column, varied.column))),
                    "pretrain_seed": start.seed,
                }
                for value, seed in product(self._values(block, budgets[0]), self._values(block, "seeds", [0])):
                    self._transfer(start, layers, columns, _words(depth, fold), (budgets[0], value), seed, tuning)

    # Where transfers start ---------------------------------------------------------------------------------------

    def _starts(
        self, block: Mapping[str, Any], base: Mapping[str, Any]
    ) -> Iterator[tuple[Start, str | None, dict[str, Any]]]:
        """Yield where to start, the architecture's name (None: the weights say) and the layers that go with them."""
        if "weights" in block:
            if "architectures" in block:
                raise StudyError("weights bring their architecture along: leave architectures out", where=self._where)
            known = self.spec.get("weights") or {}
            for name in self._values(block, "weights"):
                weights = str(known.get(name, name))
                label = str(name) if name in known or not Path(weights).exists() else Path(weights).name
                yield Start(label, label.replace("/", "_"), weights=weights), None, dict(base)
            return
        pretrain_seeds = self._values(block, "pretrain_seeds", [0])
        for architecture in self._variants(block, "architectures"):
            common = merge(base, architecture.layer)
            for name in self._values(block, "sources"):
                if name == SCRATCH:
                    yield Start(SCRATCH, SCRATCH), architecture.column, common
                    continue
                for source, seed in product(self._named("sources", name), pretrain_seeds):
                    own = read_layer(source.by_architecture.get(architecture.label), self.path)
                    cell = self._pretrain(merge(common, source.layer, own), architecture.label, source, seed)
                    yield Start(source.column, source.label, seed, cell), architecture.column, common

    def _pretrain(self, layers: Mapping[str, Any], architecture: str, source: Variant, seed: int) -> Cell:
        config = merge(layers, {"seed_everything": seed}, self.over)
        name = WORD.join(["pretrain", source.label, architecture, f"p{seed}", hash_of(identity(config))[:8]])
        columns = {"study": self.spec["name"], "cell": name, "source": SCRATCH, "target": source.column}
        cell = Cell(name, "pretrain", config, {**columns, "protocol": "pretrain"})
        return self.cells.setdefault(name, cell)

    # Transfers ---------------------------------------------------------------------------------------------------

    def _transfer(
        self,
        start: Start,
        layers: Mapping[str, Any],
        columns: Mapping[str, Any],
        words: list[str],
        budget: tuple[str, Any],
        seed: int,
        tuning: Tuning | None,
    ) -> None:
        kind, value = budget
        draw = {kind: value, "few_shot_seed": seed}
        config = merge(layers, {"seed_everything": seed, "data": {"init_args": draw}})
        if start.cell is None and start.weights is None:  # from scratch there is nothing to transfer or freeze
            bare = {"weights": None, "transfer_depth": None, "frozen_depth": 0}
            config = merge(config, {"model": {"init_args": bare}})
        if start.weights is not None:
            config = merge(config, {"model": {"init_args": {"weights": start.weights}}})
        config = merge(config, self.over)
        weights = start.cell.name if start.cell is not None else start.weights
        needs = (start.cell.name,) if start.cell is not None else ()
        shown = {name: found for name, found in columns.items() if found is not None or name == "pretrain_seed"}
        shown |= {kind: str(value) if kind == "shots" else value, "seed": seed, "study": self.spec["name"]}
        origin = ["from", start.words, *filter(None, [columns["architecture"]]), columns["protocol"], *words]
        words = [columns["target"], *origin, f"{kind}{value}", f"s{seed}"]

        def cell(config: dict[str, Any], kind: Any, words: list[str], more: Any = None, **facts: Any) -> Cell:
            decides = identity(config, weights) | ({"tune": more} if more is not None else {})
            name = WORD.join([*words, hash_of(decides)[:8]])
            made = Cell(name, kind, config, {**shown, "cell": name}, weights=needs[0] if needs else None, **facts)
            return self.cells.setdefault(name, made)

        if tuning is None:
            cell(config, "transfer", words, needs=needs)
            return
        candidates = []
        for settings in tuning.settings():
            trials = [
                cell(merge(config, *layers), "trial", ["trial", *words, *label], needs=needs)
                for label, layers in tuning.trials(settings)
            ]
            candidates.append(Candidate(settings, tuple(trial.name for trial in trials)))
        names = tuple(name for candidate in candidates for name in candidate.trials)
        choice = {"tuning": tuning, "candidates": tuple(candidates)}
        cell(config, "transfer", words, tuning.describe(), needs=(*needs, *names), **choice)

    # Axes --------------------------------------------------------------------------------------------------------

    def _values(self, block: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
        value = block.get(key, default)
        if not isinstance(value, list) or not value:
            raise StudyError(f"{key} should be a list that is not empty, not {value!r}", where=self._where)
        return value

    def _variants(self, block: Mapping[str, Any], part: str) -> list[Variant]:
        return [variant for name in self._values(block, part) for variant in self._named(part, name)]

    def _named(self, part: str, name: str) -> list[Variant]:
        parts = self.spec.get(part) or {}
        if name not in parts:
            near = closest(name, parts)
            raise StudyError(
                f"{part} has no {name!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=self._where,
                valid=list(parts),
            )
        special, bare = split_layer(parts[name])
        settings = read_layer(bare, self.path)
        shown = DIALS if part == "sources" else ()
        return [
            Variant(f"{name}{label}", f"{name}{column}", merge(settings, varied), special.get(BY_ARCHITECTURE) or {})
            for label, column, varied in vary_layers(special.get(VARY), self._where, shown)
        ]

    def _varied(self, block: Mapping[str, Any]) -> list[Variant]:
        return [
            Variant(label.strip(), column.strip(), layer)
            for label, column, layer in vary_layers(block.get("vary"), self._where)
        ]


def split_layer(layer: Any) -> tuple[dict[str, Any], Any]:
    """Part a named layer from what is said of it: its variants, and settings for single architectures."""
    if not isinstance(layer, Mapping):
        return {}, layer
    special = {key: layer[key] for key in (VARY, BY_ARCHITECTURE) if key in layer}
    return special, {key: value for key, value in layer.items() if key not in special}


def vary_layers(
    vary: Any, where: str, shown_elsewhere: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (label, label without values that other columns show, settings) for the product of dotted settings.

    Args:
        vary: Mapping from a dotted setting, "data.init_args.fraction", to its values; None for a single bare layer.
        where: The spot in messages.
        shown_elsewhere: Dotted settings that result rows have columns for.
    """
    if vary is not None and (
        not isinstance(vary, Mapping) or not all(isinstance(v, list) and v for v in vary.values())
    ):
        raise StudyError(
            f"vary should map settings to lists of values, not {vary!r}",
            where=where,
            valid="data.init_args.fraction: [0.1, 1.0]",
        )
    varied = dict(vary or {})
    for values in product(*varied.values()):
        pairs = list(zip(varied, values, strict=True))
        label, column = (
            ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen)
            for chosen in (pairs, [pair for pair in pairs if pair[0] not in shown_elsewhere])
        )
        layer = merge(*(nest(key, value) for key, value in pairs))
        yield f" ({label})" if label else "", f" ({column})" if column else "", layer


def _depths(block: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Layers of the axis `depths`: a number of transferred layer groups, or {transfer: 3, frozen: 1}."""
    layers: list[dict[str, Any]] = []
    for depth in block.get("depths", [None]):
        if depth is None:
            layers.append({})
            continue
        depth = depth if isinstance(depth, Mapping) else {"transfer": depth}
        check_keys(depth, ("transfer", "frozen"), f"{where}, depths")
        init = {"transfer_depth": depth.get("transfer"), "frozen_depth": depth.get("frozen", 0)}
        layers.append({"model": {"init_args": init}})
    return layers


def _folds(block: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Layers of the axis `folds`: all folds of a cross-validation of so many."""
    folds = block.get("folds")
    if folds is None:
        return [{}]
    if not isinstance(folds, int) or folds < 2:
        raise StudyError(f"folds: {folds!r}", where=where, valid="a number of folds, 2 or more")
    return [{"data": {"init_args": {"folds": folds, "fold": fold}}} for fold in range(folds)]


def _words(depth: Mapping[str, Any], fold: Mapping[str, Any]) -> list[str]:
    """Depth and fold in a cell's name."""
    words = []
    if depth:
        init = depth["model"]["init_args"]
        words.append(f"k{init['transfer_depth']}" + (f"f{init['frozen_depth']}" if init["frozen_depth"] else ""))
    if fold:
        words.append(f"fold{fold['data']['init_args']['fold']}")
    return words
