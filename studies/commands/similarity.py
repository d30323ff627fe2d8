"""similarity A B: how alike two networks see the same images, layer by layer."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studies import display

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    from datamodules.base import BaseDataModule
    from studies.features import FeatureSet

DATA_EPILOG = "Settings of the data set: --data.NAME VALUE, such as --data.root FOLDER or --data.image_size 128."
SCRATCH = "scratch"  # in the place of weights: a net as training from scratch begins, a control
WEIGHTS_HELP = f"a run, a weights file, a timm name, or {SCRATCH} (an untrained net; needs --backbone)"
TITLES = {
    "linear_cka": "CKA",
    "minibatch_cka": "CKA, unbiased",
    "imbalance_ab": "Δ(A → B)",
    "imbalance_ba": "Δ(B → A)",
    "overlap": "overlap",
}
MAX_NUMBERED = 9  # layers of a heat map whose cells are large enough for numbers
FILES = ("similarity.csv", "similarity.png", "similarity.svg", "similarity.pdf")


def run(words: Sequence[str]) -> None:
    """Compare layers, write the table and the heat map, and print the layers of equal name.

    Raises:
        DataError: The data or the weights cannot be used (exit code 2).
    """
    words, settings = split_data_words(words[1:])
    options = _parser().parse_args(words)
    # Only now: --help and mistakes in the options need none of the heavy packages.
    from studies import figures, representations
    from studies.commands.describe import make_folder
    from studies.data_argument import build_data
    from studies.results import write_csv

    data = build_data(options.data, settings, "similarity")
    rows = training_rows(data, options.images, options.seed)
    folder = options.output or Path("similarity") / "_".join(map(short_name, (options.a, options.b)))
    make_folder(folder)
    sides = []
    for weights in (options.a, options.b):
        display.say(f"{weights}: features of {len(rows):,} training images of {data.name}")
        sides.append(layers_of(weights, data, rows, options.backbone, whole=options.layers == "all"))
    a, b = ({name: layer.values for name, layer in side.items()} for side in sides)
    table = representations.compare(a, b, k=options.neighbours, seed=options.seed)
    facts = {"a": options.a, "b": options.b, "data": data.name, "images": len(rows), "neighbours": options.neighbours}
    write_csv(table.assign(**facts)[[*facts, *table.columns]], folder / FILES[0])
    figures.save(heat_map(table, options.a, options.b), folder / "similarity")
    show_matching(table)
    display.say(f"written to {folder}: {', '.join(FILES)}")


def split_data_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--data.NAME VALUE` out of the words: (the others, these)."""
    rest: list[str] = []
    settings: list[str] = []
    waiting = False
    for word in words:
        (settings if waiting or word.startswith("--data.") else rest).append(word)
        waiting = not waiting and word.startswith("--data.") and "=" not in word
    return rest, settings


def training_rows(data: "BaseDataModule", images: int, seed: int) -> "np.ndarray":
    """Draw training images at natural prevalence: table rows int64, ascending; all where there are no more."""
    from datamodules import few_shot

    rows = data.rows("train")
    if len(rows) <= images:
        return rows
    return rows[few_shot.subset(data.read_table().labels[rows], num_images=images, seed=seed)]


def layers_of(
    weights: str, data: "BaseDataModule", rows: "np.ndarray", backbone: str | None, *, whole: bool = False
) -> "dict[str, FeatureSet]":
    """Features of the last layer group, or of the whole net's, by group from input to output."""
    from lightning_modules.backbones import create_backbone, layer_groups, read_weights
    from studies.features import extract_features

    source = None if weights == SCRATCH else weights
    stated = read_weights(source).architecture if source is not None else None
    backbone = stated or backbone  # the option is meant for weights that do not say theirs
    groups = None
    if whole and backbone is not None:  # without one the extraction says what is missing
        groups = [group.name for group in layer_groups(create_backbone(backbone, 0))]
    found = extract_features(source, data, rows, backbone=backbone, groups=groups)
    return {name: found[name] for name in groups} if groups else found


def short_name(weights: str) -> str:
    """A name that can be a folder's: of a run its folder, of a file its stem, of timm's or the hub's the last part."""
    path = Path(weights)
    name = path.stem if path.is_file() else path.resolve().name if path.exists() else path.name
    if path.parent.name == "checkpoints":  # a run's, where all are called last.ckpt
        name = f"{path.resolve().parent.parent.name}-{name}"
    return name.replace(":", "-") or "weights"


