"""The folder of a cell: its state on disk, the lock of whoever runs it, and its failures.

runs/<study>/<cell>/lock          held while the cell runs; the system lets go of it, however the process ends. It names
                                  the process that holds it, or that was killed while it did
runs/<study>/<cell>/failed.json   attempts so far and why the last one failed, until one succeeds
runs/<study>/<cell>/failed.log    traceback of the last failure
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

from datamodules.atomic import write_text
from studies.runs import RunError, RunFolder

State = Literal["finished", "running", "waiting", "failed", "set aside"]
STATES: tuple[State, ...] = ("finished", "running", "waiting", "failed", "set aside")
ATTEMPTS = 3
DIVERGED = 3
LASTING = (2, DIVERGED)
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
        diverged: Its loss was not finite: of a trial that is an outcome, and its settings are not chosen.
    """

    cell: str
    reason: str
    attempts: int = 0
    lasting: bool = False
    log: Path | None = None
    diverged: bool = False

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
        """Whether the run has come to its end; no where a damaged summary does not tell: running the cell says so."""
        try:
            return self.run.read_summary().get("state") == "finished"
        except RunError:
            return False

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
        """Hold the cell for this process; yields whether nobody else does.

        Raises:
            RunError: The folder cannot be written to, or its file system has no locks.
        """
        path = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}", where="--runs_dir") from error
        with file:
            # A lock that was moved away with its run (`replace`) in between protects nothing here.
            if not _lock(file, fcntl.LOCK_EX) or not _is_at(file, path):
                yield False
                return
            # A command that runs the cell shares the lock: it goes on where this process is killed.
            os.set_inheritable(file.fileno(), True)
            with suppress(OSError):  # a full disk
                before = self.holders()
                file.truncate(0)
                file.write("\n".join([holder_name(os.getpid()), *before]).encode())
            try:
                yield True
            finally:
                with suppress(OSError):
                    file.truncate(0)

    def holders(self) -> list[str]:
        """The process that runs the cell, if any, and those that were killed while they did since one let go of it."""
        try:
            return (self.path / "lock").read_text(errors="replace").split()
        except OSError:
            return []

    def locked(self) -> bool:
        """Whether some process runs the cell."""
        try:
            file = (self.path / "lock").open("rb", buffering=0)
        except OSError:
            return False
        with file:
            return not _lock(file, fcntl.LOCK_SH)

    # Failures ----------------------------------------------------------------------------------------------------

    def failure(self) -> Failure | None:
        """The last failure, or None."""
        path = self.path / "failed.json"
        if not path.is_file():
            return None
        try:
            stored = dict(json.loads(path.read_text()))
            attempts, lasting = int(stored.get("attempts", 1)), bool(stored.get("lasting"))
        except (OSError, ValueError, TypeError):
            stored, attempts, lasting = {"reason": f"unknown: {path.name} is damaged"}, 1, False
        log, diverged = path.with_suffix(".log"), bool(stored.get("diverged"))
        return Failure(self.path.name, str(stored.get("reason")), attempts, lasting, log, diverged)

    def record_failure(self, reason: str, log: str, *, code: int) -> Failure:
        """Write one more failure, which ended with the exit code `code`."""
        before = self.failure()
        attempts = 1 + (before.attempts if before is not None else 0)
        write_text(self.path / "failed.log", log)
        lasting, diverged = code in LASTING, code == DIVERGED
        facts = {"cell": self.path.name, "reason": reason, "attempts": attempts}
        write_text(self.path / "failed.json", json.dumps({**facts, "lasting": lasting, "diverged": diverged}))
        return Failure(self.path.name, reason, attempts, lasting, self.path / "failed.log", diverged)

    def forgive(self) -> None:
        """Let a command that begins try a lasting failure again: what was wrong may have been mended."""
        failure = self.failure()
        if failure is not None and failure.lasting and not failure.set_aside:
            facts = {"cell": failure.cell, "reason": failure.reason, "attempts": failure.attempts}
            write_text(self.path / "failed.json", json.dumps({**facts, "lasting": False, "diverged": failure.diverged}))

    def forget_failure(self) -> None:
        """Remove the record of failures; the log of the last one stays."""
        (self.path / "failed.json").unlink(missing_ok=True)

    def replace(self) -> Path | None:
        """Move the run out of the way, for `--rerun`; returns where it is now, None where there was none.

        Raises:
            RunError: Some process runs the cell.
        """
        if not self.path.is_dir():
            return None
        with self.claim() as mine:
            if not mine:
                raise RunError(f"{self.path.name} is running", where="--rerun", hint="stop it first")
            stamp = time.strftime("%Y%m%dT%H%M%S")
            target = self.path.parent / REPLACED / f"{self.path.name}.{stamp}"
            number = 1
            while target.exists():
                number += 1
                target = target.with_name(f"{self.path.name}.{stamp}.{number}")
            target.parent.mkdir(exist_ok=True)
            os.replace(self.path, target)
        return target


def holder_name(process: int) -> str:
    """What a lock says of a process of this machine."""
    return f"{process}@{platform.node()}"


def _lock(file: FileIO, kind: int) -> bool:
    """Take a lock unless another process has it; returns whether this one has it now.

    Raises:
        RunError: The file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunError(
            f"{file.name!s} cannot be locked: {error.strerror}",
            where="--runs_dir",
            hint="choose a folder on a file system with flock (NFS 4, Lustre mounted with -o flock)",
        ) from error
    return True


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
