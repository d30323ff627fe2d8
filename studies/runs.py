"""Run folders: where a run keeps what it was asked, what it did and what came out, and whether it may go on.

runs/<experiment>/<run>/config.yaml         the whole configuration
metrics.jsonl       every logged metric, appended
summary.json        state, thresholds and result rows
predictions.parquet logits of validation and test
checkpoints/        last.ckpt, best.ckpt
environment.json    versions and devices, one entry a start
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from datamodules.atomic import write_text
from datamodules.errors import DataError

State = Literal["new", "resume", "finished"]

#: Settings that change where or how fast a run goes, but not what comes out.
VOLATILE = {
    *(
        "config",
        "experiment",
        "run",
        "runs_dir",
        "overwrite",
        "evaluate",
        "checkpoint_every",
        "wandb",
        "image_hashes",
        "wandb_project",
    ),
    *("ckpt_path", "weights_only", "verbose"),
    *(
        "data.init_args.root",
        "data.init_args.num_workers",
        "data.init_args.cache_gb",
        "data.init_args.download",
        "data.init_args.leaks",
    ),
    "data.init_args.max_batch_per_device",
    *("trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes", "trainer.logger"),
    *(
        "trainer.default_root_dir",
        "trainer.enable_progress_bar",
        "trainer.enable_model_summary",
        "trainer.profiler",
    ),
    *("trainer.log_every_n_steps", "trainer.enable_checkpointing", "trainer.plugins", "trainer.barebones"),
    *(
        "trainer.num_sanity_val_steps",
        "trainer.use_distributed_sampler",
        "trainer.benchmark",
        "trainer.model_registry",
    ),
}


#: Settings that name a file, or a prepared folder, whose content counts and not its place.
CONTENTS = tuple(
    f"data.init_args.{name}" for name in ("noise_confusion", "curation_scores", "caption_names", "prepared")
)
NESTED = re.compile(r"^data\.init_args\.\w+\.\d+\.init_args\.")


class RunError(DataError):
    """A run folder that cannot be used as asked. Ends the command with exit code 2."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings, and lists of them, into dotted keys; lists of plain values stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, dotted)
        else:
            flat[dotted] = value
    return flat


def identity(config: Mapping[str, Any], weights: str | None = None) -> dict[str, Any]:
    """What decides a run's result: the configuration as dotted keys without paths, workers, devices and logging.

    Args:
        config: A run's whole configuration.
        weights: Hash of the weights that the run starts from; it stands for their path.
    """
    whole = flatten(config)
    # Sources of a mixture, data.init_args.sources.0.init_args.root, have settings like any data set.
    flat = {key: value for key, value in whole.items() if NESTED.sub("data.init_args.", key) not in VOLATILE}
    root, name = whole.get("data.init_args.root"), "data.init_args.dataset_name"
    if root and not flat.get(name) and str(flat.get("data.class_path")).endswith(("ImageFolder", "ImageTable")):
        flat[name] = Path(str(root)).resolve().name  # one's own data set is known by its folder's name
    for key in CONTENTS:
        if flat.get(key):
            flat[key] = _content(Path(str(flat[key])))
    if weights is not None:
        flat["model.init_args.weights"] = weights
    return flat


def _content(path: Path) -> str:
    """Hash of a file's bytes, or of a prepared folder's settings; the path itself where there is nothing to read."""
    file = path / "settings.json" if path.is_dir() else path
    return hashlib.blake2b(file.read_bytes(), digest_size=6).hexdigest() if file.is_file() else str(path)


