"""The answer in words: what the first lines of a page may say, and no more than the tests allow."""

from typing import Any

import pandas as pd

from studies.comparisons import DEPTHS
from studies.depth import PLACE, depth_values, regrets
from studies.report_text import budget, in_words, mean_sd, metric_name, points, records
from studies.sections.material import Material, joined, turned
from studies.statistics import BUDGET, summarise, varying

POLICIES = {
    "freeze all": "freezing all",
    "fine-tune all": "fine-tuning all",
    "from scratch": "training from scratch",
}
MOST = 7  # sentences about results; the sections have the others


def answer(material: Material) -> list[str]:
    """Sentences that answer "which source, and does it help", at the smallest and the largest budget of each target.

    The first one sums up all comparisons; of a sweep of depths, all policies.
    """
    rows = material.rows
    if rows.empty:
        return ["No cell has a result yet."]
    sentences, where = _depths(material), "Depth of transfer"
    if not sentences:
        where = "What differs"
        for _, part in rows.groupby("target", sort=True):
            mine = material.main_protocol(part)
            given = [str(name) for name in mine["given"].cat.categories if (mine["given"] == name).any()]
            for name in dict.fromkeys([given[0], given[-1]]):
                sentences += _best_source(material, mine[mine["given"] == name], name)
        sentences = [*_overview(material), *sentences]
    more = len(sentences) - MOST
    if more > 0:
        sentences = [*sentences[:MOST], f"More targets and budgets ({more}) are in the section “{where}”."]
    return [*sentences, *scope(material)]


def _overview(material: Material) -> list[str]:
    """All comparisons with the baseline in one sentence; nothing where there are none."""
    table = material.comparisons
    table = table[table["source_reference"] == material.baseline] if len(table) else table
    if table.empty:
        return []
    names, number = table["source"].unique(), f"{len(table)} comparison{'s' if len(table) > 1 else ''}"
    higher, lower, same = (table[table["verdict"] == word] for word in ("higher", "lower", "not distinguishable"))
    who = str(names[0]) if len(names) == 1 else f"the {len(names)} sources"
    if len(same) == len(table):
        return [f"Nothing tells {who} from {material.baseline}: {number}, not distinguishable{_range(same)}."]
    silent = len(table) - len(higher) - len(lower) - len(same)
    found = [
        (f"higher in {len(higher)}", _range(higher) if len(higher) else "", len(higher)),
        (f"lower in {len(lower)}", _range(lower) if len(lower) else "", len(lower)),
        (f"not distinguishable in {len(same)}", "", len(same)),
        (f"without a claim in {silent}", ", where seeds give no interval", silent),
    ]
    claims = [(words, more) for words, more, count in found if count]
    (words, more), *others = claims
    claimed = [f"{words} of {number}{more}", *(words + more for words, more in others)]
    return [f"Against {material.baseline}, {who} {'is' if len(names) == 1 else 'are'} {joined(claimed)}."]


def _range(table: pd.DataFrame) -> str:
    low, high = (points(float(value), sign=True) for value in (table["difference"].min(), table["difference"].max()))
    return f" (by {low} points)" if low == high else f" (by {low} to {high} points)"


def _depths(material: Material) -> list[str]:
    """Of a sweep of depths: what fixed policies lose at the smallest and the largest budget of each target."""
    values = depth_values(material.rows.assign(source=material.rows["family"]))
    if values.empty:
        return []
    lost = regrets(values)
    if lost.empty:
        return []
    lost["rank"] = pd.Series([budget(*(row[name] for name in BUDGET)) for row in records(lost)], dtype=object)
    least = lost.loc[lost.groupby(list(PLACE), dropna=False)["regret"].idxmin(), "policy"]
    counts = [(word, int((least == name).sum())) for name, word in POLICIES.items()]
    best = [f"{word} in {count}" for word, count in sorted(counts, key=lambda pair: -pair[1]) if count]
    settings = f"{len(least)} setting{'s' if len(least) > 1 else ''}"
    sentences = [f"Of the fixed policies, the one that loses least on average, in {settings}: {', '.join(best)}."]
    beside = [name for name in PLACE if name not in ("target", "source", "metric", *BUDGET)]
    beside = varying(lost, ["target", "source", *BUDGET, "policy"], beside)
    for (target, source, *others), part in lost.groupby(["target", "source", *beside], sort=True, dropna=False):
        way = f" ({', '.join(map(str, others))})" if others else ""
        for rank in dict.fromkeys([part["rank"].min(), part["rank"].max()]):
            mine = {row["policy"]: row for row in records(part[part["rank"] == rank])}
            losses = [f"{word} loses {_loss(mine[name])}" for name, word in POLICIES.items() if name in mine]
            if losses:
                place = f"On {target}{in_words(rank[1])} from {source}{way}"
                sentences.append(f"{place}, against the best depth: {', '.join(losses)} points.")
    return sentences


