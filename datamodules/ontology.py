"""One vocabulary for the labels of chest X-rays, read from `ontology.yaml`: names, aliases and every source's tokens.

What a token means, and why, is decided in that file alone; here it is read, validated and asked.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from datamodules.errors import DataError, closest

FILE = Path(__file__).with_suffix(".yaml")

Mode = Literal["intersection", "union"]


@dataclass(frozen=True)
class Source:
    """What one source calls the labels.

    Attributes:
        labels: Canonical label and the source's tokens (or columns) that are its positives, in alphabetical order.
        unused: Reason, and the tokens without a label for that reason.
        uninformative: Tokens that say nothing about the image's findings.
    """

    labels: dict[str, list[str]]
    unused: dict[str, list[str]]
    uninformative: frozenset[str]


@dataclass(frozen=True)
class Ontology:
    """The content of the file, validated.

    Attributes:
        version: Raised with every change that can change a label.
        names: Folded spelling (see `canonical`) of each name and alias, and the canonical name.
        sources: Each source's vocabulary by the source's name.
        substrings: Sources for which the rule of Cherti & Jitsev is known: label and its lower-case substrings.
    """

    version: int
    names: dict[str, str]
    sources: dict[str, Source]
    substrings: dict[str, dict[str, list[str]]]


@lru_cache
def read(path: Path = FILE) -> Ontology:
    """Read and validate an ontology; a file is read once.

    Raises:
        DataError: A name in two spellings, an unknown label, or a token in two places that contradict each other.
    """
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = _names(content["labels"], content["aliases"], path)
    sources = {name: _source(name, entry, content["labels"], path) for name, entry in content["sources"].items()}
    rules: dict[str, dict[str, list[str]]] = {}
    for name, rule in content["cherti2022"].items():
        where = f"{path}, cherti2022.{name}"
        annotated = sources[_known(name, sources, "source", where)].labels
        for label, found in rule.items():
            _known(label, annotated, "label", where)
            if found[0] != label.lower() or any(one != one.lower() for one in found):
                raise DataError(f"{label}: the label's name comes first, and all is lower case", where=where)
        rules[name] = {label: rule[label] for label in _alphabetical(rule)}
    return Ontology(content["version"], names, sources, rules)


def version() -> int:
    """Version of the ontology."""
    return read().version


def labels(source: str) -> list[str]:
    """Canonical labels that a source annotates, in alphabetical order.

    Raises:
        DataError: The source is unknown.
    """
    return list(_source_of(source).labels)


def tokens(source: str) -> dict[str, list[str]]:
    """Each label that a source annotates, and the exact tokens (or columns) that are its positives.

    Raises:
        DataError: The source is unknown.
    """
    return {label: list(found) for label, found in _source_of(source).labels.items()}


def token_labels(source: str) -> dict[str, list[str]]:
    """Every token that a source is known to use, and the labels it is a positive of: several, one or none.

    Raises:
        DataError: The source is unknown.
    """
    vocabulary = _source_of(source)
    silent = [*(token for group in vocabulary.unused.values() for token in group), *sorted(vocabulary.uninformative)]
    inverse: dict[str, list[str]] = {token: [] for token in silent}
    for label, found in vocabulary.labels.items():
        for token in found:
            inverse.setdefault(token, []).append(label)
    return inverse


def uninformative(source: str) -> frozenset[str]:
    """Tokens that say nothing about the image's findings: a row of nothing else is unlabelled, not healthy.

    Raises:
        DataError: The source is unknown.
    """
    return _source_of(source).uninformative


def substrings(source: str) -> dict[str, list[str]]:
    """The rule of Cherti & Jitsev (arXiv 2106.00116): label and the lower-case substrings searched in a row's text.

    Raises:
        DataError: The rule is not known for the source.
    """
    rules = read().substrings
    rule = rules[_known(source, rules, "source", "the substring rule of cherti2022")]
    return {label: list(found) for label, found in rule.items()}


def canonical(name: str) -> str:
    """Canonical name of a label; case, spaces, underscores and hyphens do not count. Unknown names come back as is."""
    return read().names.get(_fold(name), name)


def merge(names_by_source: Sequence[Sequence[str]], mode: Mode) -> list[str]:
    """Labels of a merge of sources: canonical names in alphabetical order.

    Args:
        names_by_source: Each source's label names, in any spelling.
        mode: "intersection": labels that every source annotates; "union": those that any does.

    Raises:
        DataError: The mode is unknown.
    """
    combine: dict[str, Callable[..., set[str]]] = {"intersection": set.intersection, "union": set.union}
    chosen = combine[_known(mode, combine, "mode", "the merge of label names")]
    sets = [set(map(canonical, names)) for names in names_by_source]
    return _alphabetical(chosen(*sets)) if sets else []


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _alphabetical(names: Iterable[str]) -> list[str]:
    """Dictionary order, in which an underscore is a space: Pleural Other, Pleural_Thickening, Pneumonia."""
    return sorted(names, key=lambda name: (name.replace("_", " ").casefold(), name))


def _source_of(name: str) -> Source:
    sources = read().sources
    return sources[_known(name, sources, "source", "the label ontology of chest X-rays")]


def _known(name: str, choices: Collection[str], kind: str, where: str) -> str:
    if name not in choices:
        near = closest(name, choices)
        problem = f"unknown {kind} {name!r}" + (f"; did you mean {near!r}?" if near else "")
        raise DataError(problem, where=where, valid=list(choices))
    return name


def _names(known: Sequence[str], aliases: Mapping[str, str], path: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for spelling, label in [*zip(known, known, strict=True), *aliases.items()]:
        folded = _fold(spelling)
        if folded in names:
            raise DataError(f"{spelling!r} is the same name as {names[folded]!r}", where=f"{path}, labels or aliases")
        names[folded] = _known(label, known, "label", f"{path}, alias {spelling!r}")
    return names


def _source(name: str, entry: Mapping[str, Any], known: Sequence[str], path: Path) -> Source:
    """Check one source's entry: known labels only, and a token stands with labels or in one group without any."""
    where = f"{path}, sources.{name}"
    annotated, unused, silent = entry["labels"], entry.get("unused", {}), entry.get("uninformative", [])
    homes: dict[str, str] = {}
    for label, found in annotated.items():
        _known(label, known, "label", where)
        if len(set(found)) < len(found):
            raise DataError(f"{label} lists a token twice: {sorted(found)}", where=where)
        homes |= dict.fromkeys(found, label)
    for group, found in [*unused.items(), ("uninformative", silent)]:
        for token in found:
            if token in homes:
                raise DataError(f"token {token!r} stands below both {homes[token]!r} and {group!r}", where=where)
            homes[token] = group
    if any(not isinstance(token, str) for token in homes):
        raise DataError(f"a token that is no text: {[t for t in homes if not isinstance(t, str)]}", where=where)
    return Source({label: annotated[label] for label in _alphabetical(annotated)}, unused, frozenset(silent))
