"""What the Trainer, the task and the callbacks cost a step, over a bare loop on the same batches.

    python benchmarks/trainer_overhead.py [--steps 400] [--rounds 5]

All train the same tiny net on the same stream of rendered images, in turn; the difference a step is the overhead.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from datamodules import Synthetic
from lightning_modules import Classification
from lightning_modules.backbones.factory import classifier_parameters
from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from lightning_modules.callbacks.cost import Cost
from lightning_modules.callbacks.finite_loss import FiniteLoss
from lightning_modules.callbacks.jsonl_logger import JsonlLogger
from lightning_modules.optimizers import agc_parameter_groups


class TinyNet(nn.Module):
    """One linear layer on the mean colour, with the members of a timm model that a task asks for."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
        self.pretrained_cfg = {"classifier": "fc"}

    def get_classifier(self):
        """The classifier."""
        return self.fc

    def forward(self, images):
        """Logits."""
        return self.fc(images.mean((2, 3)))


def build():
    """Data and model of both sides."""
    data = Synthetic(num_train=512, num_test=8, classes=4, image_size=8, batch_size=4, val_fraction=0.0, seed=0)
    data.setup()
    model = Classification("test_resnet", data.num_classes, data.task, data.class_names)
    torch.manual_seed(0)
    model.backbone = TinyNet(data.num_classes)  # so small that its own time does not hide the overhead
    return data, model


class Clock(Callback):
    """Time from the first batch to the last, without the checkpoint at the end."""

    def on_train_start(self, trainer, pl_module):
        """Start."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop, so far."""
        self.seconds = time.perf_counter() - self.started


class Plain(LightningModule):
    """The least that Lightning can train: the same net and optimizer, no logging, no schedule."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        """Loss of a batch."""
        return self.model.loss(self.model(self.model.normalise(batch["image"])), batch["label"])

    def configure_optimizers(self):
        """The same optimizer."""
        return self.model.make_optimizer(parameter_groups(self.model))


def parameter_groups(model):
    """Clipped parameters and the classifier's."""
    return agc_parameter_groups(model, classifier_parameters(model.backbone))


def by_trainer(steps, *, plain=False):
    """Seconds of training by the Trainer: with everything that `cli.py fit` adds, or plain."""
    data, model = build()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        ours = [FiniteLoss(), Cost(), Checkpoints(Path(folder), every_n_steps=10**9)]
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=steps,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False if plain else JsonlLogger(Path(folder) / "metrics.jsonl"),
            enable_checkpointing=not plain,
            callbacks=[clock] if plain else [clock, *ours],
            plugins=[AtomicCheckpointIO()],
        )
        trainer.fit(Plain(model) if plain else model, datamodule=data)
    return clock.seconds


def by_loop(steps):
    """Seconds of the same steps in a bare loop."""
    data, model = build()
    optimizer = model.make_optimizer(parameter_groups(model))
    loader = data.train_dataloader()
    started, done = time.perf_counter(), 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            loss = model.loss(model(model.normalise(batch["image"])), batch["label"])
            loss.backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return time.perf_counter() - started


def main():
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    sides = {
        "bare loop": by_loop,
        "plain Trainer": lambda steps: by_trainer(steps, plain=True),
        "cli.py fit": by_trainer,
    }
    for side in sides.values():
        side(20)
    rounds = [{name: side(options.steps) for name, side in sides.items()} for _ in range(options.rounds)]
    for name in sides:
        over = [1e6 * (times[name] - times["bare loop"]) / options.steps for times in rounds]
        step = statistics.median(1e6 * times[name] / options.steps for times in rounds)
        spread = f"{min(over):.0f} to {max(over):.0f}"
        print(f"{name:14} {step:6.0f} µs a step, over the bare loop {statistics.median(over):6.0f} µs ({spread})")


if __name__ == "__main__":
    main()
