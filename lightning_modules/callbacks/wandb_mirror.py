"""Mirrors metrics to Weights & Biases; whatever happens to the mirror, the run goes on."""

import logging
import os
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lightning_modules.callbacks.wandb_mode import Mode, choose_mode, plain_name

log = logging.getLogger("farshot.wandb")
PATIENCE = float(os.environ.get("FARSHOT_WANDB_PATIENCE", "10"))
"""Seconds that the mirror may cost at the start and at the end; more on a busy machine, where W&B starts slowly."""


def open_run(
    mode: str, *, folder: Path, project: str, group: str, name: str, job_type: str | None, config: Mapping[str, Any]
) -> Any:
    """Open a W&B run that records nothing but what it is given: online within a short wait, else offline, else None.

    Args:
        mode: online or offline.
        folder: Its files are kept in `wandb/` there.
        project: W&B project.
        group: W&B group: the experiment or study.
        name: The run's name, unique in its group.
        job_type: What kind of run it is: pretrain, transfer, report.
        config: Configuration to show, without data paths.
    """
    facts: dict[str, Any] = {"project": project, "group": group, "name": name, "job_type": job_type}
    key = plain_name(f"{group}-{name}")
    # W&B holds the id of an attempt that was given up until the process ends.
    attempts = {mode: key, "offline": key if mode == "offline" else f"{key}-offline"}
    for attempt, run_id in attempts.items():
        start = partial(_init, mode=attempt, id=run_id, dir=str(folder), config=dict(config), **facts)
        run, reason = within_patience(start)
        if reason is None:
            return run
        log.warning("W&B %s: %s; the run goes on without it (results are in %s)", attempt, reason, folder)
    return None


def _init(**facts: Any) -> Any:
    # W&B reports its own errors to its makers: stack traces hold paths, and at exit it waits 20 s to send them nowhere.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb.init(
        resume="allow",
        # No host name, program, arguments or code: they may hold names and paths.
        settings=wandb.Settings(
            init_timeout=PATIENCE,
            reinit="create_new",  # not a run of this process that was given up and is still open
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
        ),
        **facts,
    )


def within_patience(call: Callable[[], object]) -> tuple[Any, BaseException | str | None]:
    """Run `call` beside the main thread with a bounded wait; returns its result, and why there is none (else None)."""
    results: list[object] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE + 2.0)
    if results:
        return results[0], None
    return None, errors[0] if errors else f"no answer after {PATIENCE:.0f} s"


class WandbMirror(Logger):
    """Sends metrics, configuration and aggregate figures to W&B. `metrics.jsonl` and `summary.json` stay the truth.

    Args:
        folder: The run folder; an offline mirror is kept in its `wandb/` (send it later with `wandb sync`).
        project: W&B project.
        group: W&B group: the experiment or study.
        mode: auto = online with a key, else offline. `WANDB_MODE` in the environment wins over auto.
        config: Configuration to show, without data paths.
        job_type: W&B job type: pretrain or transfer.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        group: str,
        mode: Mode,
        config: dict[str, Any],
        job_type: str | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.project, self.group, self.mode, self.config = (
            Path(folder),
            project,
            group,
            mode,
            config,
        )
        self.job_type = job_type
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
        if mode != "off":
            self._run = open_run(
                mode,
                folder=self.folder,
                project=self.project,
                group=self.group,
                name=self.folder.name,
                job_type=self.job_type,
                config=self.config,
            )
        self._broken = self._run is None

    def _mode(self) -> str:
        return choose_mode(self.mode)

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
        """Run `call` with a bounded wait; on failure or delay the mirror is given up."""
        _, reason = within_patience(call)
        if reason is not None:
            log.warning("W&B: %s; the run goes on without it (results are in %s)", reason, self.folder)
            self._broken = True
        return reason is None
