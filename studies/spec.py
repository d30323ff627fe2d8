"""A study as data: a YAML file of named parts and blocks becomes cells with stable names.

    name: quickstart
    config: ../trainer/cpu.yaml          layers of every cell: files (relative to this one) or inline settings
    architectures: {small: {...}}        named layers; so are sources, targets and protocols
    sources: {scratch: null, near: {..., vary: {data.init_args.fraction: [0.1, 1.0]}}}
    targets: {far: {...}}
    protocols: {finetune: {...}}
    blocks:                              each block is the product of its lists
      - {sources: [scratch, near], architectures: [small], targets: [far], protocols: [finetune],
         shots: [1, 5, full], seeds: [0, 1, 2], config: {...}}

docs/studies.md has all keys. A layer is a mapping like any configuration, and may name files of further layers below it
by `config`. No import of torch: status and listing answer at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import closest
from studies.blocks import BLOCK_KEYS, PARTS, Expansion
from studies.cells import KINDS, SCRATCH, Cell
from studies.layers import VARY, Place, StudyError, check_keys, merge, read_layer, read_yaml, split_layer

KEYS = (
    *("name", "title", "config", "keep", "metrics", *PARTS, "weights", "blocks"),
    *("scales", "domains", "published", "prevalence", "slurm"),
)
FACTS = ("metrics", "domains", "prevalence", "slurm")
SCALE_KEYS = ("axes", "config", *PARTS)
KEEP = ("none", "best", "last")
Keep = Literal["none", "best", "last"]


@dataclass(frozen=True)
class Study:
    """A study file, read and checked.

    Attributes:
        name: Folder of its runs.
        path: The file.
        cells: Pre-training cells first, each once, then trials, then transfers.
        title: Heading of the report.
        keep: Which checkpoints of transfer cells stay.
        metrics: Target → headline metric of the report, where the usual one is not wanted.
        domains: Source, target → its domain: what is near and far in the report.
        published: Published results to draw ours beside, or None.
        prevalence: Label → prevalence at which the report states predictive values, 0–1.
        slurm: Settings of the cluster.
        scale: Name of the scale that it was read at, or None.
    """

    name: str
    path: Path
    cells: tuple[Cell, ...]
    title: str
    keep: Keep = "none"
    metrics: dict[str, str] = field(default_factory=dict)
    domains: dict[str, str] = field(default_factory=dict)
    published: str | None = None
    prevalence: dict[str, float] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)
    scale: str | None = None


def read_study(path: Path, scale: str | None = None) -> Study:
    """Read a study file.

    Args:
        path: The file.
        scale: One of its `scales`: other parts, axes and settings under the same names, such as a tiny rehearsal on
            generated data. Its runs have a folder of their own, NAME-SCALE.

    Raises:
        StudyError: Missing or broken file, unknown key or name, empty list.
    """
    spec, place = read_yaml(path), Place(path)
    check_keys(spec, KEYS, place)
    for key in ("name", "targets", "protocols", "blocks"):
        if not spec.get(key):
            raise StudyError(f"the study lacks {key}", where=str(path), valid=KEYS)
    for key in (*PARTS, "weights", "scales", *FACTS):
        if not isinstance(spec.get(key) or {}, Mapping):
            raise StudyError(f"{key} should map names to settings, not {spec[key]!r}", where=str(place.at(key)))
    if not isinstance(spec["blocks"], list):
        raise StudyError(f"blocks should be a list, not {spec['blocks']!r}", where=str(place.at("blocks")))
    _check_name(str(spec["name"]), place.at("name"))
    keep = spec.get("keep", "none")
    if keep not in KEEP:
        raise StudyError(f"keep: {keep!r}", where=str(place.at("keep")), valid=list(KEEP))
    expansion = _expansion(spec, path, scale)
    base = read_layer(spec.get("config"), path)
    for number, block in enumerate(spec["blocks"]):
        expansion.add(block, base, place.at("blocks", number))
    cells = sorted(expansion.cells.values(), key=lambda cell: KINDS.index(cell.kind))
    _check_facts(spec, cells, place)
    return Study(
        name=str(expansion.spec["name"]),
        path=path,
        cells=tuple(cells),
        title=str(spec.get("title", spec["name"])),
        keep=keep,
        published=spec.get("published"),
        scale=scale,
        **{name: dict(spec.get(name) or {}) for name in FACTS},  # type: ignore[arg-type]
    )


def _check_name(name: str, where: Place) -> None:
    """Raise a StudyError where a study's name is no folder's name."""
    if "/" in name or "\\" in name or name.startswith("."):
        raise StudyError(f"name: {name!r}", where=str(where), valid="a folder's name: no slash, no dot in front")


def _check_facts(spec: Mapping[str, Any], cells: list[Cell], place: Place) -> None:
    """Check what is for the report alone: a mistake there would show when all has run.

    Raises:
        StudyError: An unknown name or table, or a prevalence that is none.
    """
    parts = {part: {*map(str, spec.get(part) or {})} for part in (*PARTS, "weights")}
    columns = {part: {str(cell.columns.get(part)) for cell in cells} for part in ("source", "target")}
    targets = parts["targets"] | columns["target"]
    named = targets | parts["sources"] | parts["weights"] | columns["source"] | {SCRATCH}
    check_keys(spec.get("metrics") or {}, tuple(sorted(targets)), place.at("metrics"))
    check_keys(spec.get("domains") or {}, tuple(sorted(named)), place.at("domains"))
    tables = sorted(file.stem for file in Path(__file__).with_name("published").glob("*.csv"))
    if spec.get("published") not in (None, *tables):
        near = closest(spec["published"], tables)
        problem = f"published: {spec['published']!r}" + (f"; did you mean {near!r}?" if near else "")
        raise StudyError(problem, where=str(place.at("published")), valid=tables)
    for label, value in (spec.get("prevalence") or {}).items():
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise StudyError(
                f"prevalence: {value!r}", where=str(place.at("prevalence", label)), valid="a number between 0 and 1"
            )


def _expansion(spec: Mapping[str, Any], path: Path, scale: str | None) -> Expansion:
    """The expansion of a study at a scale."""
    scales = spec.get("scales") or {}
    if scale is None:
        return Expansion(path, spec)
    if scale not in scales:
        near = closest(scale, scales)
        raise StudyError(
            f"the study has no scale {scale!r}" + (f"; did you mean {near!r}?" if near else ""),
            where=str(Place(path, ("scales",))),
            valid=list(scales) or "this study has none",
        )
    changes, where = scales[scale], Place(path, ("scales", scale))
    check_keys(changes, SCALE_KEYS, where)
    axes = changes.get("axes") or {}
    check_keys(axes, BLOCK_KEYS, where.at("axes"))
    parts = {}
    for part in PARTS:
        own = dict(spec.get(part) or {})
        check_keys(changes.get(part) or {}, tuple(own), where.at(part))
        for name, layer in (changes.get(part) or {}).items():
            special, bare = split_layer(own[name])
            own[name] = merge(read_layer(bare, path), {VARY: special.get(VARY)}, read_layer(layer, path))
        parts[part] = own
    whole = {**spec, **parts, "name": f"{spec['name']}-{scale}"}
    return Expansion(path, whole, axes, read_layer(changes.get("config"), path))
