"""Fits a run in a process of its own and kills it with SIGKILL right after the n-th batch; started by test_resume."""

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


after = int(sys.argv[1])
original = lightning_cli.FarshotCLI._instantiate_trainer


def with_kill(self, config, callbacks):
    return original(self, config, [*callbacks, Kill(after)] if after >= 0 else callbacks)


lightning_cli.FarshotCLI._instantiate_trainer = with_kill
main(sys.argv[2:])
