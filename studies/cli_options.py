"""Settings of the command line of single runs: its own options, the trainer's defaults, Lightning's tips."""

import logging
import warnings
from typing import Any, Literal

from lightning_modules.callbacks.wandb_mode import Mode

HUSHED = (  # warnings of Lightning about what farshot does on purpose
    r"`isinstance\(treespec",
    "The number of training batches",
    "Total length of `StreamLoader` across ranks is zero",
    "The '.*_dataloader' does not have many",
    "Be aware that when using `ckpt_path`, callbacks",
    r"Found \d+ module\(s\) in eval mode",
)
TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # our samplers shard already
    "num_sanity_val_steps": 0,
    "max_epochs": -1,
    "logger": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
OPTIONS: list[tuple[str, Any, Any, str]] = [
    ("experiment", str | None, None, "Folder of related runs; default: the config's name."),
    ("run", str | None, None, "Name of the run; default: a hash of configuration and seed."),
    ("runs_dir", str, "runs", "Folder of all experiments."),
    ("overwrite", bool, False, "Start anew where the run exists."),
    ("evaluate", bool, False, "fit: test the selected weights afterwards."),
    ("select", Literal["last", "best"], "last", "Which weights are the run's result."),
    ("monitor", str, "validation/loss", "Validation metric that select: best goes by."),
    ("checkpoint_every", int, 1000, "Optimizer steps between checkpoints within an epoch."),
    ("image_hashes", bool, True, "Record hashes of the training images, to check later transfers by content."),
    ("wandb", Mode, "auto", "Mirror to W&B; auto: online with a key, else offline."),
    ("wandb_project", str, "farshot", "W&B project."),
]
"""(name, type, default, help) of each option beside trainer, model and data."""


def hush_lightning() -> None:
    """Silence Lightning's tips, and its warnings about what farshot does on purpose."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in HUSHED:
        warnings.filterwarnings("ignore", message=message)
