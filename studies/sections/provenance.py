"""Where the numbers come from: versions, splits, labels, checks of the images, and the cells without a result."""

import pandas as pd

from studies.page import Block, Details, Prose, Section, TableBlock
from studies.sections.material import Material

FACTS = {
    "code_version": "code",
    "split_policy": "split",
    "label_policy": "labels",
    "guard": "source and test images",
    "selection": "selection",
    "dials": "cuts of the target",
    "source_dials": "cuts of the source",
}


def provenance(material: Material) -> Section | None:
    """What the runs record, each value with its number of runs; the study file as it is now."""
    frame = material.frame.drop_duplicates("run")
    rows = [
        {"what": title, "target": str(target), "value": str(value), "runs": count}
        for column, title in FACTS.items()
        for target, value, count in frame.groupby(["target", column])["run"].nunique().reset_index().to_numpy()
    ]
    versions = frame["code_version"].dropna().unique()
    sentences = [f"{len(material.frame):,} rows from {frame['run'].nunique():,} runs."]
    if len(versions) > 1:
        sentences.append(f"They mix {len(versions)} versions of the code.")
    leaks = frame["split_policy"].fillna("").str.contains("leak", case=False) | frame["guard"].fillna("").str.contains(
        "leak|seen", case=False
    )
    if leaks.any():
        sentences.append(f"{int(leaks.sum())} runs are marked as leaking; the table says which.")
    hashes = frame.groupby("target")["config_hash"].nunique()
    sentences.append(
        "Configurations that differ, by target: " + ", ".join(f"{name} {count}" for name, count in hashes.items()) + "."
    )
    blocks: list[Block] = [Prose(" ".join(sentences))]
    if rows:
        blocks.append(TableBlock(pd.DataFrame(rows), "What the runs record."))
    blocks.append(
        Prose("All rows: results.csv beside this page. Each run's configuration is in its folder, config.yaml.")
    )
    if material.failures:
        lines = [f"- {failure['cell']}: {failure['reason']}" for failure in material.failures[:50]]
        lines += [f"- and {len(material.failures) - 50} more"] if len(material.failures) > 50 else []
        blocks.append(Prose("Cells without a result:"))
        blocks.append(Prose("\n".join(lines)))
    try:
        text = material.study.path.read_text()
    except OSError:
        return Section("Provenance", blocks)
    frame = pd.DataFrame({"study file": text.splitlines()})
    blocks.append(Details("The study file", [TableBlock(frame, "As it is now.", sortable=False)]))
    return Section("Provenance", blocks)
