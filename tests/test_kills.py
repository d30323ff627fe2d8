"""Several workers on one study: locks, kills, failures, damaged files, full disks."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from studies.cell_folder import ATTEMPTS, CellFolder, _is_at
from studies.jobs import run_study
from studies.layers import StudyError
from studies.runner import execute_apart
from studies.runs import RunError
from studies.spec import read_study
from studies.store import collect
from studies.worker import work
from tests.stub_runs import stub_runs, tries_of
from tests.test_engine import finish
from tests.test_study import STUDY

ROOT = Path(__file__).parent.parent


# Several processes, kills, crashes ------------------------------------------------------------------------------------


def test_three_failures_set_a_cell_aside_until_it_is_asked_for(write, run_cli, tmp_path):
    path = write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1]})
    study = read_study(path)
    tries = []

    def execute(words, cell):
        tries.append(cell.columns["seed"])
        if cell.columns["seed"] == 0:
            raise OSError("the disk is gone")
        finish(tmp_path, cell)

    (failure,) = work(study, tmp_path, execute)
    assert tries == [0, 1, 0, 0]  # the others first
    assert (failure.attempts, failure.set_aside, failure.reason) == (ATTEMPTS, True, "the disk is gone")
    assert "the disk is gone" in failure.log.read_text()
    work(study, tmp_path, execute)
    assert len(tries) == 4
    code, out, _ = run_cli("study", "status", path, "--runs_dir", tmp_path)
    assert (code, "set aside after 3 tries" in out) == (0, True)
    code, out, _ = run_cli("study", "run", path, "--runs_dir", tmp_path, "--rerun", "state=set aside", "--dry-run")
    assert (code, "1 cells run anew" in out) == (0, True)
    assert CellFolder(failure.log.parent).state() == "set aside"  # a dry run changes nothing


def test_lasting_failures_are_tried_once_a_command(write, tmp_path):
    study = read_study(write({"sources": ["scratch"], "shots": [1], "seeds": [0]}))
    tries = []

    def execute(words, cell):
        from datamodules.errors import DataError

        tries.append(cell.name)
        raise DataError("no such folder")

    for count in range(1, 5):
        (failure,) = run_study(study, tmp_path, execute)
        assert len(tries) == failure.attempts == min(count, ATTEMPTS)


def test_a_cell_that_another_process_runs_is_left_alone_and_waited_for(write, tmp_path):
    study = read_study(write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1]}))
    first, second = study.cells
    folder = CellFolder(tmp_path / "tiny" / first.name)
    folder.path.mkdir(parents=True)
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder.path / "lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert folder.state() == "running"
    ran = []

    def execute(words, cell):
        ran.append(cell.name)
        finish(tmp_path, cell)
        holder.kill()  # a crash: the system lets go of the lock
        holder.wait()

    assert work(study, tmp_path, execute) == []
    assert ran == [second.name, first.name]


def test_rerun_keeps_the_old_run(write, run_cli, tmp_path):
    path = write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1]})
    study = read_study(path)
    for cell in study.cells:
        finish(tmp_path, cell)
        (tmp_path / "tiny" / cell.name / "note.txt").write_text(cell.name)
    from studies.commands.study import rerun

    assert rerun(study, tmp_path, ["seed=1"]) == {study.cells[1].name}
    assert [CellFolder(tmp_path / "tiny" / cell.name).state() for cell in study.cells] == ["finished", "waiting"]
    (kept,) = (tmp_path / "tiny" / ".replaced").iterdir()
    assert (kept / "note.txt").read_text() == study.cells[1].name


VOLATILE = ["seconds", "peak_memory", "energy"]


def test_killed_studies_end_like_undisturbed_ones(write, tmp_path):
    """Two workers at a time, killed ten times at random points, between two writes of a run as well as in training."""
    path = write({"shots": [1, 2]}, config={"trainer": {"max_steps": 4}, "checkpoint_every": 1})
    study = read_study(path)
    assert run_study(study, tmp_path / "whole") == []
    words = [sys.executable, "-m", "tests.kill_study", path, tmp_path / "killed", "10"]
    subprocess.run(words, cwd=ROOT, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run_study(study, tmp_path / "killed") == []
    frames = [collect(tmp_path / name / "tiny").drop(columns=VOLATILE) for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*frames)
    assert len(frames[0]) > 100
    assert not list((tmp_path / "killed" / "tiny").glob("*/.*.tmp*"))
    assert not list((tmp_path / "killed" / "tiny").glob("far-*/checkpoints"))


def test_no_cell_runs_twice_whoever_works_and_is_killed(write, tmp_path):
    study = read_study(write({"sources": ["scratch"], "shots": [1, 2], "seeds": [*range(8)]}))
    environment = {**os.environ, **stub_runs(tmp_path / "hook", "time.sleep(0.05)")}
    words = [sys.executable, "-m", "studies.worker", study.path, "--runs_dir", tmp_path]
    chance, killed = random.Random(0), set()

    def start():
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)

    workers = [start() for _ in range(3)]
    for _ in range(3):
        before = len(list(tmp_path.glob("tiny/*/summary.json")))
        while len(list(tmp_path.glob("tiny/*/summary.json"))) < before + 2:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.05))
        victim = workers.pop(0)
        victim.kill()
        killed.add(str(victim.pid))
        workers.append(start())
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    for cell in study.cells:
        *tries, begin, end = tries_of(tmp_path / "tiny" / cell.name)
        assert (begin[0], end[0], begin[1]) == ("begin", "end", end[1])
        assert {process for _, process in tries} <= killed


def test_a_worker_that_dies_costs_the_cell_it_ran_a_try(write, tmp_path, monkeypatch):
    """As the kernel kills when memory runs out; not the cell that the worker had failed before."""
    study = read_study(write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1, 2]}))
    first, second, _ = (tmp_path / "tiny" / cell.name for cell in study.cells)
    meanwhile = (
        "n = (folder / 'tries.log').read_text().count('begin'); "
        f"1 / (n - 1) if folder.name == {first.name!r} else "
        f"os.kill(os.getpid(), signal.SIGKILL) if (folder.name, n) == ({second.name!r}, 1) else time.sleep(1)"
    )
    for name, value in stub_runs(tmp_path / "hook", meanwhile).items():
        monkeypatch.setenv(name, value)
    assert run_study(study, tmp_path, jobs=2) == []
    assert len(list((tmp_path / "tiny").glob("*/summary.json"))) == 3
    assert "SIGKILL" in (second / "failed.log").read_text()
    assert "ZeroDivisionError" in (first / "failed.log").read_text()


def test_what_stops_a_worker_is_said_in_full(write, tmp_path, monkeypatch):
    study = read_study(write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1]}))
    full = "raise_ = (_ for _ in ()).throw(OSError(28, 'No space left on device'))"
    for name, value in stub_runs(tmp_path / "hook", full).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StudyError, match="no space left") as caught:
        run_study(study, tmp_path, jobs=2)
    assert "make room" in str(caught.value)
    assert not list(tmp_path.glob("tiny/*/failed.json"))  # a full disk is no failure of a cell


def test_cells_with_processes_of_their_own_run_alone(write, tmp_path, run_cli):
    """Not beside others; the test of two processes (test_ddp.py) shows that they train as one would."""
    strategy = {"trainer": {"strategy": "ddp", "devices": 1}}
    path = write({"sources": ["scratch"], "shots": [2], "seeds": [0]}, config=strategy)
    code, _, err = run_cli("study", "run", path, "--runs_dir", tmp_path)
    assert (code, err) == (0, "")
    frame = collect(tmp_path / "tiny")
    assert set(frame["source"]) == {"scratch"}
    assert set(frame["study"]) == {"tiny"}


def test_cells_for_several_devices_come_before_several_jobs(write, tmp_path, monkeypatch):
    near = {**STUDY["sources"]["near"], "trainer": {"max_epochs": 1, "strategy": "ddp"}}
    study = read_study(write({"shots": [1], "seeds": [0, 1]}, sources={"near": near}))
    ran = []

    def execute(words, cell):
        ran.append(cell.kind)
        finish(tmp_path, cell)

    monkeypatch.setattr("studies.jobs._run_processes", lambda *words: ran.append("processes") or [])
    assert run_study(study, tmp_path, execute, jobs=2) == []
    assert ran == ["pretrain", "processes"]


def test_a_cell_stays_locked_while_a_process_that_it_started_lives(write, tmp_path):
    (cell,) = read_study(write({"sources": ["scratch"], "shots": [1], "seeds": [0]})).cells
    folder = CellFolder(tmp_path / cell.name)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $$ > " + str(tmp_path / "child") + "\nexec sleep 60\n")
    python.chmod(0o755)
    parent = os.fork()
    if parent == 0:
        try:
            sys.executable = str(python)
            with folder.claim():
                execute_apart(["fit"], cell)
        finally:
            os._exit(1)
    while not (tmp_path / "child").is_file() or not (tmp_path / "child").read_text():
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert folder.state() == "running"
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while folder.locked() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert folder.state() == "waiting"


# Damage ---------------------------------------------------------------------------------------------------------------


def test_damaged_files_stop_neither_the_study_nor_its_status(write, run_cli, tmp_path):
    path = write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1, 2]})
    study = read_study(path)
    first, second, third = (CellFolder(tmp_path / "tiny" / cell.name) for cell in study.cells)
    for folder in (first, second):
        folder.path.mkdir(parents=True)
    (first.path / "summary.json").write_text('{"state": "fin')
    (second.path / "failed.json").write_text("")

    def execute(words, cell):
        finish(tmp_path, cell)

    assert run_cli("study", "status", path, "--runs_dir", tmp_path)[0] == 0
    (failure,) = run_study(study, tmp_path, execute)
    assert "summary.json is damaged" in failure.reason
    assert failure.cell == study.cells[0].name
    assert second.finished()
    assert third.finished()
    code, out, err = run_cli("study", "run", path, "--runs_dir", tmp_path, "--jobs", "1")
    assert (code, "no report: not a run's summary" in out, "Traceback" in err) == (1, True, False)


def test_a_kill_after_the_last_row_leaves_no_checkpoint(write, tmp_path):
    study = read_study(write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1]}))
    for cell in study.cells:
        finish(tmp_path, cell)
        (tmp_path / "tiny" / cell.name / "checkpoints").mkdir()
    killed, whole = (tmp_path / "tiny" / cell.name for cell in study.cells)
    (killed / "lock").write_text("1@elsewhere")
    (whole / "lock").write_text("")
    assert run_study(study, tmp_path) == []
    assert not (killed / "checkpoints").exists()
    assert (whole / "checkpoints").exists()  # kept when it ran, whatever the study says now


def test_folders_that_cannot_be_written_to_and_jobs_beyond_reason(write, run_cli, tmp_path):
    path = write({"sources": ["scratch"], "shots": [1], "seeds": [*range(300)]})
    for words, problem in (
        (("--runs_dir", path), "cannot write to"),
        (("--runs_dir", tmp_path, "--jobs", "0"), "1 or more"),
        (("--runs_dir", tmp_path, "--jobs", "two"), "a whole number"),
        (("--runs_dir", tmp_path, "--measure"), "add --dry-run"),
        (("--runs_dir", tmp_path, "--jobs", "1000"), "300 jobs on"),
    ):
        code, _, err = run_cli("study", "run", path, *words)
        assert (code, problem in err, "Traceback" in err) == (2, True, False), words


def test_a_lock_that_was_moved_away_protects_nothing(tmp_path):
    folder = CellFolder(tmp_path / "cell")
    with folder.claim() as mine:
        assert mine
        with pytest.raises(RunError, match="is running"):
            folder.replace()
    late = (folder.path / "lock").open("ab", buffering=0)
    kept = folder.replace()
    assert not _is_at(late, folder.path / "lock")
    with folder.claim() as mine:
        assert mine
    assert not _is_at(late, folder.path / "lock")
    assert (kept / "lock").is_file()
    late.close()
