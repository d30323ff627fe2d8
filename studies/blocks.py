"""Blocks of a study become cells: the product of their axes, each weights once, trials before what they choose."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from datamodules.errors import closest
from studies.cells import SCRATCH, Cell, cell_name, content_of
from studies.layers import (
    BY_ARCHITECTURE,
    VARY,
    Place,
    StudyError,
    check_keys,
    merge,
    read_layer,
    refuse_repeats,
    split_layer,
    vary_layers,
)  # fmt: skip
from studies.runs import identity
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
SHOWN = (
    *DIALS,
    *(f"model.init_args.{name}" for name in ("transfer_depth", "frozen_depth", "granularity")),
    *(f"data.init_args.{name}" for name in ("folds", "fold", "fold_by", "split", "image_size")),
    *("select", "monitor"),
)
"""Settings of a transfer that result rows show, so that cells which differ in them are never averaged."""


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shots": (lambda value: value == "full" or _whole(1)(value), "whole numbers from 1, or full"),
    "num_images": (_whole(1), "whole numbers from 1"),
    "fraction": (_is_fraction, "numbers above 0, up to 1"),
    **dict.fromkeys(("seeds", "pretrain_seeds"), (_whole(0), "whole numbers from 0")),
}
"""What an axis may hold, and how to say so; the others hold names."""


@dataclass(frozen=True)
class Variant:
    """A named layer, or one combination of what it varies.

    Attributes:
        name: Its name.
        label: The same, with the values that it stands for: "near (fraction=0.1)".
        column: What result rows call it: without values that other columns show.
        layer: Its settings.
        varied: Those that it varies: nothing but a scale is laid over them, so that its label is true.
        by_architecture: Further settings of a source for the architectures named.
    """

    name: str
    label: str
    column: str
    layer: dict[str, Any]
    varied: dict[str, Any]
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
        identity: What decides the result of starting here, or None.
    """

    source: str | None
    words: str
    seed: int | None = None
    cell: Cell | None = None
    weights: str | None = None
    identity: str | None = None


