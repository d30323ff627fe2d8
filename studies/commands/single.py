"""fit, validate and test of one run, by configuration or by run folder."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from studies.direct import DirectTest, without_weights
from studies.lightning_cli import FarshotCLI
from studies.runner import COLUMNS
from studies.runs import RunError, RunFolder


def run(words: Sequence[str]) -> None:
    """Run one command.

    `test --run R` and `validate --run R` rebuild data settings, preprocessing and weights from the run folder; further
    words override its configuration. `test --run R --data D` evaluates the run on another data set (protocol `direct`);
    `--images all` takes all of that set's images instead of its test set.
    """
    command, rest = words[0], list(words[1:])
    folder, others = take_option(rest, "--run")
    if command == "fit" or folder is None:
        FarshotCLI(words, columns=json.loads(os.environ.get(COLUMNS, "{}")))
        return
    run_folder = RunFolder(Path(folder))
    data, others_than_data = take_option(others, "--data")
    if command == "test" and data is not None:
        images, words = take_option(others_than_data, "--images")
        if images not in (None, "test", "all"):
            raise RunError(f"--images {images}", where="--images", valid="test (default) or all")
        DirectTest(run_folder, data, words, "all" if images == "all" else "test")
        return
    FarshotCLI([command, *from_run(run_folder), *others], folder=run_folder)


def from_run(folder: RunFolder) -> list[str]:
    """Words that rebuild a run for evaluation: its configuration, its selected checkpoint, no source weights."""
    folder.read_config()
    checkpoint = folder.selected_checkpoint()
    config = folder.path / "config.yaml"
    return ["--config", str(config), "--ckpt_path", str(checkpoint), *without_weights(folder)]


def take_option(words: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Take `option VALUE` or `option=VALUE` out of a command line: (value or None, the other words)."""
    rest: list[str] = []
    value: str | None = None
    following = iter(words)
    for word in following:
        if word == option:
            value = next(following, None)
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest
