"""What the Trainer, the task and the callbacks cost a step, over a bare loop on the same batches.

    python benchmarks/trainer_overhead.py [--steps 400] [--rounds 5]

Both train the same small net on the same stream of rendered images, in turn; the difference a step is the overhead.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer

from datamodules import Synthetic
from lightning_modules import Classification
from lightning_modules.backbones.factory import classifier_parameters
from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from lightning_modules.callbacks.cost import Cost
from lightning_modules.callbacks.finite_loss import FiniteLoss
from lightning_modules.callbacks.jsonl_logger import JsonlLogger
from lightning_modules.optimizers import agc_parameter_groups


def build():
    """Data and model of both sides."""
    data = Synthetic(num_train=512, num_test=8, classes=4, image_size=8, batch_size=4, val_fraction=0.0, seed=0)
    data.setup()
    torch.manual_seed(0)
    model = Classification("test_resnet", data.num_classes, data.task, data.class_names)
    return data, model


class Clock(Callback):
    """Time from the first batch to the last, without the checkpoint at the end."""

    def on_train_start(self, trainer, pl_module):
        """Start."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop, so far."""
        self.seconds = time.perf_counter() - self.started


def by_trainer(steps):
    """Seconds of training by the Trainer with everything that `cli.py fit` adds."""
    data, model = build()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=steps,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=JsonlLogger(Path(folder) / "metrics.jsonl"),
            callbacks=[FiniteLoss(), Cost(), clock, Checkpoints(Path(folder), every_n_steps=10**9)],
            plugins=[AtomicCheckpointIO()],
        )
        trainer.fit(model, datamodule=data)
    return clock.seconds


def by_loop(steps):
    """Seconds of the same steps in a bare loop."""
    data, model = build()
    optimizer = model.make_optimizer(agc_parameter_groups(model, classifier_parameters(model.backbone)))
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
    by_trainer(20), by_loop(20)
    rounds = [(by_trainer(options.steps), by_loop(options.steps)) for _ in range(options.rounds)]
    overhead = [1e6 * (trainer - loop) / options.steps for trainer, loop in rounds]
    loop = statistics.median(1e6 * loop / options.steps for _, loop in rounds)
    print(f"bare loop: {loop:.0f} µs a step (median of {options.rounds} rounds of {options.steps} steps)")
    print(f"overhead:  {statistics.median(overhead):.0f} µs a step ({min(overhead):.0f} to {max(overhead):.0f})")


if __name__ == "__main__":
    main()
