"""predict --run R --input FOLDER|CSV|files --output preds.csv: probabilities and decisions for new images."""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from datamodules import io
from datamodules.atomic import replace_file
from datamodules.errors import DataError, UnreadableImageError
from datamodules.transforms import Transform, create_transform
from lightning_modules.classification import Classification
from lightning_modules.thresholds import decide, probabilities
from studies.runs import RunFolder, require_outputs

EXAMPLE = "python cli.py predict --run runs/EXPERIMENT/RUN --input FOLDER --output preds.csv"


def run(words: Sequence[str]) -> None:
    """Predict every readable image; name the unreadable ones at the end.

    Raises:
        DataError: No run, no input, or no image could be read (exit code 2).
    """
    options = parse(words[1:])
    paths = list_inputs(options.input)
    predictor = load_predictor(RunFolder(Path(options.run)))
    ids, logits, unreadable = predict(predictor, paths, options.batch_size)
    if len(ids):
        write(Path(options.output), ids, logits, predictor)
        print(f"{len(ids)} images → {options.output}")
    for problem in unreadable:
        print(f"unreadable: {problem}")
    if not len(ids):
        raise DataError(f"none of the {len(paths)} images could be read", where=", ".join(options.input[:3]))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command's options; without weights there is nothing to predict with."""
    parser = argparse.ArgumentParser(
        prog="cli.py predict", description="Predict images without labels.", epilog=EXAMPLE
    )
    parser.add_argument("--run", help="run folder: its data settings, preprocessing, weights and thresholds are used")
    parser.add_argument("--input", nargs="+", default=[], help="a folder, a CSV with a column of paths, or image files")
    parser.add_argument("--output", default="predictions.csv", help="CSV to write")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time")
    options = parser.parse_args(list(words))
    if not options.run or not options.input:
        lacking = "--run (predicting without weights would be random)" if not options.run else "--input"
        raise DataError(f"predict needs {lacking}", hint=EXAMPLE)
    return options


def list_inputs(inputs: Sequence[str]) -> list[Path]:
    """Image paths of a folder (all below it), of a CSV's first column that is named path, file or image, or as given.

    Raises:
        DataError: A missing input or an empty folder or table.
    """
    paths: list[Path] = []
    for name in map(Path, inputs):
        if name.is_dir():
            paths += [name / path for path in io.list_images(name)]
        elif name.suffix == ".csv":
            paths += _csv_paths(name)
        elif len(inputs) == 1 and not name.exists():
            raise DataError(f"no file or folder {name}", where="--input")
        else:
            paths.append(name)
    if not paths:
        raise DataError(f"no images in {', '.join(inputs)}", where="--input", valid="a folder, a CSV, or image files")
    return paths


def _csv_paths(table: Path) -> list[Path]:
    try:
        frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the table: {error}", where=str(table)) from error
    names = [name for name in frame.columns if name.lower() in ("path", "file", "filename", "image", "id")]
    if not names:
        raise DataError(
            f"no column of paths in {table}",
            where=f"{table}, line 1",
            valid="path, file, filename, image or id",
        )
    return [table.parent / path for path in frame[names[0]]]


@dataclass(frozen=True)
class Predictor:
    """What a run folder says about predicting: no data set is needed.

    Attributes:
        model: The run's selected weights.
        transform: Evaluation transform: (uint8 (H, W, C), seed) → uint8 (C, size, size).
        mode: How images are decoded.
        window: Intensities that become black and white in images deeper than 8 bits.
        thresholds: Probability above which a label is present, one a label; empty for multi-class.
    """

    model: Classification
    transform: Transform
    mode: Literal["rgb", "grey"]
    window: tuple[float, float] | None
    thresholds: list[float]


def load_predictor(folder: RunFolder) -> Predictor:
    """Rebuild model, preprocessing and thresholds from a run folder.

    Raises:
        DataError: The run has not finished, or keeps no weights.
    """
    folder.read_config()
    summary = folder.read_summary()
    if "preprocessing" not in summary:
        raise DataError(f"the fit of {folder.path} has not finished", where="--run", hint="fit it to its end first")
    checkpoint = torch.load(folder.selected_checkpoint(), map_location="cpu", weights_only=True)
    require_outputs(folder, checkpoint["hyper_parameters"])
    model = Classification(**checkpoint["hyper_parameters"])
    model.load_state_dict(checkpoint["state_dict"])
    settings = summary["preprocessing"]
    return Predictor(
        model=model.to("cuda" if torch.cuda.is_available() else "cpu").eval(),
        transform=create_transform(settings["transform"], settings["image_size"], train=False),
        mode="grey" if settings["channels"] == 1 else "rgb",
        window=settings.get("window"),
        thresholds=[float(value) for value in summary["thresholds"]],
    )


@torch.inference_mode()
def predict(predictor: Predictor, paths: Sequence[Path], batch_size: int) -> tuple[list[str], np.ndarray, list[str]]:
    """Logits of the readable images: (their paths, float32 (N, outputs), "path: reason" of the others)."""
    from rich.progress import track

    model = predictor.model
    ids: list[str] = []
    logits: list[np.ndarray] = []
    unreadable: list[str] = []
    starts = range(0, len(paths), batch_size)
    for start in track(starts, description="predicting", disable=len(starts) < 2):
        images = []
        for path in paths[start : start + batch_size]:
            try:
                whole = predictor.transform.whole  # decoded as in the test
                image = io.read_image(path, mode=predictor.mode, window=predictor.window, at_least=whole)
                images.append(predictor.transform(image, 0))
                ids.append(str(path))
            except UnreadableImageError as error:
                unreadable.append(f"{path}: {error.problem}")
        if images:
            batch = torch.from_numpy(np.stack(images)).to(model.device)
            logits.append(model(model.normalise(batch)).float().cpu().numpy())
    return ids, np.concatenate(logits) if logits else np.zeros((0, model.num_classes)), unreadable


def write(path: Path, ids: Sequence[str], logits: np.ndarray, predictor: Predictor) -> None:
    """Write id, the probability of each class, and the decision: the class, or the labels above their thresholds."""
    model = predictor.model
    chances = probabilities(logits, model.task)
    decisions = decide(chances, predictor.thresholds, model.task)
    names = model.class_names
    if model.task == "multiclass":
        texts = [names[decision] for decision in decisions]
    else:
        texts = ["|".join(name for name, on in zip(names, row, strict=True) if on) for row in decisions]

    def fill(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", *names, "decision"])
            for name, row, text in zip(ids, chances, texts, strict=True):
                writer.writerow([name, *(f"{chance:.6f}" for chance in row), text])

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, fill)