def hash_of(values: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of the BLAKE2b hash of plain values, independent of their order."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Attributes:
        path: The folder; its parent is the experiment.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """Logits of validation and test."""
        return self.path / "predictions.parquet"

    @property
    def metrics(self) -> Path:
        """Lines of logged metrics."""
        return self.path / "metrics.jsonl"

    def read_config(self) -> dict[str, Any]:
        """The configuration that the run was started with.

        Raises:
            RunError: The folder is no run folder.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            raise RunError(
                f"{self.path} is not a run folder: it has no config.yaml",
                where="--run",
                hint="a run folder looks like runs/<experiment>/<run>",
            )
        return dict(yaml.safe_load(path.read_text()))

    def read_identity(self) -> dict[str, Any]:
        """What decided the run's result, as `identity` gave it; empty where the run has not begun."""
        return dict(_read_json(self.path / "identity.json", {}))

    def read_summary(self) -> dict[str, Any]:
        """State, thresholds and rows; empty where nothing has finished yet.

        Raises:
            RunError: The file is damaged.
        """
        return dict(_read_json(self.path / "summary.json", {}))

    def read_starts(self) -> list[dict[str, Any]]:
        """Versions and devices of each start, the first one first."""
        return list(_read_json(self.path / "environment.json", []))

    def update_summary(self, **values: Any) -> None:
        """Merge values into `summary.json`, atomically."""
        write_text(self.path / "summary.json", json.dumps({**self.read_summary(), **values}, indent=1, default=str))

    def state(self, wanted: Mapping[str, Any]) -> State:
        """Say whether a run with the identity `wanted` is new here, goes on, or is done.

        Raises:
            RunError: The folder holds a run of another configuration; the differing keys are listed.
        """
        stored = self.read_identity()
        if not stored:
            return "new"
        fresh = json.loads(json.dumps(dict(wanted), default=str))
        changed = sorted(key for key in stored.keys() | fresh.keys() if stored.get(key) != fresh.get(key))
        if changed and not self.metrics.is_file() and self.last_checkpoint() is None:
            return "new"  # the start failed, over its data say: nothing is lost
        if changed:
            lines = [f"    {key}: {stored.get(key)!r} there, {fresh.get(key)!r} now" for key in changed[:6]]
            more = [f"    ... ({len(changed) - 6} more)"] if len(changed) > 6 else []
            raise RunError(
                "\n".join([f"{self.path} holds a run of another configuration:", *lines, *more]),
                hint="choose another --run NAME, or --overwrite true to start anew",
            )
        return "finished" if self.read_summary().get("state") == "finished" else "resume"

    def begin(self, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Write the configuration, its identity and the environment of this start."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_text(self.path / "environment.json", json.dumps([*self.read_starts(), environment()], indent=1))
        # Last: a folder with an identity is one that can be resumed.
        write_text(self.path / "identity.json", json.dumps(dict(wanted), indent=1, default=str))

    def clear(self) -> None:
        """Remove the run, for `--overwrite`."""
        if self.path.is_dir():
            shutil.rmtree(self.path)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, if any was written."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    def selected_checkpoint(self) -> Path:
        """The checkpoint that holds the run's result.

        Raises:
            RunError: There is none.
        """
        named = str(self.read_summary().get("checkpoint", "checkpoints/last.ckpt"))
        path = self.path / named
        if not path.is_file():
            raise RunError(
                f"{self.path} has no {named}",
                where="--run",
                hint="fit the run first; a study's transfer cells keep no checkpoints",
            )
        return path


def _read_json(path: Path, absent: dict[str, Any] | list[Any]) -> Any:
    """Content of a file of a run; `absent` where there is none.

    Raises:
        RunError: The file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return absent
    except (OSError, ValueError) as error:
        found = error
    if not isinstance(found, type(absent)):
        raise RunError(
            f"{path} is damaged: {found}" if isinstance(found, Exception) else f"{path} is damaged",
            hint="move the run's folder away and run it again; in a study: --rerun cell=NAME",
        )
    return found


def require_outputs(folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Refuse a pre-training that names no classes where outputs are asked for.

    Args:
        folder: The run.
        facts: Hyper-parameters of its checkpoint.

    Raises:
        RunError: The run was trained by a method without outputs, such as SimCLR.
    """
    if "method" in facts:  # the tasks with outputs name none
        raise RunError(
            f"{folder.path} is a pre-training ({facts['method']}) that names no classes",
            where="--run",
            hint="transfer its weights with Classification, or `python cli.py probe`; of CLIP: `zero-shot`",
        )


@cache
def code_version() -> str:
    """The distribution's version and, in a git checkout, the commit ("+" = with uncommitted changes)."""
    try:
        number = version("farshot")
    except Exception:
        number = "unknown"
    here = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f"{number}-{git('rev-parse', '--short=10', 'HEAD')}{dirty}"
    except (OSError, subprocess.SubprocessError):
        return number


@cache
def _versions() -> dict[str, str]:
    names = (
        "torch",
        "torchvision",
        "pytorch-lightning",
        "torchmetrics",
        "timm",
        "jsonargparse",
        "albumentations",
        "numpy",
    )
    return {name: version(name) for name in names}


def environment() -> dict[str, Any]:
    """Versions and devices of this process, without host names or paths."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code_version": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": device,
        "devices": torch.cuda.device_count() or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": Path(sys.argv[0]).name,
        "versions": _versions(),
    }
