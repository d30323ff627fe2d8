"""Metrics as lines of JSON that are only ever appended, so that a resume loses none."""

import json
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class JsonlLogger(Logger):
    """Appends one line a call to `metrics.jsonl`: {"step": ..., "time": seconds since 1970, name: value, ...}.

    Lines after a resume may repeat steps that were done after the last checkpoint; the later line counts.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def name(self) -> str:
        """Name of the experiment's folder."""
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        """Name of the run's folder."""
        return self.path.parent.name

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append the finite metrics of one step."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line + "\n")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is in `config.yaml`."""