def show_matching(table: "pd.DataFrame") -> None:
    """Print the measures of layers that bear the same name in both nets; of the last ones where none does."""
    from studies.commands.describe import show

    same = table[table["layer_a"] == table["layer_b"]]
    shown = same if len(same) else table.tail(1)
    text = shown[list(TITLES)].map(lambda value: "–" if value != value else f"{value:.3f}").rename(columns=TITLES)
    text.insert(0, "layer", shown["layer_a"].where(shown["layer_a"] == shown["layer_b"], "last of each"))
    show("Linear CKA and neighbourhood overlap: 1 is alike; information imbalance Δ: 0 is alike", text)


def heat_map(table: "pd.DataFrame", name_a: str, name_b: str) -> "Figure":
    """Draw a panel for each measure: layers of A as rows, of B as columns, the input at the bottom left.

    Args:
        table: From `representations.compare`.
        name_a: What A is called.
        name_b: What B is called.

    Returns:
        A figure that belongs to no window and needs no closing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from studies.figures import LABEL_SIZE, RC

    layers_a, layers_b = (list(dict.fromkeys(table[column])) for column in ("layer_a", "layer_b"))
    side = min(4.0, 1.0 + 0.32 * max(len(layers_a), len(layers_b)))  # inches of a panel
    with matplotlib.rc_context({**RC, "axes.grid": False}):
        figure = Figure(figsize=(len(TITLES) * (side + 0.35) + 1.2, side + 1.3), layout="constrained")
        panels = figure.subplots(1, len(TITLES), sharey=True)
        for axes, (measure, title) in zip(panels, TITLES.items(), strict=True):
            values = table.pivot(index="layer_a", columns="layer_b", values=measure).loc[layers_a, layers_b].to_numpy()
            # cividis: even steps of lightness to colour-blind eyes, too.
            image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
            axes.set_title(f"{title}: 0 is alike" if measure.startswith("imbalance") else title, loc="left")
            axes.set_xticks(range(len(layers_b)), layers_b, rotation=90)
            axes.set_yticks(range(len(layers_a)), layers_a)
            axes.tick_params(length=0)
            if max(values.shape) <= MAX_NUMBERED:
                for (row, column), value in zip(_places(values), values.flat, strict=True):
                    colour = "white" if value <= 0.5 else "black"  # NaN is a white cell
                    text = "–" if value != value else f"{value:.2f}".replace("-0.00", "0.00")
                    axes.text(column, row, text, ha="center", va="center", size=LABEL_SIZE - 2, color=colour)
        panels[0].set_ylabel(f"A: {short_name(name_a)}")
        figure.supxlabel(f"B: {short_name(name_b)}", fontsize=RC["axes.labelsize"])
        bar = figure.colorbar(image, ax=list(panels), fraction=0.02, pad=0.01)
        bar.outline.set_visible(False)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # the layout is done: not paid for again in every file
    return figure


def _places(values: "np.ndarray") -> list[tuple[int, int]]:
    return [(row, column) for row in range(values.shape[0]) for column in range(values.shape[1])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py similarity",
        description="Compare two networks layer by layer on training images of a data set: linear CKA, information "
        "imbalance both ways, neighbourhood overlap; as a table (CSV) and a heat map (PNG, SVG, PDF).",
        epilog=DATA_EPILOG,
    )
    parser.add_argument("a", metavar="A", help=WEIGHTS_HELP)
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument("--layers", choices=("all", "last"), default="all", help="every layer group, or the last (all)")
    parser.add_argument("--neighbours", type=count, default=10, metavar="K", help="neighbours of the overlap (10)")
    add_shared_options(parser, "similarity/A_B")
    return parser


def add_shared_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add what `similarity` and `rank` have in common: the data, the draw of images, the output."""
    parser.add_argument("--data", required=True, help="target: a class name, or a YAML file with a data section")
    parser.add_argument("--images", type=count, default=2000, help="training images at most, drawn at random (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--backbone", help="timm model of weights that do not say theirs")
    parser.add_argument("--output", type=Path, help=f"folder of the files ({folder})")


def count(text: str) -> int:
    """A positive number of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return value
