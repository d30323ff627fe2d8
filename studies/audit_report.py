"""An audit as one line a finding, as a short Markdown report, and as CSV files of everything found."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from datamodules.atomic import replace_file, write_text
from datamodules.errors import shorten
from studies.audit import Audit
from studies.overlap import Side
from studies.provenance import FLAG_AUROC, FLAG_P, FLAG_V
from studies.source_probe import READABLE

EXAMPLES = 5
LABELS = 4  # named in one line of the summary
VALUES = 8  # provenances shown of one contingency table

KINDS = {
    "same_files": ("files of equal content", "with the very file of"),
    "same_ids": ("equal file names", "with the name of"),
    "near_duplicates": ("near-duplicate pictures", "that are copies of"),
}
"""Kinds of pairs: the field of the audit, its name, and what an image of a leak does."""


class Finding(NamedTuple):
    """One line of the summary; `flagged` where somebody should act."""

    flagged: bool
    text: str


def write_audit(audit: Audit, folder: Path) -> Path:
    """Write report.md, and CSV files of all pairs and tables, to a folder; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = {kind: getattr(audit, kind).drop(columns=["row_a", "row_b", "within"]) for kind in KINDS}
    frames |= {"shared_patients": audit.patients, "provenance": audit.provenance}
    for name, frame in frames.items():
        replace_file(folder / f"{name}.csv", lambda path, frame=frame: frame.to_csv(path, index=False))  # type: ignore[misc]
    write_text(folder / "report.md", markdown(audit))
    return folder / "report.md"


def summarise(audit: Audit) -> list[Finding]:
    """Findings, the flagged ones first."""
    found = [line for kind in KINDS for line in _pair_findings(audit, kind)]
    found += _patient_findings(audit)
    found += _provenance_findings(audit)
    found += _file_findings(audit.sides)
    return sorted(found, key=lambda finding: not finding.flagged)


def splits_of(pairs: pd.DataFrame) -> pd.DataFrame:
    """Count pairs by the sets and splits that they join: `pairs`, distinct `images_a` and `images_b`, `leak`."""
    groups = pairs.groupby(["set_a", "split_a", "set_b", "split_b"], sort=False)
    counted = groups.agg(
        pairs=("path_a", "size"), images_a=("path_a", "nunique"), images_b=("path_b", "nunique"), leak=("leak", "any")
    )
    return counted.reset_index().sort_values(["leak", "pairs"], ascending=False, ignore_index=True)


def _pair_findings(audit: Audit, kind: str) -> list[Finding]:
    name, verb = KINDS[kind]
    pairs: pd.DataFrame = getattr(audit, kind)
    leaks, lines = pairs[pairs["leak"]], []
    turned = leaks["split_a"] == "test"
    columns = {"tested": ("set_a", "set_b"), "image": ("path_a", "path_b"), "other": ("set_b", "set_a")}
    tested = pd.DataFrame({name: leaks[one].where(turned, leaks[two]) for name, (one, two) in columns.items()})
    for (where, other), images in tested.groupby(["tested", "other"], sort=False)["image"]:
        text = f"test images of {where} {verb} training or validation images of {other}: {images.nunique()}"
        lines.append(Finding(True, text))
    rest = pairs[~pairs["leak"]]
    if len(rest):
        chance = kind == "same_ids" and rest["same_picture"].eq(False).any()
        why = "whose pictures differ, or not between training and test" if chance else "not between training and test"
        lines.append(Finding(False, f"{name}: {len(rest)} {'other ' * bool(lines)}pairs {why}"))
    return lines or [Finding(False, f"{name}: none")]


def _patient_findings(audit: Audit) -> list[Finding]:
    lines, first = [], audit.sides[0]
    if audit.crossing:
        text = f"patients of {first.label} in several splits: {len(audit.crossing)}, such as {audit.crossing[0]}"
        lines.append(Finding(True, text))
    elif first.has_patients:
        lines.append(Finding(False, f"patients of {first.label}: none in several splits"))
    if leaks := int(audit.patients["leak"].sum()):
        text = f"patients in the test set of one set and in training or validation of the other: {leaks}"
        lines.append(Finding(True, text))
    return lines


