"""rank --data TARGET --weights W1 W2 ...: which weights to transfer, by scores that need no training on the target."""

import argparse
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studies import display
from studies.commands.similarity import (
    DATA_EPILOG,
    SCRATCH,
    WEIGHTS_HELP,
    add_shared_options,
    layers_of,
    short_name,
    split_data_words,
    training_rows,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from studies.features import FeatureSet

TITLES = {
    "logme": "LogME",
    "leep": "LEEP",
    "n_leep": "N-LEEP",
    "knn": "kNN",
    "linear_probe": "linear probe",
    "linear_cka": "CKA",
    "minibatch_cka": "CKA, unbiased",
    "one_minus_imbalance_to": "1 − Δ(W → R)",
    "one_minus_imbalance_from": "1 − Δ(R → W)",
    "overlap": "overlap",
}
"""Measures, of which higher is better; the last five are similarities of weights W to the reference R."""

FILES = ("ranking.csv", "judgement.csv")


def run(words: Sequence[str]) -> None:
    """Score the candidates on training images of the target, order them, and hold the orders against results.

    Raises:
        DataError: The data, the weights or the results cannot be used (exit code 2).
    """
    words, settings = split_data_words(words[1:])
    options = _parser().parse_args(words)
    # Only now: --help and mistakes in the options need none of the heavy packages.
    import pandas as pd

    from studies import ranking
    from studies.commands.describe import make_folder
    from studies.data_argument import build_data
    from studies.results import write_csv

    candidates = list(dict.fromkeys(options.weights))
    data = build_data(options.data, settings, "rank")
    hashes = {weights: _hash(weights) for weights in candidates}
    target = options.target or data.name
    achieved = _achieved(options, target, hashes) if options.results else None
    rows = training_rows(data, options.images, options.seed)
    folder = options.output or Path("ranking") / data.name
    make_folder(folder)
    table = data.read_table()
    patients = pd.factorize(table.groups[rows])[0] if table.grouped else None
    whole = options.reference is not None
    reference = layers_of(options.reference, data, rows, options.backbone, whole=True) if whole else {}
    scores = {}
    for weights in candidates:
        display.say(f"{weights}: {len(rows):,} training images of {data.name}")
        layers = layers_of(weights, data, rows, options.backbone, whole=whole)
        last = list(layers.values())[-1]
        scores[weights] = {**label_scores(weights, last, patients, options.seed), **likeness(layers, reference)}
    frame = pd.DataFrame.from_dict(scores, orient="index")
    places = ranking.orderings(frame)
    facts = {"data": data.name, "images": len(rows), "seed": options.seed}
    tidy = frame.melt(var_name="measure", value_name="score", ignore_index=False)
    tidy = tidy.assign(place=places.melt()["value"].to_numpy()).rename_axis("weights").reset_index()
    tidy.insert(1, "weights_hash", tidy["weights"].map(hashes))
    write_csv(tidy.assign(**facts), folder / FILES[0])
    _show_scores(frame, places)
    if achieved is not None:
        judged = judge_all(frame, achieved)
        write_csv(judged.assign(data=data.name), folder / FILES[1])
        _show_judgement(judged)
    display.say(f"written to {folder}: {', '.join(FILES[: 1 if achieved is None else 2])}")


def label_scores(
    weights: str, features: "FeatureSet", patients: "np.ndarray | None", seed: int = 0
) -> dict[str, float]:
    """Scores of how the features of the last layer go with the labels; NaN where a measure does not apply.

    LEEP needs a source classifier of exclusive classes; N-LEEP stands beside it for all, not in its place: the two are
    not on one scale.
    """
    from studies import transferability

    values, labels = features.values, features.labels
    probabilities = source_probabilities(weights, values)
    return {
        "logme": transferability.logme(values, labels),
        "leep": float("nan") if probabilities is None else transferability.leep(probabilities, labels),
        "n_leep": transferability.n_leep(values, labels, seed=seed),
        "knn": transferability.knn_score(values, labels, patients),
        "linear_probe": transferability.probe_score(values, labels, patients, seed=seed),
    }


def likeness(layers: "Mapping[str, FeatureSet]", reference: "Mapping[str, FeatureSet]") -> dict[str, float]:
    """Similarity to a reference net, mean over the layers of equal name, of the last ones where none is equal."""
    from studies.representations import compare

    if not reference:
        return {}
    pairs = [(name, name) for name in layers if name in reference] or [(list(layers)[-1], list(reference)[-1])]
    found = [compare({a: layers[a].values}, {b: reference[b].values}).iloc[0] for a, b in pairs]

    def mean(measure: str) -> float:
        return float(sum(row[measure] for row in found) / len(found))

    return {
        "linear_cka": mean("linear_cka"),
        "minibatch_cka": mean("minibatch_cka"),
        "one_minus_imbalance_to": 1 - mean("imbalance_ab"),
        "one_minus_imbalance_from": 1 - mean("imbalance_ba"),
        "overlap": mean("overlap"),
    }


def source_probabilities(weights: str, features: "np.ndarray") -> "np.ndarray | None":
    """What the source's own classifier says of the images, (N, Z); None where it has none of exclusive classes.

    timm's classifiers are of exclusive classes, a run's checkpoint says whether its are; other files do not say.
    """
    import numpy as np
    from scipy.special import softmax

    from lightning_modules.backbones import read_weights
    from lightning_modules.backbones.factory import default_config

    if weights == SCRATCH:
        return None
    source = read_weights(weights)
    name = default_config(source.architecture).classifier if source.architecture else None
    weight, bias = (source.state.get(f"{name}.{leaf}") for leaf in ("weight", "bias"))
    if weight is None or bias is None or not _is_exclusive(source.origin):
        return None
    matrix = weight.flatten(1).float().numpy()  # linear, or a convolution over one pixel
    if len(matrix) < 2 or matrix.shape[1] != features.shape[1]:
        return None
    return np.asarray(softmax(features @ matrix.T + bias.float().numpy(), axis=1))


def judge_all(scores: "pd.DataFrame", achieved: "pd.DataFrame") -> "pd.DataFrame":
    """Judge the orderings in every setting of `ranking.achievements`: its settings beside the rows of `ranking.judge`.

    The columns of `achieved` that are no settings are candidates, the index of `scores`.
    """
    import pandas as pd

    from studies import ranking

    parts = []
    for _, row in achieved.iterrows():
        judged = ranking.judge(scores, row[list(scores.index)].astype(float))
        judged.insert(0, "setting", ranking.setting_name(row))
        parts.append(judged.assign(**{name: row[name] for name in ranking.SETTING}))
    return pd.concat(parts, ignore_index=True)


def _achieved(options: argparse.Namespace, target: str, hashes: Mapping[str, str]) -> "pd.DataFrame":
    """Results of the candidates, one column each, from a table of result rows or a study's folder."""
    from datamodules.errors import DataError, closest
    from studies import ranking
    from studies.results import read_csv
    from studies.store import collect
    from studies.study_report import headline_metrics

    path = options.results
    table = path / "results.csv" if (path / "results.csv").is_file() else path
    # Of a study's folder the runs count, which a table beside them may lag behind.
    frame = collect(path) if table.is_dir() or any(path.glob("*/summary.json")) else read_csv(table)
    targets = sorted(frame["target"].dropna().unique())
    if target not in targets:
        near = closest(target, targets)
        raise DataError(
            f"{path} has no results on {target}",
            where="--results",
            valid=targets or "none: it has no rows",
            hint=f"name the target as its study does: --target {near or 'NAME'}",
        )
    metric = options.metric
    if metric is None and headline_metrics(frame[frame["target"] == target])[target] == "mean_auroc":
        metric = "mean_auroc"  # accuracy hides rare labels
    found = ranking.achievements(frame, target, list(hashes.values()), metric, options.backbone)
    if found.empty:
        raise DataError(
            f"{path} has no setting in which two or more of these weights were transferred to {target}",
            where="--results",
            valid=f"rows whose weights_hash is {' or '.join(hashes.values())}",
            hint="the hash is of the backbone's tensors: name the weights that the transfers started from",
        )
    settings = found[list(ranking.SETTING)]
    return settings.assign(**{name: found[text] for name, text in hashes.items()})


def _hash(weights: str) -> str:
    from lightning_modules.backbones import weights_hash

    return SCRATCH if weights == SCRATCH else weights_hash(weights)


def _is_exclusive(origin: str) -> bool:
    """Whether the classifier of these weights is known to tell exclusive classes apart."""
    import torch

    if not origin.endswith(".ckpt"):
        return origin.startswith(("timm:", "hf-hub:"))
    with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of other people's scripts
        content = torch.load(origin, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(origin))
    facts = content.get("hyper_parameters")
    return isinstance(facts, Mapping) and facts.get("task") == "multiclass"


def _show_scores(scores: "pd.DataFrame", places: "pd.DataFrame") -> None:
    """Print the candidates, best by LogME first: each score and in brackets its place."""
    import pandas as pd

    from studies.commands.describe import show

    order = scores.sort_values("logme", ascending=False).index
    names = [short_name(str(weights)) for weights in order]
    for title, part in (("Scores on the labels", list(TITLES)[:5]), ("Likeness to the reference", list(TITLES)[5:])):
        measures = [name for name in part if name in scores]
        text = pd.DataFrame(
            {
                TITLES[name]: [
                    "–" if pd.isna(score) else f"{score:.3f} ({place:g})"
                    for score, place in zip(scores.loc[order, name], places.loc[order, name], strict=True)
                ]
                for name in measures
            }
        )
        if measures:
            text.insert(0, "weights", names if len(set(names)) == len(names) else list(order))
            show(f"{title}; in brackets the place, higher scores are better", text)


def _show_judgement(judged: "pd.DataFrame") -> None:
    """Print Kendall's τ and the regret of every measure, mean over the settings."""
    from studies.commands.describe import show
    from studies.report_text import points

    settings = list(dict.fromkeys(judged["setting"]))
    means = judged.groupby("measure", sort=False).agg(n=("n", "max"), tau=("tau", "mean"), regret=("regret", "mean"))
    text = means.assign(
        n=means["n"].astype(str),
        tau=["–" if value != value else f"{value:+.2f}" for value in means["tau"]],
        regret=["–" if value != value else points(value) for value in means["regret"]],
    )
    text.insert(0, "measure", [TITLES.get(name, name) for name in text.index])
    named = settings[0] if len(settings) == 1 else f"mean over {len(settings)} settings"
    columns = {"n": "candidates", "tau": "Kendall's τ", "regret": "regret (points)"}
    show(f"Held against the transfers: {named}", text.rename(columns=columns))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py rank",
        description="Order weights by how well they should transfer, from features of the target's training images "
        "alone (never its test images): LogME, LEEP, N-LEEP, nearest neighbours, a linear probe; and with --reference "
        "the similarity to a net trained on the target. With --results, how right each order was: Kendall's τ and "
        "regret, the points lost by transferring its first instead of the best.",
        epilog=DATA_EPILOG,
    )
    parser.add_argument("--weights", nargs="+", required=True, metavar="W", help=f"candidates: {WEIGHTS_HELP}")
    parser.add_argument("--reference", metavar="R", help="a net trained on the target from scratch")
    parser.add_argument("--results", type=Path, help="results.csv, or the folder of a study, with transfers of these")
    parser.add_argument("--target", help="name of the target in the results (the data set's)")
    parser.add_argument("--metric", help="metric of the results (accuracy; mean_auroc of labels)")
    add_shared_options(parser, "ranking/TARGET")
    return parser
