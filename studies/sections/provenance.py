"""Where the numbers come from: versions, splits, labels, checks of the images, and the cells without a result."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from studies.page import Block, Details, Prose, Section, TableBlock
from studies.runs import RunFolder
from studies.sections.material import Material

FACTS = {
    "code_version": "code",
    "split_policy": "split",
    "label_policy": "labels",
    "guard": "source and test images",
    "weights_hash": "weights",
    "selection": "selection",
    "dials": "cuts of the target",
    "source_dials": "cuts of the source",
}


MOST = 50  # cells without a result that are named


def provenance(material: Material) -> Section | None:
    """What the runs record, each value with its number of runs; digests of the data; the study file as it is now."""
    runs = material.frame.drop_duplicates("run")
    rows = [
        {"what": title, "target": str(target), "value": str(value), "runs": count}
        for column, title in FACTS.items()
        for target, value, count in runs.groupby(["target", column])["run"].nunique().reset_index().to_numpy()
    ]
    blocks: list[Block] = [Prose(_sentences(material, runs))]
    if rows:
        blocks.append(material.table(pd.DataFrame(rows), "provenance", "What the runs record."))
    data = pd.DataFrame(_data(material, runs))
    if len(data):
        caption = "Data: SHA-256 of names (and labels) of the images, of one run each; equal digests are equal lists."
        blocks.append(material.table(data, "data", caption))
    blocks.append(
        Prose("All rows: results.csv beside this page. Each run's configuration is in its folder, config.yaml.")
    )
    if material.failures:
        lines = [f"- {failure['cell']}: {failure['reason']}" for failure in material.failures[:MOST]]
        lines += [f"- and {len(material.failures) - MOST} more"] if len(material.failures) > MOST else []
        blocks.append(Prose("Cells without a result:"))
        blocks.append(Prose("\n".join(lines)))
    try:
        text = material.study.path.read_text()
    except OSError:
        return Section("Provenance", blocks)
    frame = pd.DataFrame({"study file": text.splitlines()})
    blocks.append(Details("The study file", [TableBlock(frame, "As it is now.", sortable=False)]))
    return Section("Provenance", blocks)


def _sentences(material: Material, runs: pd.DataFrame) -> str:
    """Rows, versions, and what the guard between source and test images has found or was not asked."""
    versions = runs["code_version"].dropna().unique()
    sentences = [f"{len(material.frame):,} rows from {len(runs):,} runs."]
    if len(versions) > 1:
        sentences.append(f"They mix {len(versions)} versions of the code.")
    leaks = runs["split_policy"].fillna("").str.contains("LEAK") | runs["guard"].fillna("").str.contains("LEAK")
    if leaks.any():
        sentences.append(f"{int(leaks.sum())} runs are marked as leaking; the table says which.")
    silent = int((runs["guard"].isna() & runs["protocol"].ne("pretrain").fillna(True)).sum())
    if silent:
        sentences.append(f"{silent} runs hold no record of whether their source has seen test images.")
    return " ".join(sentences)


def _data(material: Material, runs: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Digests of what each source was trained on and each target is tested on, where the first run still tells."""
    trained = runs[runs["protocol"] == "pretrain"].drop_duplicates(["target", "pretrain_seed"])
    tested = runs[runs["protocol"] != "pretrain"].drop_duplicates("target")
    for what, part in (("source, training", trained), ("target, test", tested)):
        for name, cell in zip(part["target"], part["cell"], strict=True):
            folder = material.run_folder(str(cell))
            found = _training(folder) if what.startswith("source") else _test(folder)
            if found is not None and len(found):
                yield {"what": what, "data": str(name), "images": f"{len(found):,}", "SHA-256": _digest(found)}


def _training(folder: Path) -> pd.DataFrame | None:
    path = folder / "training_images.parquet"
    return pd.read_parquet(path, columns=["dataset", "image"]) if path.is_file() else None


def _test(folder: Path) -> pd.DataFrame | None:
    import pyarrow.parquet as pq

    path = RunFolder(folder).predictions
    if not path.is_file():
        return None
    names = [name for name in pq.read_schema(path).names if name == "label" or name.startswith("label/")]
    rows = pd.read_parquet(path, columns=["id", "split", *names])
    return rows[rows["split"] == "test"].drop(columns="split")


def _digest(rows: pd.DataFrame) -> str:
    """The first 16 digits, whatever the order of the rows."""
    text = rows.astype("string").fillna("").sort_values(list(rows.columns)).to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