@dataclass
class Expansion:
    """Turns the blocks of one study file into cells.

    Attributes:
        path: The study file, for paths and messages.
        spec: Its content, a scale already applied.
        axes: Axes of a scale, which replace those of every block that has them.
        over: Settings of a scale, laid over every cell.
        cells: Cells by name, in the order in which they were met.
        alike: Cells by all that result rows tell them apart by.
        given: Weights by what result rows call them.
    """

    path: Path
    spec: Mapping[str, Any]
    axes: Mapping[str, Any] = field(default_factory=dict)
    over: Mapping[str, Any] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)
    alike: dict[tuple[Any, ...], Cell] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)

    def add(self, block: Mapping[str, Any], base: Mapping[str, Any], place: Place) -> None:
        """Add the cells of one block; cells that are there already stay.

        Args:
            block: The block.
            base: Settings of every cell.
            place: Where it stands, for messages.

        Raises:
            StudyError: Unknown keys or names, empty lists, values that an axis cannot have, no or several budgets, or
                cells that would be averaged although they differ.
        """
        self.place = place
        check_keys(block, BLOCK_KEYS, place)
        block = {**block, **{axis: values for axis, values in self.axes.items() if axis in block}}
        budgets = [key for key in BUDGETS if key in block]
        if len(budgets) != 1:
            raise StudyError(
                f"a block needs exactly one of {', '.join(BUDGETS)}, not {budgets or 'none'}", where=str(place)
            )
        if ("weights" in block) == ("sources" in block):
            raise StudyError("a block needs either sources or weights", where=str(place))
        own = read_layer(block.get("config"), self.path)
        tuning = read_tuning(block["tune"], place.at("tune")) if "tune" in block else None
        targets, protocols = (self._variants(block, part) for part in ("targets", "protocols"))
        axes = (targets, protocols, _depths(block, place), _folds(block, place), self._varied(block))
        values, seeds = self._values(block, budgets[0]), self._values(block, "seeds", [0])
        for start, architecture, common, above in self._starts(block, base):
            for target, protocol, depth, fold, varied in product(*axes):
                layers = merge(common, protocol.layer, target.layer, own)
                layers = merge(layers, above, protocol.varied, target.varied, depth, fold, varied.varied)
                columns = {
                    "source": start.source,
                    "architecture": architecture,
                    "target": target.column,
                    "protocol": " ".join(filter(None, (protocol.column, varied.column))),
                    "pretrain_seed": start.seed,
                }
                words = _words(depth if start.source != SCRATCH else {}, fold)
                for value, seed in product(values, seeds):
                    self._transfer(start, layers, columns, words, (budgets[0], value), seed, tuning)

    # Where transfers start ---------------------------------------------------------------------------------------

    def _starts(
        self, block: Mapping[str, Any], base: Mapping[str, Any]
    ) -> Iterator[tuple[Start, str | None, dict[str, Any], dict[str, Any]]]:
        """Yield starts, each with architecture (None: the weights say), layers, and what the architecture varies."""
        if "weights" in block:
            for key in ("architectures", "pretrain_seeds"):
                if key in block:
                    raise StudyError(f"weights are trained already: leave {key} out", where=str(self.place.at(key)))
            for name in self._values(block, "weights"):
                yield self._given_start(name), None, dict(base), {}
            return
        pretrain_seeds = self._values(block, "pretrain_seeds", [0])
        for architecture in self._variants(block, "architectures"):
            common, varied = merge(base, architecture.layer), architecture.varied
            for name in self._values(block, "sources"):
                if name == SCRATCH:
                    yield Start(SCRATCH, SCRATCH), architecture.column, common, varied
                    continue
                for source, seed in product(self._named("sources", name), pretrain_seeds):
                    own = read_layer(source.by_architecture.get(architecture.name), self.path)
                    layers = merge(common, source.layer, own, varied, source.varied)
                    # A source of another method names another model class, whose arguments begin anew: the net stays.
                    net = (merge(architecture.layer, varied).get("model") or {}).get("init_args") or {}
                    layers = merge({"model": {"init_args": net}}, layers)
                    cell = self._pretrain(layers, architecture.label, source, seed)
                    start = Start(source.column, source.label, seed, cell, identity=cell.name)
                    yield start, architecture.column, common, varied

    def _given_start(self, name: Any) -> Start:
        """Where given weights lead to.

        Raises:
            StudyError: Result rows could not tell them from others.
        """
        known = self.spec.get("weights") or {}
        weights = str(known.get(name, name))
        label = str(name) if name in known or not Path(weights).exists() else Path(weights).name
        if self.given.setdefault(label, weights) != weights or label in {SCRATCH, *(self.spec.get("sources") or {})}:
            raise StudyError(
                f"{weights} would be called {label} in the results, as others are",
                where=str(self.place.at("weights")),
                hint="give it a name of its own: weights: {NAME: PATH}, and NAME in the block",
            )
        return Start(label, label, weights=weights, identity=content_of(weights))

    def _pretrain(self, layers: Mapping[str, Any], architecture: str, source: Variant, seed: int) -> Cell:
        config = merge(layers, {"seed_everything": seed}, self.over)
        name = cell_name(["pretrain", source.label, architecture, f"p{seed}"], identity(config))
        columns = {"study": self.spec["name"], "cell": name, "source": SCRATCH, "target": source.column}
        return self._keep(Cell(name, "pretrain", config, {**columns, "protocol": "pretrain"}))

    def _keep(self, cell: Cell) -> Cell:
        """The cell, or the one that is there already.

        Raises:
            StudyError: The one that is there means something else.
        """
        known = self.cells.setdefault(cell.name, cell)
        if known.columns != cell.columns:
            raise StudyError(
                f"two cells would share the folder {cell.name}", where=str(self.place), hint="rename a part"
            )
        return known

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
        kind, value = budget[0], float(budget[1]) if budget[0] == "fraction" else budget[1]
        draw = {kind: value, "few_shot_seed": seed}
        config = merge(layers, {"seed_everything": seed, "data": {"init_args": draw}})
        if start.cell is None and start.weights is None:  # from scratch there is nothing to transfer or freeze
            bare = {"weights": None, "transfer_depth": None, "frozen_depth": 0}
            config = merge(config, {"model": {"init_args": bare}})
        if start.weights is not None:
            config = merge(config, {"model": {"init_args": {"weights": start.weights}}})
        config = merge(config, self.over)
        needs = (start.cell.name,) if start.cell is not None else ()
        shown = {name: found for name, found in columns.items() if found is not None or name == "pretrain_seed"}
        shown |= {kind: str(value) if kind == "shots" else value, "seed": seed, "study": self.spec["name"]}
        origin = ["from", start.words, *filter(None, [columns["architecture"]]), columns["protocol"], *words]
        words = [columns["target"], *origin, f"{kind}{value}", f"s{seed}"]

        def cell(config: dict[str, Any], kind: Any, words: list[str], more: Any = None, **facts: Any) -> Cell:
            decides = identity(config, start.identity) | ({"tune": more} if more is not None else {})
            name = cell_name(words, decides)
            made = Cell(name, kind, config, {**shown, "cell": name}, weights=needs[0] if needs else None, **facts)
            if kind == "transfer":
                self._refuse_alike(made, decides, (*shown.items(), start.identity, repr(more)))
            return self._keep(made)

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

    def _refuse_alike(self, cell: Cell, flat: Mapping[str, Any], shown: tuple[Any, ...]) -> None:
        """Raise a StudyError where another cell differs in nothing that result rows show: they would be averaged."""
        other = self.alike.setdefault((*shown, *(repr(flat.get(key)) for key in SHOWN)), cell)
        if other.name == cell.name:
            return
        flat, former = identity(cell.config), identity(other.config)
        keys = sorted(key for key in flat.keys() | former.keys() if flat.get(key) != former.get(key))
        raise StudyError(
            f"two cells of {cell.columns['target']} from {cell.columns.get('source')} differ in {keys[0]} "
            f"({former.get(keys[0])!r}, {flat.get(keys[0])!r}), which no column of the results shows",
            where=str(self.place),
            hint="they would be averaged: give one a protocol of its own name, or use vary",
        )

    # Axes --------------------------------------------------------------------------------------------------------

    def _values(self, block: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
        value, where = block.get(key, default), self.place.at(key)
        if not isinstance(value, list) or not value:
            raise StudyError(f"{key} should be a list that is not empty, not {value!r}", where=str(where))
        fits, valid = VALUES.get(key, (_is_name, "names"))
        for item in value:
            if not fits(item):
                raise StudyError(f"{key}: {item!r}", where=str(where), valid=valid)
        refuse_repeats(value, where, key)
        return value

    def _variants(self, block: Mapping[str, Any], part: str) -> list[Variant]:
        return [variant for name in self._values(block, part) for variant in self._named(part, name)]

    def _named(self, part: str, name: str) -> list[Variant]:
        parts = self.spec.get(part) or {}
        if name not in parts:
            near = closest(name, parts)
            raise StudyError(
                f"{part} has no {name!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=str(self.place.at(part)),
                valid=list(parts),
            )
        place = Place(self.path, (part, str(name)))
        special, bare = split_layer(parts[name])
        own = special.get(BY_ARCHITECTURE) or {}
        if part == "sources":
            check_keys(own, tuple(self.spec.get("architectures") or {}), place.at(BY_ARCHITECTURE))
        settings = read_layer(bare, self.path)
        shown = DIALS if part == "sources" else ()
        return [
            Variant(str(name), f"{name}{label}", f"{name}{column}", settings, varied, own)
            for label, column, varied in vary_layers(special.get(VARY), place.at(VARY), shown)
        ]

    def _varied(self, block: Mapping[str, Any]) -> list[Variant]:
        return [
            Variant("", label.strip(), column.strip(), {}, layer)
            for label, column, layer in vary_layers(block.get("vary"), self.place.at("vary"))
        ]


def _depths(block: Mapping[str, Any], place: Place) -> list[dict[str, Any]]:
    """Layers of the axis `depths`: a number of transferred layer groups, or {transfer: 3, frozen: 1}."""
    where = place.at("depths")
    depths = block.get("depths", [None])
    if not isinstance(depths, list) or not depths:
        raise StudyError(f"depths should be a list that is not empty, not {depths!r}", where=str(where))
    layers: list[dict[str, Any]] = []
    for depth in depths:
        if depth is None:
            layers.append({})
            continue
        pair = depth if isinstance(depth, Mapping) else {"transfer": depth}
        check_keys(pair, ("transfer", "frozen"), where)
        transfer, frozen = pair.get("transfer"), pair.get("frozen", 0)
        fits = (transfer is None or _whole(0)(transfer)) and _whole(0)(frozen)
        if not fits or (transfer is not None and frozen > transfer):
            valid = "whole numbers from 0, or {transfer: 3, frozen: 1} with frozen up to transfer"
            raise StudyError(f"depths: {depth!r}", where=str(where), valid=valid)
        layers.append({"model": {"init_args": {"transfer_depth": transfer, "frozen_depth": frozen}}})
    refuse_repeats(layers, where, "depths")
    return layers


def _folds(block: Mapping[str, Any], place: Place) -> list[dict[str, Any]]:
    """Layers of the axis `folds`: all folds of a cross-validation of so many."""
    folds = block.get("folds")
    if folds is None:
        return [{}]
    if not isinstance(folds, int) or folds < 2:
        raise StudyError(f"folds: {folds!r}", where=str(place.at("folds")), valid="a number of folds, 2 or more")
    return [{"data": {"init_args": {"folds": folds, "fold": fold}}} for fold in range(folds)]


def _words(depth: Mapping[str, Any], fold: Mapping[str, Any]) -> list[str]:
    """Depth and fold in a cell's name."""
    words = []
    if depth:
        init = depth["model"]["init_args"]
        transfer = "all" if init["transfer_depth"] is None else init["transfer_depth"]
        words.append(f"k{transfer}" + (f"f{init['frozen_depth']}" if init["frozen_depth"] else ""))
    if fold:
        words.append(f"fold{fold['data']['init_args']['fold']}")
    return words
