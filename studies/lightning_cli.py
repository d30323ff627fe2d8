"""The command line of single runs: LightningCLI with run folders, resume, exact evaluation and readable errors."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_only

import datamodules
import lightning_modules
from datamodules.base import BaseDataModule
from datamodules.samplers import divide_batch
from lightning_modules.backbones.checkpoints import weights_hash
from lightning_modules.base import BaseTask
from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from lightning_modules.callbacks.cost import Cost
from lightning_modules.callbacks.finite_loss import FiniteLoss
from lightning_modules.callbacks.jsonl_logger import JsonlLogger
from lightning_modules.callbacks.wandb_mirror import WandbMirror
from lightning_modules.errors import ModelError
from lightning_modules.labelled import LabelledTask
from studies import display, guard, outcome, training_record
from studies.cli_options import OPTIONS, TRAINER_DEFAULTS, hush_lightning
from studies.parsing import ReadableParser, whole_numbers_first
from studies.runs import RunError, RunFolder, flatten, hash_of, identity

LINKED = ("num_classes", "task", "class_names", "class_texts")
RESUME = "FARSHOT_RESUME"  # tells the other processes of a distributed run what rank 0 has decided


def import_classes() -> None:
    """Import every data set and task, so that their short names can be used as `class_path`; hush Lightning's tips."""
    hush_lightning()
    for package in (datamodules, lightning_modules):
        for name in package.__all__:
            getattr(package, name)


