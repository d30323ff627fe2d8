"""Probes of a backbone while it is pre-trained: can labels be read off its features, and have they collapsed?"""

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_modules.collapse import effective_rank, feature_sd
from lightning_modules.errors import ModelError, NonFiniteLossError
from lightning_modules.pair_evaluation import CollectedPairs
from lightning_modules.probes import MIN_IMAGES, accuracy, knn_scores, linear_scores, mean_auroc

log = logging.getLogger("farshot.probes")

COLLAPSED_RANK, COLLAPSED_SD = 2.0, 0.05


class OnlineProbes(Callback):
    """Probes the features of a labelled set every so many optimizer steps and at the end; training is not changed.

    The task gives `normalise(images uint8)` and `encode(normalised images)` → features (B, D). They are read in
    evaluation mode, without gradients, and the random state is put back, so that the weights are those of a run without
    probes, to the bit. Every rank reads its share; the features are gathered once. Test images are never read.

    Logged: `probe/feature_sd` and `probe/effective_rank` of the training rows' features; for multi-class data
    `probe/linear_accuracy` and `probe/knn_accuracy` on the validation rows; for binary and multi-label data
    `probe/linear_mean_auroc` there, over the labels that have one, without their unknown cells (no neighbours vote:
    they would need a rule for those). The linear probe is a ridge classifier; see `lightning_modules.probes`.

    Args:
        data: Data module with the labels; default the run's own.
        every: Optimizer steps between two probes.
        max_images: Training rows at most, drawn once by a fixed seed.
        max_eval_images: Validation rows at most, likewise.
        neighbours: Nearest training images that vote.
        temperature: Of their votes, exp(cosine / temperature).

    Raises:
        ModelError: An argument is out of range, or the data has no labelled training or validation rows.
    """

    def __init__(
        self,
        data: LightningDataModule | None = None,
        every: int = 1000,
        max_images: int = 5000,
        max_eval_images: int = 5000,
        neighbours: int = 20,
        temperature: float = 0.07,
    ) -> None:
        if every < 1 or max_images < MIN_IMAGES or max_eval_images < 2 or neighbours < 1 or not temperature > 0:
            raise ModelError(
                f"online probes with every {every}, max_images {max_images}, max_eval_images {max_eval_images}, "
                f"neighbours {neighbours}, temperature {temperature}",
                valid=f"1 or more, max_images {MIN_IMAGES}, max_eval_images 2 or more, temperature above 0",
            )
        self.data, self.every = data, every
        self.max_images, self.max_eval_images = max_images, max_eval_images
        self.neighbours, self.temperature = neighbours, temperature
        self._probed = 0  # the step of the last probe

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the data and choose the rows; a set that cannot be probed stops the run before it starts."""
        if stage != "fit":
            return
        data: Any = self.data if self.data is not None else getattr(trainer, "datamodule", None)
        if not hasattr(data, "evaluation_dataloader"):
            raise ModelError("online probes need a labelled data module", hint="set data of OnlineProbes")
        if self.data is not None:
            data.trainer = trainer  # its loaders then share the rows over the ranks
            if trainer.local_rank == 0:
                data.prepare_data()
            trainer.strategy.barrier()
            data.setup("validate")  # not "fit", which would divide this run's batch anew
        self._data = data
        self._train = self._choose(data, "train", self.max_images, MIN_IMAGES)
        self._validation = self._choose(data, "validation", self.max_eval_images, 2)

    def _choose(self, data: Any, split: str, most: int, least: int) -> np.ndarray:
        """Rows of a split that have a label: a fixed prefix of one permutation, ascending, int64 (n,)."""
        rows: np.ndarray = data.rows(split)
        labels = data.read_table().labels[rows]
        rows = rows[labels >= 0 if labels.ndim == 1 else ~np.isnan(labels).all(axis=1)]
        if len(rows) < least:
            raise ModelError(
                f"online probes need {least} or more labelled {split} rows, {type(data).__name__} has {len(rows)}",
                hint="set val_fraction above 0" if split == "validation" else "set data of OnlineProbes",
            )
        return np.sort(np.random.default_rng(0).permutation(rows)[:most])

    def state_dict(self) -> dict[str, Any]:
        """The step of the last probe: a resumed run does not repeat it."""
        return {"probed": self._probed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self._probed = state_dict["probed"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe after every `every` optimizer steps."""
        # While gradients accumulate the step stands still.
        if trainer.global_step % self.every == 0 and trainer.global_step != self._probed:
            # For progress bars and whatever monitors a metric; the loggers have it already.
            pl_module.log_dict(self._probe(trainer, pl_module), on_step=True, on_epoch=False, logger=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the last step."""
        if trainer.global_step != self._probed:
            self._probe(trainer, pl_module)

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Probe now, tell the loggers under the present step, warn of a collapse."""
        self._probed = trainer.global_step
        with isolate_rng(include_cuda=False):  # a loader draws a seed; evaluation draws nothing on the device
            train = self._collect(trainer, pl_module, self._train)
            validation = self._collect(trainer, pl_module, self._validation)
        scores = {f"probe/{name}": value for name, value in self.measure(*train, *validation).items()}
        for logger in trainer.loggers:  # not through self.log, which drops what comes between two logged steps
            logger.log_metrics(scores, step=trainer.global_step)
        rank, sd = scores["probe/effective_rank"], scores["probe/feature_sd"]
        if trainer.is_global_zero and (rank < COLLAPSED_RANK or sd < COLLAPSED_SD):
            log.warning(
                "features have collapsed: effective rank %.2f, feature SD %.3f at step %d", rank, sd, self._probed
            )
        return scores

    def measure(self, features: Tensor, labels: Tensor, eval_features: Tensor, eval_labels: Tensor) -> dict[str, float]:
        """All numbers of one probe.

        Args:
            features: Training features (N, D).
            labels: int64 (N,) for multi-class data, otherwise (N, L), 1 / 0 / NaN.
            eval_features: Features (M, D) to predict from.
            eval_labels: Their labels.

        Raises:
            NonFiniteLossError: A feature is NaN or infinite.
        """
        broken = sum(int((~values.isfinite().all(dim=1)).sum()) for values in (features, eval_features))
        if broken:
            raise NonFiniteLossError(
                f"{broken} of {len(features) + len(eval_features)} probed images have features that are NaN or infinite"
            )
        spread = {"feature_sd": feature_sd(features), "effective_rank": effective_rank(features)}
        if self._data.task != "multiclass":
            scores = linear_scores(features, labels, eval_features)
            return {"linear_mean_auroc": mean_auroc(scores, eval_labels)} | spread
        classes = self._data.num_classes
        linear = linear_scores(features, F.one_hot(labels, classes), eval_features)
        votes = knn_scores(features, labels, eval_features, classes, self.neighbours, self.temperature)
        return {"linear_accuracy": accuracy(linear, eval_labels), "knn_accuracy": accuracy(votes, eval_labels)} | spread

    def _collect(self, trainer: Trainer, pl_module: LightningModule, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels of `rows`, from all ranks, in the order of the table."""
        task: Any = pl_module
        collected = CollectedPairs().to(pl_module.device)
        training = [module for module in pl_module.modules() if module.training]
        _set_mode(training, False)
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for batch in self._data.evaluation_dataloader(rows):
                    image, label, index = (batch[name].to(pl_module.device) for name in ("image", "label", "index"))
                    collected.update(task.encode(task.normalise(image)), label, index)
        finally:
            _set_mode(training, True)  # one by one: frozen norms stay in evaluation mode
        features, labels = collected.compute()
        return features, labels


def _set_mode(modules: list[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training
