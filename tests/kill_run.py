"""Fits runs, each in a process of its own, and kills them with SIGKILL right before a batch; started by test_resume.

Usage: python -m tests.kill_run '[[n, [words of the command line]], ...]' prints the exit codes; n = -1: no kill.
The processes are forks of one that has imported everything and trained nothing.
"""

import json
import os
import signal
import sys

from pytorch_lightning import Callback

import studies.lightning_cli as lightning_cli
from cli import main


class Kill(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready > self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(after, words):
    """Fit in this process, killed before batch `after`, counted from 0."""
    original = lightning_cli.FarshotCLI._instantiate_trainer

    def with_kill(self, config, callbacks):
        return original(self, config, [*callbacks, Kill(after)] if after >= 0 else callbacks)

    lightning_cli.FarshotCLI._instantiate_trainer = with_kill
    try:
        main(words)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def fit_in_fork(after, words):
    """Fit in a fork; returns its exit code, −9 where it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr
        code = 1
        try:
            code = fit(after, words)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    lightning_cli.import_classes()
    print(json.dumps([fit_in_fork(after, words) for after, words in json.loads(sys.argv[1])]))