def _provenance_findings(audit: Audit) -> list[Finding]:
    """One line for each provenance that tells labels, and one for those that do not."""
    lines, table = [], audit.provenance
    for key, rows in table[table["flagged"]].groupby(["set", "provenance"], sort=False):
        where, kind = str(key[0]), str(key[1])
        strength = rows[["v", "auroc"]].assign(auroc=2 * rows["auroc"] - 1).max(axis=1)
        worst = rows.assign(strength=strength).sort_values("strength", ascending=False).drop_duplicates("label")
        labels = [_label_text(row) for row in worst.head(LABELS).itertuples()]
        more = f" and {len(worst) - LABELS} more labels" if len(worst) > LABELS else ""
        probed = next((probe for name, probe in audit.probes if (name, probe.provenance) == (where, kind)), None)
        image = ""
        if probed is not None:
            can = "images tell it, so a network can use it" if probed.readable else "small images hardly tell it"
            image = f"; {can} (probe AUROC {probed.auroc:.2f}, {probed.low:.2f}–{probed.high:.2f})"
        lines.append(Finding(True, f"the {kind} of {where} tells {', '.join(labels)}{more}{image}"))
    told = table.groupby("provenance", sort=False)["flagged"].any()
    clean = [str(kind) for kind in told.index[~told]]
    if clean:
        lines.append(Finding(False, f"no label goes with the {' or the '.join(clean)}"))
    for name, probe in audit.probes:
        if not ((table["set"] == name) & (table["provenance"] == probe.provenance) & table["flagged"]).any():
            can = "tell" if probe.readable else "hardly tell"
            interval = f"probe AUROC {probe.auroc:.2f}, {probe.low:.2f}–{probe.high:.2f}"
            lines.append(Finding(False, f"images of {name} {can} the {probe.provenance} ({interval})"))
    return lines


def _label_text(row: Any) -> str:
    decided = "decided, " if row.decided else ""
    auroc = "" if pd.isna(row.auroc) else f", AUROC {row.auroc:.2f}"
    guess = f", guessed right {_percent(row.guess)} against {_percent(row.majority)} by the majority"
    return f"{row.label} ({decided}V {row.v:.2f}{auroc}{guess}; {_place(row.split)})"


def _file_findings(sides: Sequence[Side]) -> list[Finding]:
    lines = []
    for side in sides:
        if missing := int((~side.present).sum()):
            lines.append(Finding(False, f"image files of {side.label} that are missing: {missing} of {len(side.rows)}"))
        if side.unreadable:
            count, examples = len(side.unreadable), shorten(side.unreadable, EXAMPLES)
            lines.append(Finding(False, f"images of {side.label} that cannot be read: {count} ({examples})"))
    return lines


# Markdown ----------------------------------------------------------------------------------------------------------


