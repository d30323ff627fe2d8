"""The answer in words: what the first lines of a page may say, and no more than the tests allow."""

from typing import Any

import pandas as pd

from studies.depth import depth_values, regrets
from studies.report_text import budget, in_words, mean_sd, points, records
from studies.sections.material import Material, joined
from studies.statistics import BUDGET, summarise

POLICIES = {
    "freeze all": "freezing all",
    "fine-tune all": "fine-tuning all",
    "from scratch": "training from scratch",
}
MOST = 6  # sentences about targets; the sections have the others


def answer(material: Material) -> list[str]:
    """Sentences that answer "which source, and does it help", at the smallest and the largest budget of each target."""
    rows = material.rows
    if rows.empty:
        return ["No cell has a result yet."]
    sentences = _depths(material)
    for _, part in rows.groupby("target", sort=True) if not sentences else ():
        mine = material.main_protocol(part)
        given = [str(name) for name in mine["given"].cat.categories if (mine["given"] == name).any()]
        for name in dict.fromkeys([given[0], given[-1]]):
            sentences += _best_source(material, mine[mine["given"] == name], name)
    more = sentences[MOST:]
    sentences = sentences[:MOST]
    if more:
        sentences.append(f"{len(more)} more such sentences stand in the section on what differs.")
    return [*sentences, *scope(material)]


def _depths(material: Material) -> list[str]:
    """Of a sweep of depths: what fixed policies lose at the smallest and the largest budget of each target."""
    values = depth_values(material.rows.assign(source=material.rows["family"]))
    if values.empty:
        return []
    lost = regrets(values)
    lost["rank"] = pd.Series([budget(*(row[name] for name in BUDGET)) for row in records(lost)], dtype=object)
    sentences = []
    for (target, source), part in lost.groupby(["target", "source"], sort=True):
        for rank in dict.fromkeys([part["rank"].min(), part["rank"].max()]):
            mine = {row["policy"]: row for row in records(part[part["rank"] == rank])}
            losses = [f"{word} loses {_loss(mine[name])}" for name, word in POLICIES.items() if name in mine]
            if losses:
                sentences.append(
                    f"On {target}{in_words(rank[1])} from {source}, against the best depth: {', '.join(losses)} points."
                )
    return sentences


def _loss(row: dict[str, Any]) -> str:
    return f"{points(row['regret'])} [{points(row['low'])}, {points(row['high'])}]"


def _best_source(material: Material, rows: pd.DataFrame, given: str) -> list[str]:
    """The source with the highest mean at one budget, and from which others it can be told apart."""
    baseline = material.baseline
    means = summarise(rows, ["source"]).sort_values("mean", ascending=False)
    if means.empty or means["mean"].isna().all():
        return []
    target, metric = rows["target"].iloc[0], str(rows["metric"].iloc[0]).replace("_", " ").replace("auroc", "AUROC")
    best = records(means)[0]
    ways = rows.loc[~rows["source"].eq(baseline).fillna(False).astype(bool), "protocol"]
    way = f" by {ways.iloc[0]}" if material.protocols > 1 and len(ways) else ""
    place = f"On {target}{in_words(given)}{way}"
    start = f"{place}, {best['source']} has the highest {metric}, "
    start += f"{mean_sd(best['mean'], best['sd'])} %"
    if len(means) == 1:
        return [
            f"On {target}{in_words(given)}, {best['source']} reaches {mean_sd(best['mean'], best['sd'])} % {metric}."
        ]
    pairs = _against(_comparisons(material, rows, given), str(best["source"]))
    parts = []
    sure = [pair for pair in pairs if pair["verdict"] == "higher"]
    unsure = [pair["other"] for pair in pairs if pair["verdict"] == "not distinguishable"]
    silent = [pair["other"] for pair in pairs if "no claim" in pair["verdict"]]
    if sure:
        first = next((pair for pair in sure if pair["other"] == baseline), sure[0])
        gain = f"{points(first['difference'], sign=True)} [{points(first['low'])}, {points(first['high'])}] points"
        others = [pair["other"] for pair in sure if pair is not first]
        parts.append(f"above {first['other']} by {gain}" + (f", and above {joined(others)}" if others else ""))
    if unsure:
        parts.append(f"not distinguishable from {joined(unsure)}")
    if silent:
        parts.append(f"no claim against {joined(silent)} (too few seeds)")
    return [f"{start}: {'; '.join(parts)}." if parts else f"{start}; nothing pairs with it, so no claim."]


def _comparisons(material: Material, rows: pd.DataFrame, given: str) -> pd.DataFrame:
    """Comparisons on the target, architecture and protocol of some rows, their p corrected with all others."""
    table = material.comparisons
    if table.empty:
        return table
    others = rows[~rows["source"].eq(material.baseline).fillna(False).astype(bool)]
    first = (others if len(others) else rows).iloc[0]
    mine = table["given"] == given
    for name in ("target", "architecture", "protocol"):
        if name in table:
            mine &= table[name] == first[name]
    return table[mine]


def _against(table: pd.DataFrame, best: str) -> list[dict[str, Any]]:
    """Comparisons of one source with the others, its differences upwards."""
    found = []
    for row in records(table):
        if best not in (row["source"], row["source_reference"]):
            continue
        turned = row["source"] != best
        verdict = str(row["verdict"])
        if turned:
            verdict = {"higher": "lower", "lower": "higher"}.get(verdict, verdict)
            row = {**row, "difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
        other = row["source"] if turned else row["source_reference"]
        found.append({**row, "verdict": verdict, "other": str(other)})
    return found


def scope(material: Material) -> list[str]:
    """For what the claims hold: one pre-training, one seed, cells that are missing."""
    rows = material.rows
    others = rows[~rows["source"].eq(material.baseline).fillna(False).astype(bool)]
    sentences = []
    if len(others):
        trained = others.groupby(["source", "architecture"], dropna=False)["pretrain_seed"].nunique()
        if (trained <= 1).all():
            sentences.append("Each source was pre-trained once: what is said of sources holds for these weights only.")
        elif (trained <= 1).any():
            sentences.append("Some sources were pre-trained once: what is said of them holds for these weights only.")
    if rows["seed"].nunique() < 2:
        sentences.append("There is one seed, so nothing can be told apart.")
    if material.failures:
        sentences.append("Some cells have no result; the last section names them.")
    return sentences
