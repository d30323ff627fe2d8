"""probe --data TARGET --weights W1 W2 ...: what frozen features are worth at few shots, over hundreds of episodes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studies import display
from studies.commands.similarity import DATA_EPILOG, WEIGHTS_HELP, split_data_words

if TYPE_CHECKING:
    import pandas as pd

HEADS = ("ridge", "logistic", "prototype", "knn")
SHOWN = ("accuracy", "mean_auroc")


def run(words: Sequence[str]) -> None:
    """Extract features once, run all episodes, write result rows, tables and figures, and print a summary.

    Raises:
        DataError: The data, the weights or the options cannot be used (exit code 2).
    """
    words, settings = split_data_words(words[1:])
    options = _parser().parse_args(words)
    # Only now: --help and mistakes in the options need none of the heavy packages.
    from studies.commands.describe import make_folder
    from studies.data_argument import build_data
    from studies.episodes import paired_differences, summarise_episodes
    from studies.probe import Plan, name_weights, run_probe
    from studies.report import write_report
    from studies.results import rows_to_frame, write_csv

    weights = name_weights(options.weights)
    data = build_data(options.data, settings, "probe")
    folder = options.output or Path("probe") / data.name
    make_folder(folder)
    plan = Plan(
        heads=options.heads,
        shots=options.shots,
        seeds=options.seeds,
        groups=options.groups,
        backbone=options.backbone,
        split=options.split,
        batch_size=options.batch,
        device=options.device,
    )
    frame = rows_to_frame(run_probe(data, weights, plan, display.say))
    report = write_report(frame, folder, title=f"Probes of frozen features on {data.name}")
    summary = summarise_episodes(frame)
    write_csv(summary, folder / "episodes.csv")
    if len(weights) > 1:
        write_csv(paired_differences(frame, next(iter(weights))), folder / "paired.csv")
    show_summary(summary)
    display.say(f"report:  {report.report}")


def show_summary(summary: "pd.DataFrame") -> None:
    """Print mean and 95 % interval of the headline metric: a row for each features and head, a column a shot level."""
    from studies.commands.describe import show

    metric = next(name for name in SHOWN if (summary["metric"] == name).any())
    part = summary[(summary["metric"] == metric) & summary["class_name"].isna()]
    cells = [
        f"{100 * mean:.1f}" + (f" ± {50 * (high - low):.1f}" if high == high else "")
        for mean, low, high in zip(part["mean"], part["low"], part["high"], strict=True)
    ]
    keys = ["source", "transfer_depth", "protocol"]
    blocks = part["granularity"].eq("block").fillna(False).astype(bool)
    depth = part["transfer_depth"].astype(str).mask(blocks, part["transfer_depth"].astype(str) + " (blocks)")
    part = part.assign(cell=cells, transfer_depth=depth)
    table = part.pivot(index=keys, columns="shots", values="cell")[list(dict.fromkeys(part["shots"]))].fillna("–")
    table = table.reset_index().rename(columns={"transfer_depth": "depth"})
    show(f"{metric.replace('_', ' ')} in percent, mean and 95 % interval over episodes", table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py probe",
        description="Few-shot probes of frozen features. Each image passes through the net once (features are kept in "
        "$FARSHOT_CACHE, up to $FARSHOT_CACHE_GB); an episode is then one small fit, its regularisation chosen inside "
        "it. All weights see the same episodes, so that differences are paired.",
        epilog=DATA_EPILOG,
    )
    parser.add_argument("--data", required=True, metavar="TARGET", help="data set: a class name, or a YAML file")
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="W", help=f"the first is compared: {WEIGHTS_HELP}"
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["ridge"], help="(ridge)")
    parser.add_argument("--shots", nargs="+", default=["1", "5", "10", "full"], metavar="K", help="(1 5 10 full)")
    parser.add_argument("--seeds", type=_positive, default=20, metavar="N", help="episodes a shot level (20)")
    parser.add_argument("--groups", nargs="+", metavar="G", help="layer groups: stem, stage1, ... (the last)")
    parser.add_argument("--backbone", help="timm name, for weights that do not say theirs")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="where heads are judged (test)")
    parser.add_argument("--batch", type=_positive, default=64, metavar="N", help="images a forward pass (64)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--output", type=Path, help="folder of rows, tables and figures (probe/TARGET)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)
