import re
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from jsonargparse import capture_parser
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable

from datamodules.errors import DataError
from studies.failures import describe_exception, exit_code
from studies.parsing import ReadableParser


class ToyData(LightningDataModule):
    """Base of the toy data sets.

    Args:
        batch_size: Images a step.
        shots: Labelled images a class.
        image_size: Side, or height and width.
    """

    def __init__(self, batch_size: int = 4, shots: int | None = None, image_size: int | tuple[int, int] = 8):
        super().__init__()
        if batch_size < 0:
            raise DataError(f"batch_size {batch_size} is negative", where="batch_size")
        self.num_classes = 3


class Cats(ToyData):
    def __init__(self, color: Literal["grey", "rgb"] = "rgb", **kwargs):
        super().__init__(**kwargs)


class Catalogue(ToyData):
    def __init__(self, table: str, **kwargs):
        super().__init__(**kwargs)


class ToyTask(LightningModule):
    pass


class Classify(ToyTask):
    def __init__(
        self,
        num_classes: int,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__()


class ToyCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def _run_subcommand(self, subcommand):
        """Stop where training would begin."""


GOOD = """\
model:
  class_path: Classify
data:
  class_path: Cats
  init_args:
    batch_size: 4
trainer:
  max_epochs: 1
  logger: false
  enable_progress_bar: false
"""


def toy_cli(*args):
    return ToyCLI(
        ToyTask,
        ToyData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_class=ReadableParser,
        args=list(args),
    )


@pytest.fixture(scope="module")
def parser():
    """The parser of the toy command line, built once: building it takes longer than a test."""
    return capture_parser(toy_cli)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    Path("good.yaml").write_text(GOOD)


@pytest.fixture
def run(folder, parser, monkeypatch, capsys):
    """Return a function that parses a wrong command line beside good.yaml and returns what it prints."""
    monkeypatch.setattr(parser, "prog", "cli.py")

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(list(args))
        text = capsys.readouterr().err
        assert stop.value.code == 2
        assert text.startswith("error: ")
        assert "usage" not in text
        assert "Traceback" not in text
        assert len(text.splitlines()) <= 15
        return text

    return call


def optimizer(text):
    """Return good.yaml with an optimizer given by this text."""
    return GOOD.replace("Classify", f"Classify\n  init_args:\n    optimizer:\n      {text}")


# what the file says -> the line of the mistake, and what its explanation must contain
FILES = {
    "top-level key": (GOOD + "modle: 3\n", 11, ["no setting modle", "mean model?", "valid:", "trainer"]),
    "block of an unknown key": (GOOD + "modle:\n  x: 1\n", 11, ["no setting modle", "mean model?"]),
    "init_args key": (
        GOOD.replace("batch_size", "batchsize"),
        6,
        ["Cats has no setting batchsize", "mean batch_size?", "image_size, shots", "fit --data.help Cats"],
    ),
    "trainer key": (
        GOOD.replace("max_epochs", "max_epoch"),
        8,
        ["trainer has no setting", "mean max_epochs?"],
    ),
    "wrong type": (
        GOOD.replace(": 4", ": abc"),
        6,
        ["abc is not a valid value of batch_size", "valid: int\n"],
    ),
    "literal": (GOOD.replace("batch_size: 4", "color: gray"), 6, ["gray", "mean grey?", "valid: grey, rgb"]),
    "optional": (GOOD.replace("batch_size: 4", "shots: five"), 6, ["five", "shots", "valid: int, null"]),
    "union": (GOOD.replace("batch_size: 4", "image_size: big"), 6, ["big", "valid: int, tuple[int, int]"]),
    "union of literals": (GOOD + "  precision: bf16-mixt\n", 11, ["mean bf16-mixed?", "64-true"]),
    "short class": (
        GOOD.replace("Cats", "Cat"),
        4,
        ["Cat is not a class for data", "mean Cats?", "Catalogue"],
    ),
    "dotted class": (
        GOOD.replace("Cats", f"{__name__}.Catz"),
        4,
        [f"{__name__}.Catz is not a class for data", "mean Cats?", "no attribute 'Catz'"],
    ),
    "module": (GOOD.replace("Cats", "nowhere.Cats"), 4, ["No module named 'nowhere'", "mean Cats?"]),
    "class of another kind": (
        GOOD.replace("Cats", "torch.nn.Linear"),
        4,
        ["torch.nn.Linear", "valid: Catalogue, Cats"],
    ),
    "no init_args": (
        GOOD.replace("  init_args:\n    batch", "  batch"),
        5,
        ["batch_size cannot stand beside class_path", "below init_args:"],
    ),
    "mistyped init_args": (GOOD.replace("init_args", "init_arg"), 5, ["init_arg cannot", "mean init_args?"]),
    "mistyped class_path": (GOOD.replace("class_path: Cats", "class_pth: Cats"), 4, ["mean class_path?"]),
    "required": (
        GOOD.replace("Cats", "Catalogue"),
        4,
        ["data.table must be given", "valid: str", "--data.table"],
    ),
    "no model": (GOOD.replace("  class_path: Classify\n", ""), 1, ["model must be given", "valid: Classify"]),
    "short optimizer": (optimizer("class_path: SGDD"), 5, ["SGDD", "model.optimizer", "mean SGD?", "AdamW"]),
    "dotted optimizer": (optimizer("class_path: torch.optim.SGDD"), 5, ["torch.optim.SGDD", "mean SGD?"]),
    "optimizer key": (
        optimizer("class_path: SGD\n      init_args:\n        momentun: 0.9"),
        7,
        [
            "SGD has no setting momentun",
            "mean momentum?",
            "--model Classify --model.init_args.optimizer.help SGD",
        ],
    ),
    "optimizer value": (
        optimizer("class_path: SGD\n      init_args:\n        momentum: high"),
        7,
        ["high is not a valid value of momentum", "valid: float\n"],
    ),
    "optional scheduler": (
        GOOD.replace("Classify", "Classify\n  init_args:\n    lr_scheduler:\n      class_path: StepLRR"),
        5,
        ["StepLRR is not a class for model.lr_scheduler", "mean StepLR?"],
    ),
    "list of classes": (
        GOOD + "  callbacks:\n  - class_path: EarlyStoping\n",
        12,
        [
            "EarlyStoping is not a class for trainer.callbacks",
            "mean EarlyStopping?",
            "key trainer.callbacks.0.class_path",
        ],
    ),
    "key in a list": (
        GOOD + "  callbacks:\n  - class_path: EarlyStopping\n    init_args:\n      monitors: loss\n",
        14,
        ["EarlyStopping has no setting monitors", "mean monitor?"],
    ),
    "empty block": (re.sub(r"  max_epochs(.|\n)*", "", GOOD), 7, ["trainer holds no settings", "max_epochs"]),
    "missing sub-file": ("data: nodata.yaml\n", 1, ["there is no file nodata.yaml", "key data"]),
    "missing trainer file": ("trainer: cpu.yaml\n", 1, ["there is no file cpu.yaml", "key trainer"]),
    "open bracket": (GOOD + "  devices: [0, 1\nseed_everything: 3\n", 12, ["not valid YAML", "brackets"]),
    "indentation": (GOOD + "   devices: 1\n", 11, ["not valid YAML", "indentation"]),
    "tab": (GOOD.replace("    batch", "\tbatch"), 6, ["not valid YAML", "no tabs"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_a_file_is_located_and_explained(run, case):
    content, line, parts = FILES[case]
    Path("bad.yaml").write_text(content)
    text = run("fit", "--config", "bad.yaml")
    assert f"bad.yaml, line {line}," in text
    for part in parts:
        assert part in text


ARGS = {
    "unknown command": (
        ["fti", "-c", "good.yaml"],
        ["no command fti", "mean fit?", "fit, validate, test, predict"],
    ),
    "no command": ([], ["no command is given", "fit, validate, test, predict"]),
    "unknown option": (
        ["fit", "--max_epochs", "3"],
        ["no option --max_epochs", "mean --trainer.max_epochs?"],
    ),
    "abbreviated option": (
        ["fit", "--trainer.max_epoch=3"],
        ["--trainer.max_epoch;", "mean --trainer.max_epochs?"],
    ),
    "forgotten --config": (["fit", "good.yaml"], ["mean --config good.yaml?"]),
    "setting of a class": (
        ["fit", "-c", "good.yaml", "--data.batchsize", "3"],
        ["Cats has no setting batchsize", "mean batch_size?", "command line, --data.batchsize 3"],
    ),
    "value": (
        ["fit", "-c", "good.yaml", "--data.init_args.batch_size=abc"],
        [
            "abc is not a valid value of batch_size",
            "command line, --data.init_args.batch_size abc",
            "valid: int",
        ],
    ),
    "class": (["fit", "-c", "good.yaml", "--data", "Catz"], ["command line, --data Catz", "mean Cats?"]),
    "class for help": (["fit", "--data.help", "Catz"], ["command line, --data.help Catz", "mean Cats?"]),
    "required": (["fit", "--data", "Cats"], ["model must be given", "valid: Classify", "--model VALUE"]),
    "no value": (["fit", "-c", "good.yaml", "--trainer.max_epochs"], ["--trainer.max_epochs needs a value"]),
    "no value of a class": (["fit", "--data=Cats", "--data.shots"], ["--data.shots needs a value"]),
    "no config": (["fit", "-c"], ["--config needs a value"]),
    "missing config": (
        ["fit", "-c", "goood.yaml"],
        ["no file goood.yaml", "mean good.yaml?", "--config goood.yaml"],
    ),
    "missing folder": (["fit", "-c", "nowhere/good.yaml"], ["no file nowhere/good.yaml", "mean good.yaml?"]),
    "folder": (["fit", "-c", "."], [". is a folder", "valid: good.yaml"]),
    "option before the command": (["-c", "good.yaml", "fit"], ["before subcommand 'fit'"]),
}


@pytest.mark.parametrize("case", ARGS)
def test_a_mistake_on_the_command_line_is_explained(run, case):
    args, parts = ARGS[case]
    text = run(*args)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("content", ["", "# nothing\n", "- a\n- b\n", "data:\n", "word\n"])
def test_a_config_without_settings(run, content):
    Path("bad.yaml").write_text(content)
    text = run("fit", "-c", "good.yaml", "-c", "bad.yaml")
    assert "holds no settings" in text
    assert "where: bad.yaml" in text
    assert "trainer" in text


def test_a_config_that_is_no_text(run):
    Path("weights.ckpt").write_bytes(bytes(range(128, 255)))
    assert "weights.ckpt is not valid YAML" in run("fit", "-c", "weights.ckpt")


def test_the_file_that_holds_the_mistake_is_named(run):
    Path("second.yaml").write_text("data:\n  init_args:\n    batchsize: 3\n")
    assert "second.yaml, line 3, key data.init_args.batchsize" in run("fit", "-c", "good.yaml", "-c", "second.yaml")
    Path("sub").mkdir()
    Path("sub/data.yaml").write_text("class_path: Cats\ninit_args:\n  shots: five\n")
    Path("first.yaml").write_text("data: sub/data.yaml\n")
    assert "sub/data.yaml, line 3, key data.init_args.shots" in run("fit", "-c", "first.yaml")
    Path("sub/data.yaml").write_text("class_path: [Cats\n")
    assert "sub/data.yaml is not valid YAML" in run("fit", "-c", "first.yaml")


def test_the_first_wrong_value_is_located_although_a_later_file_sets_it_right(run):
    Path("bad.yaml").write_text(GOOD.replace(": 4", ": abc"))
    assert "bad.yaml, line 6" in run("fit", "-c", "bad.yaml", "-c", "good.yaml")


def test_other_commands_are_offered(run, monkeypatch):
    monkeypatch.setattr(ReadableParser, "other_commands", ("study", "list"))
    assert "did you mean study?" in run("stduy")


def test_an_unknown_message_is_shown_as_it_is_and_cut(capsys):
    with pytest.raises(SystemExit) as stop:
        ReadableParser().error("\n".join(f"line {number} " + "x" * 600 for number in range(40)))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert lines[0].startswith("error: line 0")
    assert len(lines) == 15
    assert max(map(len, lines)) < 520


def test_an_error_in_the_explanation_does_not_hide_the_message(monkeypatch, capsys):
    monkeypatch.setattr("studies.parsing._explain", lambda *_: 1 / 0)
    with pytest.raises(SystemExit):
        ReadableParser().error("Option 'x' is not accepted")
    assert capsys.readouterr().err == "error: Option 'x' is not accepted\n"


def test_an_error_of_our_own_behind_a_message_is_shown(capsys):
    try:
        raise ValueError("Call to compute_fn of link failed") from DataError("no table", where="labels.csv")
    except ValueError as error:
        with pytest.raises(SystemExit):
            ReadableParser().error(str(error), error)
    assert capsys.readouterr().err == "error: no table\n  where: labels.csv\n"


def test_the_whole_command_line(folder, capsys):
    cli = toy_cli("fit", "-c", "good.yaml")
    assert isinstance(cli.model, Classify)
    assert isinstance(cli.datamodule, Cats)
    with pytest.raises(SystemExit) as stop:
        toy_cli("fit", "-c", "good.yaml", "--data.shotz=1")
    assert stop.value.code == 2
    assert "Cats has no setting shotz; did you mean shots?" in capsys.readouterr().err


def test_an_error_of_our_own_while_classes_are_built_survives_the_wrapping(folder):
    with pytest.raises(ValueError, match="Union subtypes") as error:
        toy_cli("fit", "-c", "good.yaml", "--data.batch_size=-1")
    assert exit_code(error.value) == 2
    assert describe_exception(error.value) == "error: batch_size -1 is negative\n  where: batch_size"
