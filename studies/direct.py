"""Protocol `direct`: a trained run evaluated on another data set without any training there."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from datamodules.alignment import shared_names
from datamodules.errors import DataError, closest
from lightning_modules.backbones.checkpoints import weights_hash
from lightning_modules.labelled import LabelledTask
from lightning_modules.metrics import EvaluationResult
from studies import display, guard, outcome
from studies.lightning_cli import FarshotCLI, import_classes
from studies.runs import RunError, RunFolder, flatten, hash_of, identity, require_outputs

Images = Literal["test", "all"]
HERE = "direct"  # folder of a run that keeps its results on other data sets


class DirectTest(FarshotCLI):
    """Test a run on other data: labels are arranged as its outputs by canonical name; what both have is reported."""

    model: LabelledTask

    def __init__(self, folder: RunFolder, data: str, words: Sequence[str], images: Images = "test") -> None:
        """Evaluate.

        Args:
            folder: The run.
            data: A data set's class name, or a configuration with a data section.
            words: Further words of the command line, such as --data.root X.
            images: Evaluate the test images of the data set, or all of its images.
        """
        self.images = images
        checkpoint = folder.selected_checkpoint()
        trained = torch.load(checkpoint, map_location="cpu", weights_only=True)["hyper_parameters"]
        require_outputs(folder, trained)
        self.trained_task = trained["task"]
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "run.yaml"
            config.write_text(yaml.safe_dump({k: v for k, v in folder.read_config().items() if k != "data"}))
            arguments = ["test", "--config", str(config), *data_words(data, Path(scratch) / "data.yaml")]
            arguments += [f"--data.init_args.outputs={yaml.safe_dump(trained['class_names'], default_flow_style=True)}"]
            arguments += [*preprocessing_words(folder), *without_weights(folder)]
            super().__init__([*arguments, "--ckpt_path", str(checkpoint), *words], folder=folder)

    def instantiate_classes(self) -> None:
        """Build data and model; classes and labels that may occur together cannot be compared."""
        super().instantiate_classes()
        if self.datamodule.task != self.trained_task:
            raise DataError(
                f"the run's outputs are {self.trained_task}, the labels of {self.datamodule.name} are "
                f"{self.datamodule.task}",
                where="--data",
                valid=f"data sets that are {self.trained_task}",
            )
        if self.images == "all":
            self.datamodule.test_on_all()

    def test(self, **kwargs: Any) -> None:
        """Evaluate the test images and keep the result beside the run's own."""
        assert self.folder is not None
        self._require_images("test")
        data, model = self.datamodule, self.model
        found = guard.guard(str(self.folder.path), data)
        self.trainer.test(**kwargs, verbose=False)
        if not self.trainer.is_global_zero:
            return
        shared = shared_names(data.own_class_names, model.class_names)
        result = model.results["test"]
        kept = [value for value in result.metrics if not value.class_name or value.class_name in shared]
        result = EvaluationResult(result.logits, result.labels, result.index, kept)
        display.show_metrics("test", kept, len(result.index))
        self._say_names(shared)
        display.say(f"guard: {found}")
        if len(result.index) != len(data.rows("test")):
            display.say("not written: a part of the images")
            return
        settings = identity(self.plain_config())
        settings = {"images": self.images, **{k: v for k, v in settings.items() if k.startswith("data.")}}
        folder = RunFolder(self.folder.path / HERE / f"{data.name}-{hash_of(settings)[:6]}")
        name = f"{self.folder.path.name}/{HERE}/{folder.path.name}"
        columns = {
            **outcome.describe_untrained(
                self.folder, data, data.rows("test"), HERE, found, weights_hash(str(self.folder.path))
            ),
            **{"cell": name, "run": name, "config_hash": hash_of(identity(self.plain_config()))},
        }
        folder.path.mkdir(parents=True, exist_ok=True)
        outcome.write_predictions(folder, "test", result, data)
        folder.update_summary(
            state="finished",
            run=columns,
            test=outcome.metric_table(kept),
            rows=[*outcome.result_rows(result, columns), *outcome.source_rows(result, columns, model, data, shared)],
            shared=shared,
        )
        display.say(f"written to {folder.path}")

    def _say_names(self, shared: Sequence[str]) -> None:
        """Name what both have, and what only one of them has."""
        data = self.datamodule
        display.say(f"{len(shared)} labels in common: {', '.join(shared)}")
        for owner, names in (("the run", self.model.class_names), (data.name, data.own_class_names)):
            others = [name for name in names if not shared_names([name], shared)]
            if others:
                display.say(f"only in {owner}: {', '.join(others)}")


def data_words(data: str, scratch: Path) -> list[str]:
    """Words that choose a data set by class name, or by the data section of a configuration file.

    Args:
        data: Class name or file.
        scratch: Where the data section alone may be written.

    Raises:
        RunError: There is neither, or the file has no data section.
    """
    import datamodules

    if data.endswith((".yaml", ".yml")):
        if not Path(data).is_file():
            raise RunError(f"no configuration {data}", where="--data", valid="a data set's class, or a YAML file")
        content = yaml.safe_load(Path(data).read_text())
        if not isinstance(content, dict) or "data" not in content:
            raise RunError(f"{data} has no data section", where="--data", hint="see configs/data/*.yaml")
        scratch.write_text(yaml.safe_dump({"data": content["data"]}))
        return ["--config", str(scratch)]
    import_classes()
    if data not in datamodules.__all__:
        near = closest(data, datamodules.__all__)
        raise RunError(
            f"no data set {data!r}" + (f"; did you mean {near!r}?" if near else ""),
            where="--data",
            valid=[name for name in datamodules.__all__ if name != "BaseDataModule"],
        )
    return [f"--data={data}"]


def preprocessing_words(folder: RunFolder) -> list[str]:
    """Words that give other data the run's own evaluation preprocessing.

    Raises:
        RunError: The fit of the run has not finished.
    """
    settings = folder.read_summary().get("preprocessing")
    if settings is None:  # else images would be prepared in another way than those that it was trained on
        raise RunError(f"the fit of {folder.path} has not finished", where="--run", hint="fit it to its end first")
    return [f"--data.init_args.{name}={settings[name]}" for name in ("transform", "image_size")]


def without_weights(folder: RunFolder) -> list[str]:
    """Words that build the run's model without the weights that it started from: its checkpoint has everything."""
    if flatten(folder.read_config()).get("model.init_args.weights") is None:
        return []
    nothing = {"weights": "null", "transfer_depth": "null", "frozen_depth": "0"}
    return [f"--model.init_args.{name}={value}" for name, value in nothing.items()]