class FarshotCLI(LightningCLI):
    """fit, validate and test of one run.

    Args:
        args: Words of the command line after the program's name.
        folder: For `test` and `validate`: the run whose weights are evaluated, and that keeps the results.
        columns: Result-row columns that the caller knows better, such as the study's name and its cell.
    """

    datamodule: BaseDataModule
    model: BaseTask

    def __init__(
        self,
        args: Sequence[str],
        folder: RunFolder | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        import_classes()
        self.folder = folder
        self.columns = dict(columns or {})
        self.finished = self.resume = False
        self.weights_hash: str | None = None
        self.mirror: WandbMirror | None = None
        super().__init__(
            BaseTask,
            BaseDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=ReadableParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args),
        )

    # The parser --------------------------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit, validate and test; `predict` takes files instead of a data set and has a command of its own."""
        skipped = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "verbose"}
        return {name: set(skipped) for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Arguments of the run folder, the choice of weights and the mirror; links from data to model."""
        for name, kind, default, text in OPTIONS:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        whole_numbers_first(parser)
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given, whatever the process's own command line is."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: a checkpoint that contradicts it is refused when it is loaded."""

    def plain_config(self) -> dict[str, Any]:
        """The whole configuration in plain types, without what belongs to the command alone."""
        parser = self._parser(self.subcommand)
        dumped = dict(yaml.safe_load(parser.dump(self.settings, skip_none=False, skip_validation=True, format="yaml")))
        for name in ("config", *self._subcommand_method_arguments[str(self.subcommand)]):
            dumped.pop(name, None)
        return dumped

    # Before the trainer exists -----------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Fix the run folder and decide whether the run is new, goes on, or is done."""
        self.settings = self.config[self.subcommand]
        given = (self.settings.get("model") or {}).get("init_args") or {}
        self._given = {name: given.get(name) for name in LINKED}
        if self.subcommand == "fit":
            self._open_run()
        elif not self.settings.get("ckpt_path"):
            raise ModelError(
                f"{self.subcommand} without weights would score random numbers",
                hint=f"python cli.py {self.subcommand} --run runs/EXPERIMENT/RUN, or --config ... --ckpt_path FILE",
            )

    def _open_run(self) -> None:
        config = self.plain_config()
        weights = flatten(config).get("model.init_args.weights")
        self.weights_hash = weights_hash(weights) if weights else None
        wanted = identity(config, self.weights_hash)
        files = self.settings.get("config") or []
        experiment = self.settings["experiment"] or (Path(str(files[-1])).stem if files else "runs")
        name = self.settings["run"] or hash_of(wanted)
        self.folder = RunFolder(Path(self.settings["runs_dir"]) / experiment / name)
        if getattr(rank_zero_only, "rank", 0):  # rank 0 decides; one that started this process has said what
            decided = os.environ.get(RESUME, str(int(self.folder.last_checkpoint() is not None)))
            self.resume = decided == "1" and not (self.settings["overwrite"] and RESUME not in os.environ)
            return
        if self.settings["overwrite"]:
            self.folder.clear()
        state = self.folder.state(wanted)
        # Finished, but now to be tested, too: the fit goes on from its end, where nothing is left to train.
        untested = self.settings["evaluate"] and "rows" not in self.folder.read_summary()
        self.finished = state == "finished" and not untested
        self.resume = state != "new" and self.folder.last_checkpoint() is not None
        os.environ[RESUME] = str(int(self.resume))
        if not self.finished:
            self.folder.begin(config, wanted)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer, unless the run is done; refuse a user's value that the data contradicts."""
        if self.finished:
            return
        super().instantiate_classes()
        for name, value in self._given.items():
            found = getattr(self.datamodule, name)
            if value is not None and value != found:
                raise ModelError(
                    f"model.init_args.{name} is {value}, but {self.datamodule.name} has {found}",
                    hint="leave it out: it comes from the data",
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the run's loggers and the atomic checkpoint writer to what is configured."""
        configured = self.config_init[self.subcommand]["trainer"]
        loggers = _as_list(configured.get("logger"))
        if self.subcommand == "fit" and self.folder is not None:
            loggers.append(JsonlLogger(self.folder.metrics))
            if self.settings["wandb"] != "off":
                project, mode = self.settings["wandb_project"], self.settings["wandb"]
                shown = identity(self.plain_config(), self.weights_hash)
                # A study says what a run of it is; a single one without weights is itself a pre-training.
                protocol = self.columns.get("protocol", "pretrain" if self.weights_hash is None else "transfer")
                job = "pretrain" if protocol == "pretrain" else "transfer"
                self.mirror = WandbMirror(self.folder.path, project, self.folder.path.parent.name, mode, shown, job)
                loggers.append(self.mirror)
        return super().instantiate_trainer(
            logger=loggers or False,
            plugins=[*_as_list(configured.get("plugins")), AtomicCheckpointIO()],
            enable_checkpointing=self.subcommand == "fit",
            **kwargs,
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if self.subcommand == "fit" and self.folder is not None:
            every, select, monitor = (self.settings[name] for name in ("checkpoint_every", "select", "monitor"))
            self.cost = Cost()
            self.checkpoints = Checkpoints(self.folder.checkpoints, every, select, monitor)
            callbacks = [*callbacks, FiniteLoss(), self.cost, self.checkpoints]
        return super()._instantiate_trainer(config, callbacks)

    # The commands ------------------------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        if self.finished:
            assert self.folder is not None
            display.say(f"{self.folder.path} is finished; --overwrite true would start it anew")
            return
        super()._run_subcommand(subcommand)

    def fit(self, **kwargs: Any) -> None:
        """Train, select the weights, evaluate validation (and test with --evaluate), write the results."""
        assert self.folder is not None
        display.say(f"run folder: {self.folder.path}" + (" (resuming)" if self.resume else ""))
        if self.resume and not kwargs.get("ckpt_path"):
            kwargs["ckpt_path"] = self.folder.last_checkpoint()
        validation_batches = self.trainer.limit_val_batches  # type: ignore[attr-defined]
        self.datamodule.setup()
        # A pre-training without outputs has nothing to test: its weights are tested where they are transferred.
        tested = self.settings["evaluate"] and isinstance(self.model, LabelledTask)
        if tested:
            self._require_images("test")
        self.guard = self._check_and_record_images()
        if self._counts_steps():
            self._validate_for_selection()
        outcome.reset_peak_memory()
        self.trainer.fit(**kwargs)
        self.trainer.limit_val_batches = validation_batches  # type: ignore[attr-defined]
        if self.settings["select"] == "best":
            if not self.checkpoints.selected.is_file():
                raise ModelError(
                    f"{self.settings['monitor']} was never defined on validation, so no weights are the best",
                    hint="--select last, another --monitor, or more validation images",
                )
            selected = torch.load(self.checkpoints.selected, map_location="cpu", weights_only=True)
            self.model.load_state_dict(selected["state_dict"])
        if len(self.datamodule.rows("validation")):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if tested:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        self._record_fit()

    def _check_and_record_images(self) -> str:
        """Check the source's training images against the test set, and record this run's; rank 0 does it for all."""
        if self.folder is None or getattr(rank_zero_only, "rank", None):
            return ""
        model = self.settings["model"].get("init_args") or {}
        weights = None if model.get("transfer_depth") == 0 else model.get("weights")  # depth 0 takes nothing from them
        data = self.datamodule
        found = guard.guard(weights, data)
        sizes = " / ".join(f"{len(data.rows(split)):,}" for split in ("train", "validation", "test"))
        display.say(f"data: {data.name}, {sizes} images (train / validation / test)")
        display.say(f"split: {data.split_policy}; guard: {found}")
        if data.label_policy:
            display.say(f"labels: {data.label_policy}")
        if not self.resume or not (self.folder.path / training_record.RECORD).is_file():
            training_record.write_record(self.folder, data, weights, hashes=self.settings["image_hashes"])
        return found

    def _counts_steps(self) -> bool:
        plan = self.model.schedule.plan(len(self.datamodule.rows("train")))
        return plan is not None or self.trainer.max_steps > 0

    def _validate_for_selection(self) -> None:
        """A run that counts steps is one trainer epoch: validate ten times if something selects on it, else never."""
        if self.settings["select"] == "last":
            self.trainer.limit_val_batches = 0  # type: ignore[attr-defined]
        elif self.settings["trainer"]["val_check_interval"] is None:
            plan = self.model.schedule.plan(len(self.datamodule.rows("train")))
            steps = plan.total if plan is not None else self.trainer.max_steps
            # Counted in device batches, of which an optimizer step may take several.
            _, accumulate = divide_batch(
                self.datamodule.batch_size, self.trainer.world_size, self.datamodule.max_batch_per_device
            )
            self.trainer.val_check_interval = max(1, steps // 10) * accumulate  # type: ignore[attr-defined]

    def _record_fit(self) -> None:
        folder, model, trainer = self.folder, self.model, self.trainer
        assert folder is not None
        if not trainer.is_global_zero:
            return
        data, best = self.datamodule, self.settings["select"] == "best"
        steps = self.checkpoints.best_step if best else trainer.global_step
        run = {
            "study": folder.path.parent.name,
            "cell": folder.path.name,
            "run": folder.path.name,
            **outcome.describe_run(model, data, self.weights_hash, int(self.settings["seed_everything"]), self.guard),
            "step": steps,
            "epochs": steps * data.batch_size / len(data.rows("train")),
            "images_seen": steps * data.batch_size,
            "selection": f"best {self.settings['monitor']}" if best else "last",
            "seconds": round(self.cost.seconds, 3),
            "peak_memory": outcome.peak_memory(),
            "energy": self.cost.energy,
            "config_hash": hash_of(identity(self.plain_config(), self.weights_hash)),
            **self.columns,
        }
        self._record_evaluations(
            run,
            run=run,
            checkpoint=self.checkpoints.selected.relative_to(folder.path).as_posix(),
            preprocessing={name: getattr(data, name) for name in ("transform", "image_size", "channels", "window")},
            **({} if isinstance(model, LabelledTask) else {"rows": []}),
            **outcome.thresholds_of(model.results.get("validation"), model),
            state="finished",
        )
        if self.mirror is not None:
            self.mirror.close()

    def validate(self, **kwargs: Any) -> None:
        """Evaluate the validation images."""
        self._require_images("validation")
        self.trainer.validate(**kwargs, verbose=False)
        self._record_evaluations(self._stored_run())

    def test(self, **kwargs: Any) -> None:
        """Evaluate the test images."""
        self._require_images("test")
        self.trainer.test(**kwargs, verbose=False)
        self._record_evaluations(self._stored_run())

    def _require_images(self, split: str) -> None:
        data = self.datamodule
        if split == "test" and not isinstance(self.model, LabelledTask):
            raise RunError(
                f"{type(self.model).__name__} has no outputs to test",
                hint="transfer its weights with Classification, or `python cli.py probe`; of CLIP: `zero-shot`",
            )
        if not len(data.rows(split)):
            raise RunError(f"{data.name} has no {split} images", where=f"{split} split ({data.split_policy})")

    def _stored_run(self) -> dict[str, Any]:
        return dict(self.folder.read_summary().get("run", {})) if self.folder is not None else {}

    def _record_evaluations(self, columns: Mapping[str, Any], **facts: Any) -> None:
        """Write predictions, numbers and further facts to the run folder that they belong to, if any; show them."""
        if not self.trainer.is_global_zero:
            return
        model = self.model
        other = self._why_not_kept() if self.folder is not None else ""
        if self.folder is not None and not other:
            for split, scores in model.scores.items():
                facts[split] = outcome.metric_table(scores)
                if self.mirror is not None:
                    self.mirror.summarise({f"{split}/{value.key}": value.value for value in scores})
            for split, result in model.results.items():
                assert isinstance(model, LabelledTask)
                outcome.write_predictions(self.folder, split, result, self.datamodule)
                if split == "test":
                    facts["rows"] = [
                        *outcome.result_rows(result, columns),
                        *outcome.source_rows(result, columns, model, self.datamodule),
                    ]
            self.folder.update_summary(**facts)
        for split, scores in model.scores.items():
            display.show_metrics(split, scores, model.samples[split])
        if self.folder is not None and other:
            display.say(f"not written to {self.folder.path}: {other}")

    def _why_not_kept(self) -> str:
        """What sets these results apart from the run's own, or "": a run folder keeps no numbers of something else."""
        assert self.folder is not None
        if self.subcommand == "fit":
            return ""
        if Path(str(self.settings["ckpt_path"])).resolve() != self.folder.selected_checkpoint().resolve():
            return "other weights"
        if any(len(result.index) != len(self.datamodule.rows(split)) for split, result in self.model.results.items()):
            return "a part of the images"
        stored, wanted = self.folder.read_identity(), identity(self.plain_config())
        keys = [key for key in wanted if key.startswith("data.") and stored.get(key) != wanted[key]]
        return f"other data settings ({', '.join(keys[:4])})" if keys else ""


def _as_list(value: Any) -> list[Any]:
    if value in (None, False, True):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
