"""The folder of a cell: its state on disk, the lock of whoever runs it, and its failures.

runs/<study>/<cell>/lock          held while the cell runs; the system lets go of it, however the process ends
runs/<study>/<cell>/failed.json   attempts so far and why the last one failed, until one succeeds
runs/<study>/<cell>/failed.log    traceback of the last failure
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.atomic import write_text
from studies.runs import RunFolder

State = Literal["finished", "running", "waiting", "failed", "set aside"]
STATES: tuple[State, ...] = ("finished", "running", "waiting", "failed", "set aside")
ATTEMPTS = 3
LASTING = (2, 3)
"""Exit codes of failures that the same command would meet again at once: bad input, a loss that is not finite."""
REPLACED = ".replaced"


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result.

    Attributes:
        cell: Its name.
        reason: The last line of why.
        attempts: How often it was tried.
        lasting: The same command would fail again at once, so this one does not try again.
        log: Its traceback.
    """

    cell: str
    reason: str
    attempts: int = 0
    lasting: bool = False
    log: Path | None = None

    @property
    def set_aside(self) -> bool:
        """Whether no command tries it again unless it is asked to."""
        return self.attempts >= ATTEMPTS


@dataclass(frozen=True)
class CellFolder:
    """State of a cell, as its files tell.

    Attributes:
        path: The run folder.
    """

    path: Path

    @property
    def run(self) -> RunFolder:
        """The run folder itself."""
        return RunFolder(self.path)

    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / "summary.json").is_file() and self.run.read_summary().get("state") == "finished"

    def state(self) -> State:
        """Finished, running (in any process that shares the disk), waiting, failed, or set aside after three tries."""
        if self.finished():
            return "finished"
        if self.locked():
            return "running"
        failure = self.failure()
        if failure is None:
            return "waiting"
        return "set aside" if failure.set_aside else "failed"

    # The lock ----------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Hold the cell for this process; yields whether nobody else does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            yield True

    def holder(self) -> int | None:
        """The process that ran the cell last, on its own machine; None where nobody has."""
        try:
            return int((self.path / "lock").read_text() or 0) or None
        except OSError:
            return None

    def locked(self) -> bool:
        """Whether some process runs the cell."""
        try:
            file = (self.path / "lock").open("rb")
        except OSError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    # Failures ----------------------------------------------------------------------------------------------------

    def failure(self) -> Failure | None:
        """The last failure, or None."""
        path = self.path / "failed.json"
        if not path.is_file():
            return None
        stored = json.loads(path.read_text())
        attempts, lasting = int(stored.get("attempts", 1)), bool(stored.get("lasting"))
        return Failure(self.path.name, str(stored["reason"]), attempts, lasting, path.with_suffix(".log"))

    def record_failure(self, reason: str, log: str, *, lasting: bool) -> Failure:
        """Write one more failure."""
        before = self.failure()
        attempts = 1 + (before.attempts if before is not None else 0)
        write_text(self.path / "failed.log", log)
        facts = {"cell": self.path.name, "reason": reason, "attempts": attempts, "lasting": lasting}
        write_text(self.path / "failed.json", json.dumps(facts))
        return Failure(self.path.name, reason, attempts, lasting, self.path / "failed.log")

    def forgive(self) -> None:
        """Let a command that begins try a lasting failure again: what was wrong may have been mended."""
        failure = self.failure()
        if failure is not None and failure.lasting and not failure.set_aside:
            facts = {"cell": failure.cell, "reason": failure.reason, "attempts": failure.attempts, "lasting": False}
            write_text(self.path / "failed.json", json.dumps(facts))

    def forget_failure(self) -> None:
        """Remove the record of failures; the log of the last one stays."""
        (self.path / "failed.json").unlink(missing_ok=True)

    def replace(self) -> Path | None:
        """Move the run out of the way, for `--rerun`; returns where it is now, None where there was none."""
        if not self.path.is_dir():
            return None
        stamp = time.strftime("%Y%m%dT%H%M%S")
        target = self.path.parent / REPLACED / f"{self.path.name}.{stamp}"
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{self.path.name}.{stamp}.{number}")
        target.parent.mkdir(exist_ok=True)
        os.replace(self.path, target)
        return target