def _loss(row: dict[str, Any]) -> str:
    return f"{points(row['regret'])} [{points(row['low'])}, {points(row['high'])}]"


def _best_source(material: Material, rows: pd.DataFrame, given: str) -> list[str]:
    """The source with the highest mean at one budget, and from which others it can be told apart."""
    means = summarise(rows, ["source"]).sort_values("mean", ascending=False)
    if means.empty or means["mean"].isna().all():
        return []
    best, metric = records(means)[0], metric_name(str(rows["metric"].iloc[0]))
    place = f"On {rows['target'].iloc[0]}{in_words(given)}{_way(material, rows)}"
    reached = f"{mean_sd(best['mean'], best['sd'])} %"
    if len(means) == 1:
        return [f"{place}, {best['source']} reaches {reached} {metric}."]
    pairs = _against(_comparisons(material, rows, given), str(best["source"]))
    parts = []
    sure = [pair for pair in pairs if pair["verdict"] == "higher"]
    unsure = [pair for pair in pairs if pair["verdict"] == "not distinguishable"]
    silent = [pair["other"] for pair in pairs if "no claim" in pair["verdict"]]
    if sure:
        first = next((pair for pair in sure if pair["other"] == material.baseline), sure[0])
        others = [pair["other"] for pair in sure if pair is not first]
        more = f", and above {joined(others)}" if others else ""
        parts.append(f"above {first['other']} by {_difference(first)}{more}")
    if unsure:
        only = f" ({_difference(unsure[0])}, p {unsure[0]['p_holm']:.2g})" if len(unsure) == 1 else ""
        parts.append(f"not distinguishable from {joined([pair['other'] for pair in unsure])}{only}")
    if silent:
        parts.append(f"no claim against {joined(silent)} (too few seeds, or none that change anything)")
    start = f"{place}, {best['source']} has the highest {metric}, {reached}"
    return [f"{start}: {'; '.join(parts)}." if parts else f"{start}; nothing pairs with it, so no claim."]


def _way(material: Material, rows: pd.DataFrame) -> str:
    """What a sentence must name where the study has several: protocol, architecture, size of the images."""
    others = _others(material, rows)
    first = (others if len(others) else rows).iloc[0]
    words = {"protocol": " by {}", "architecture": " with {}", "image_size": " at {} pixels"}
    every = _others(material, material.rows)
    if every.loc[every["target"] == first["target"], "image_size"].nunique() < 2:  # each target may have its own
        del words["image_size"]
    return "".join(
        text.format(first[name]) for name, text in words.items() if every[name].nunique() > 1 and pd.notna(first[name])
    )


def _others(material: Material, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that are not of the baseline."""
    return rows[~rows["source"].eq(material.baseline).fillna(False).astype(bool)]


def _difference(pair: dict[str, Any]) -> str:
    return f"{points(pair['difference'], sign=True)} [{points(pair['low'])}, {points(pair['high'])}] points"


def _comparisons(material: Material, rows: pd.DataFrame, given: str) -> pd.DataFrame:
    """Comparisons in the setting of some rows, their p corrected with all others."""
    table = material.comparisons
    if table.empty:
        return table
    others = _others(material, rows)
    first = (others if len(others) else rows).iloc[0]
    mine = table["given"] == given
    for name in ("target", "architecture", "protocol", "image_size", "selection", *DEPTHS):
        mine &= table[name].isna() if pd.isna(first[name]) else table[name].eq(first[name]).fillna(False).astype(bool)
    return table[mine]


def _against(table: pd.DataFrame, best: str) -> list[dict[str, Any]]:
    """Comparisons of one source with the others, its differences upwards; "other" is whom it is compared with."""
    table = table[(table["source"] == best) | (table["source_reference"] == best)] if len(table) else table
    if table.empty:
        return []
    table = turned(table, table["source"].ne(best).to_numpy(dtype=bool))
    return records(table.assign(other=table["source_reference"].astype(str)))


def scope(material: Material) -> list[str]:
    """For what the claims hold: one pre-training, one seed, cells that are missing."""
    rows = material.rows
    others = _others(material, rows)
    runs = rows.drop_duplicates("run")
    leaks = runs["guard"].fillna("").str.contains("LEAK") | runs["split_policy"].fillna("").str.contains("LEAK")
    sentences = []
    if leaks.any():
        sentences.append(
            f"Beware: {int(leaks.sum())} of {len(runs)} runs are marked as leaking, so their numbers may be too high; "
            "the section “Provenance” says why."
        )
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
