"""What a run has cost so far, kept across resumes."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class Cost(Callback):
    """Counts the seconds of training, those before a resume included (up to the checkpoint it resumed from)."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training."""
        running = time.monotonic() - self._started if self._started is not None else 0.0
        return self._before + running

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._before, self._started = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._before = state_dict["seconds"]
