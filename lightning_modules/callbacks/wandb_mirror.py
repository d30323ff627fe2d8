"""Mirrors metrics to Weights & Biases; whatever happens to the mirror, the run goes on."""

import logging
import netrc
import os
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger("farshot.wandb")
Mode = Literal["auto", "online", "offline", "off"]
PATIENCE = float(os.environ.get("FARSHOT_WANDB_PATIENCE", "10"))
"""Seconds that the mirror may cost at the start and at the end; more on a busy machine, where W&B starts slowly."""


class WandbMirror(Logger):
    """Sends metrics, configuration and aggregate figures to W&B. `metrics.jsonl` and `summary.json` stay the truth.

    Args:
        folder: The run folder; an offline mirror is kept in its `wandb/` (send it later with `wandb sync`).
        project: W&B project.
        group: W&B group: the experiment or study.
        mode: auto = online with a key, else offline. `WANDB_MODE` in the environment wins over auto.
        config: Configuration to show, without data paths.
    """

    def __init__(self, folder: Path, project: str, group: str, mode: Mode, config: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.project, self.group, self.mode, self.config = (
            Path(folder),
            project,
            group,
            mode,
            config,
        )
        self._run: Any = None
        self._broken = False

    @property
    def name(self) -> str:
        """The W&B project."""
        return self.project

    @property
    def version(self) -> str:
        """The run's name."""
        return self.folder.name

    @rank_zero_only
    def start(self) -> None:
        """Open the W&B run: online if possible within a short wait, else offline, else not at all."""
        mode = self._mode()
        if mode == "off":
            self._broken = True
            return
        attempts = [mode, "offline"] if mode == "online" else [mode]
        for attempt in attempts:
            if self._guarded(lambda attempt=attempt: self._open(attempt)) and self._run is not None:  # type: ignore[misc]
                self._broken = False
                return
        self._broken = True

    def _mode(self) -> str:
        if self.mode != "auto":
            return self.mode
        wanted = os.environ.get("WANDB_MODE", "")
        if wanted in ("disabled", "dryrun", "offline", "online"):
            return {"disabled": "off", "dryrun": "offline"}.get(wanted, wanted)
        return "online" if _has_key() else "offline"

    def _open(self, mode: str) -> None:
        import wandb

        self._run = wandb.init(
            project=self.project,
            group=self.group,
            name=self.folder.name,
            id=f"{self.group}-{self.folder.name}",
            resume="allow",
            dir=str(self.folder),
            mode=mode,  # type: ignore[arg-type]
            config=self.config,
            # No host name, program, arguments or code: they may hold names and paths.
            settings=wandb.Settings(
                init_timeout=PATIENCE,
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
            ),
        )

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send the metrics of one step."""
        if self._run is None and not self._broken:
            self.start()
        if not self._broken:
            self._guarded(lambda: self._run.log({**metrics, "trainer/step": step}))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is sent when the run opens."""

    @rank_zero_only
    def summarise(self, values: dict[str, float]) -> None:
        """Set aggregate results in the run's summary."""
        if self._run is not None and not self._broken:
            self._guarded(lambda: self._run.summary.update(values))

    @rank_zero_only
    def close(self) -> None:
        """Finish the W&B run; what is not sent after a short wait stays in the run folder."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish())
            self._run = None

    def _guarded(self, call: Callable[[], object]) -> bool:
        """Run `call` beside the main thread with a bounded wait; on failure or delay the mirror is given up."""
        errors: list[BaseException] = []

        def attempt() -> None:
            try:
                call()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(PATIENCE + 2.0)
        if thread.is_alive() or errors:
            reason = errors[0] if errors else f"no answer after {PATIENCE:.0f} s"
            log.warning("W&B: %s; the run goes on without it (results are in %s)", reason, self.folder)
            self._broken = True
            return False
        return True


def _has_key() -> bool:
    """Whether a W&B key is configured in the environment or in .netrc, without asking the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        import wandb

        host = urlsplit(wandb.Settings().base_url).hostname
        return host is not None and netrc.netrc().authenticators(host) is not None
    except Exception:  # no .netrc, or one that cannot be read: then there is no key
        return False
