"""zero-shot --run RUN --data DATA: what a CLIP run says of classes by their names alone, kept beside the run."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studies import display
from studies.commands.similarity import DATA_EPILOG, split_data_words

if TYPE_CHECKING:
    from datamodules.base import BaseDataModule
    from lightning_modules.metrics import EvaluationResult

HERE = "zero_shot"  # folder of a run that keeps its zero-shot results


def run(words: Sequence[str]) -> None:
    """Evaluate, check the names, print and write the numbers.

    Raises:
        DataError: The run is not one of CLIP or has not finished, or data and options cannot be used (exit code 2).
        ModelError: Its checkpoint is damaged, or the net cannot take the images.
    """
    words, settings = split_data_words(words[1:])
    options = _parser().parse_args(words)
    # Only now: --help and mistakes in the options need none of the heavy packages.
    from lightning_modules.backbones.checkpoints import weights_hash
    from lightning_modules.clip import load_clip
    from studies import guard, outcome
    from studies.direct import preprocessing_words
    from studies.features import choose_device
    from studies.runs import RunError, RunFolder, hash_of
    from studies.zero_shot import evaluate_zero_shot

    device = choose_device(options.device)
    folder = RunFolder(options.run)
    folder.read_config()
    checkpoint, weights = folder.selected_checkpoint(), weights_hash(str(options.run))  # the latter finds damage
    clip, preprocessing = load_clip(checkpoint), preprocessing_words(folder)
    data = _data(options.data, [*preprocessing, *settings], options.templates)
    if not len(data.rows(options.split)):
        raise RunError(f"{data.name} has no {options.split} images", where="--split")
    found = guard.guard(str(options.run), data)
    result = evaluate_zero_shot(clip, data, options.split, device)
    display.show_metrics(options.split, result.metrics, len(result.index))
    display.say(f"guard: {found}")
    table = data.read_table()
    kept = {
        "data": data.name,
        "split": options.split,
        "texts": data.class_texts,
        "image_size": data.image_size,
        "transform": data.transform,
        # Which images and which labels: a fold has as many as the next one.
        "images": hash_of({"paths": table.paths[result.index].tolist(), "labels": result.labels.tolist()}),
    }
    place = RunFolder(options.run / HERE / f"{data.name}-{hash_of(kept)[:6]}")
    place.path.mkdir(parents=True, exist_ok=True)
    name = f"{options.run.name}/{HERE}/{place.path.name}"
    columns = {
        **outcome.describe_untrained(folder, data, result.index, HERE, found, weights),
        **{"cell": name, "run": name, "config_hash": hash_of(kept)},
    }
    outcome.write_predictions(place, options.split, result, data)
    place.update_summary(
        state="finished",
        run=columns,
        texts=dict(zip(data.class_names, data.class_texts or [], strict=True)),
        names_check=_judged(data, result),
        rows=outcome.result_rows(result, columns) if options.split == "test" else [],
        **{options.split: outcome.metric_table(result.metrics)},
    )
    display.say(f"written to {place.path}")


def _judged(data: "BaseDataModule", result: "EvaluationResult") -> str:
    """Whether the classes seem to have the right names; a doubt is said at once."""
    from studies.zero_shot import check_names

    if data.task != "multiclass":
        return "not checked: labels may occur together"
    warning = check_names(result.labels, result.logits.argmax(axis=1), data.class_names).words()
    if warning:
        display.say(f"warning: {warning}")
    return warning or "no sign of wrong names"


def _data(word: str, settings: Sequence[str], templates: Sequence[str] | None) -> "BaseDataModule":
    """The data set, with templates for its class names: those given, or those of its kind of images."""
    import json

    from datamodules.image_text.captions import PHOTO_TEMPLATES, RADIOGRAPH_TEMPLATES
    from studies.data_argument import build_data

    def build(captions: Sequence[str] | None) -> "BaseDataModule":
        more = [] if captions is None else [f"--data.captions={json.dumps(list(captions))}"]
        return build_data(word, [*settings, *more], "zero-shot")

    data = build(templates)
    if data.captions is not None:
        return data
    return build(RADIOGRAPH_TEMPLATES if data.channels == 1 else PHOTO_TEMPLATES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py zero-shot",
        description="Zero-shot evaluation of a CLIP run: each class is the mean of its texts' embeddings. Class names "
        "come from the data set in its own order; --data.caption_names FILE (columns class, name) says how captions "
        "call them. Where other names would fit far better, a warning says so.",
        epilog=DATA_EPILOG,
    )
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder of CLIP")
    parser.add_argument("--data", required=True, metavar="DATA", help="data set: a class name, or a YAML file")
    parser.add_argument(
        "--templates", nargs="+", metavar="T", help='texts with one {} for the name, such as "a photo of a {}."'
    )
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="images to name (test)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    return parser