def markdown(audit: Audit) -> str:
    """The report: the summary, and a table for each subject."""
    names = " and ".join(side.label for side in audit.sides)
    found = summarise(audit)
    parts = [f"# Audit of {names}", "## Summary"]
    parts.append("\n".join(f"- **Flagged:** {line.text}." for line in found if line.flagged) or "Nothing is flagged.")
    parts.append("\n".join(f"- {line.text}." for line in found if not line.flagged))
    parts += ["## Sets", _sets(audit.sides)]
    for kind, (name, _) in KINDS.items():
        parts += [f"## {name.capitalize()}", COPIES_TEXT if kind == "near_duplicates" else ""]
        parts += _pair_section(getattr(audit, kind))
    if len(audit.patients):
        parts += ["## Patients in both sets", _patients(audit.patients)]
    parts += ["## Labels by provenance", *_provenance_section(audit)]
    if audit.probes:
        parts += ["## Guess the source", PROBE_TEXT, _probes(audit)]
    if audit.notes:
        parts += ["## Not compared", "\n".join(f"- {note}" for note in audit.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


PROVENANCE_TEXT = (
    "V is Cramér's V, corrected for bias (Bergsma 2013); p, the chi-square test's, takes images for independent. "
    "Guess is the accuracy of the label that is most frequent for an image's provenance, AUROC that of its share of "
    "positives, both learnt on one half of the patients and judged on the other. "
    f"Flagged from V {FLAG_V} or AUROC {FLAG_AUROC}, where p ≤ {FLAG_P:g}."
)
PROBE_TEXT = (
    "A logistic regression on grey images of 32×32 pixels, cross-validated with patients held together; mean AUROC of "
    f"each source against the rest with its 95 % interval over patients. From {READABLE} a network can use the source. "
    "Where the label is decided by the source, part of this may be the disease."
)


COPIES_TEXT = (
    "Copies may be resized, re-compressed and lightly cropped. Measured on copies of 1,000 radiographs of NIH, on "
    "which the thresholds were chosen, too (`benchmarks/near_duplicates.py`): of resized and re-compressed ones 99.9 % "
    "are found, of those with up to 10 % of a side cropped off 99 %, of cropped, padded and re-compressed ones 96 %. "
    "False are 0 of 498,823 pairs of different patients and 1 of 677 pairs of films of one patient."
)


def _sets(sides: Sequence[Side]) -> str:
    header = [
        "set",
        "images",
        "train",
        "validation",
        "test",
        "patients",
        "not used",
        "missing",
        "unreadable",
        "compared",
    ]
    rows = []
    for side in sides:
        splits = [int((side.split == name).sum()) for name in ("train", "validation", "test")]
        patients = len(pd.unique(side.release + "/" + side.patient)) if side.has_patients else "unknown"
        missing = int((~side.present).sum())
        read = [len(side.unreadable), int(side.compared.sum())]
        rows.append([side.label, len(side.rows), *splits, patients, side.unused, missing, *read])
    return _table(header, rows)


def _pair_section(pairs: pd.DataFrame) -> list[str]:
    if pairs.empty:
        return ["None."]
    counted = splits_of(pairs)
    header = ["set", "split", "set", "split", "pairs", "images", "images", "leak"]
    rows = [[*row[:-1], "yes" if row[-1] else ""] for row in counted.itertuples(index=False, name=None)]
    examples = pairs.sort_values("leak", ascending=False, kind="stable").head(EXAMPLES)
    lines = [
        f"- {row.set_a}, {row.split_a}: `{row.path_a}` – {row.set_b}, {row.split_b}: `{row.path_b}`"
        for row in examples.itertuples()
    ]
    return [_table(header, rows), "For example:", "\n".join(lines)]


def _patients(shared: pd.DataFrame) -> str:
    counted = shared.groupby(["release", "splits_a", "splits_b", "leak"]).size().reset_index(name="patients")
    rows = [[*row[:3], "yes" if row[3] else "", row[4]] for row in counted.itertuples(index=False, name=None)]
    return _table(["release", "splits in A", "splits in B", "leak", "patients"], rows)


def _provenance_section(audit: Audit) -> list[str]:
    table = audit.provenance
    if table.empty:
        return ["No column tells provenances apart: source, site, scanner and view are unknown or all the same."]
    strongest = table[~table["flagged"] & (table["split"] == "all")].nlargest(EXAMPLES, "v")
    header = ["set", "label", "provenance", "split", "images", "values", "V", "p", "majority", "guess", "AUROC", "flag"]
    shown: list[Any] = [*table[table["flagged"]].itertuples(), *strongest.itertuples()]
    rows = []
    for row in shown:
        flag = "decided" if row.decided else "flagged" if row.flagged else ""
        auroc = "–" if pd.isna(row.auroc) else f"{row.auroc:.2f}"
        accuracies = _percent(row.majority), _percent(row.guess)
        facts = row.set, row.label, row.provenance, row.split, row.images, row.values, f"{row.v:.2f}", f"{row.p:.1g}"
        rows.append([*facts, *accuracies, auroc, flag])
    parts = [PROVENANCE_TEXT, _table(header, rows)]
    for (where, label, kind), counted in audit.contingency.items():
        top = counted.sum().nlargest(VALUES).index
        more = f" (the {VALUES} most frequent of {counted.shape[1]})" if counted.shape[1] > VALUES else ""
        parts.append(f"{where}: {label} by {kind}{more}, images:")
        named = [[name, *row] for name, row in zip(counted.index, counted[top].to_numpy(), strict=True)]
        parts.append(_table([label, *top], named))
    return parts


def _probes(audit: Audit) -> str:
    header = ["set", "provenance", "sources", "images", "balanced accuracy", "chance", "AUROC", "95 % interval"]
    rows = []
    for name, probe in audit.probes:
        accuracies = _percent(probe.balanced_accuracy), _percent(probe.chance)
        interval = f"{probe.low:.2f}–{probe.high:.2f}"
        sources = shorten(probe.values, 4)
        rows.append([name, probe.provenance, sources, probe.images, *accuracies, f"{probe.auroc:.2f}", interval])
    return _table(header, rows)


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _percent(value: float) -> str:
    return "–" if pd.isna(value) else f"{100 * value:.0f} %"


def _place(split: str) -> str:
    return "all splits" if split == "all" else split
