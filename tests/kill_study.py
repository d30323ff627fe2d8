"""Works on a study in two processes that are killed with SIGKILL at random points; started by test_kills.

Usage: python -m tests.kill_study FILE RUNS_DIR KILLS
The processes are forks of one that has imported everything and trained nothing.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from studies import lightning_cli
from studies.spec import read_study
from studies.worker import begin, work

WORKERS = 2
LONGEST = 0.8  # seconds from a start to its kill; a cell takes about half a second


def work_in_fork(study, runs_dir):
    """Work on a study in a fork; returns its process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ["PL_GLOBAL_SEED"] = "0"
            begin(study, runs_dir)
            code = len(work(study, runs_dir))
        finally:
            os._exit(code)
    return child


def main(path, runs_dir, kills):
    """Kill as often as asked; the last processes may finish."""
    lightning_cli.import_classes()
    study, chance = read_study(path), random.Random(0)
    for _ in range(kills):
        children = [work_in_fork(study, runs_dir) for _ in range(WORKERS)]
        time.sleep(chance.uniform(0.1, LONGEST))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
