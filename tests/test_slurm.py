"""Jobs for a cluster: weights before transfers, packs of a length, arrays of a size; run by a local executor."""

import json
import time

import pytest

from studies.cell_folder import CellFolder
from studies.slurm import plan, submit_study
from studies.spec import read_study
from studies.store import collect
from tests.stub_runs import stub_runs
from tests.test_study import STUDY


def finish(tmp_path, cell, seconds):
    folder = CellFolder(tmp_path / "tiny" / cell.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.run.update_summary(state="finished", run={"seconds": seconds, "step": 2, "images_seen": 64, "n_train": 36})
    start = {"time": "2026-01-01T00:00:00+0000", "device": "a device"}
    (folder.path / "environment.json").write_text(json.dumps([start]))


def test_cells_of_the_same_weights_share_jobs(write, tmp_path):
    study = read_study(write(slurm={"cells_per_job": 3, "array_limit": 1}))
    batches = plan(study, tmp_path)
    assert [(batch.kind, len(batch.packs)) for batch in batches] == [
        ("pretrain", 1), *[("transfer", 1)] * 4,  # from scratch: 3 + 1 cells; from weights: 3 + 1
    ]  # fmt: skip
    assert [batch.needs for batch in batches[1:]] == [None, None, study.cells[0].name, study.cells[0].name]
    names = [name for batch in batches for pack in batch.packs for name in pack.cells]
    assert sorted(names) == sorted(cell.name for cell in study.cells)


def test_finished_cells_tell_how_long_a_job_is(write, tmp_path):
    study = read_study(write(slurm={"job_minutes": 10}))
    weights, first, *_ = study.cells
    finish(tmp_path, weights, 100)
    finish(tmp_path, first, 200)  # seconds: three to a job
    scratch, near = plan(study, tmp_path)
    assert [len(pack.cells) for pack in scratch.packs] == [3]
    assert [len(pack.cells) for pack in near.packs] == [3, 1]
    assert near.needs is None  # the weights are there


def test_trials_share_the_job_of_what_they_choose(write, tmp_path):
    tune = {"settings": {"model.init_args.label_smoothing": [0.0, 0.1]}, "metric": "loss"}
    block = {**STUDY["blocks"][0], "sources": ["scratch"], "tune": tune}
    study = read_study(write(blocks=[block], slurm={"cells_per_job": 4}))
    (batch,) = plan(study, tmp_path)
    for pack in batch.packs:
        cells = {cell.name: cell for cell in study.cells}
        for name in pack.cells:
            assert set(cells[name].needs) <= set(pack.cells)
    assert sum(len(pack.cells) for pack in batch.packs) == len(study.cells) == 12


def test_settings_of_the_cluster_are_checked(write, run_cli, tmp_path):
    code, _, err = run_cli("study", "run", write(slurm={"job_minuts": 1}), "--slurm", "--runs_dir", tmp_path)
    assert (code, "did you mean 'job_minutes'" in err) == (2, True)
    code, _, err = run_cli("study", "run", write(), "--slurm", "--runs_dir", tmp_path)
    assert (code, "Traceback" in err) == (2, False)
    assert "no jobs can be submitted here" in err


def run_jobs(folder):
    """The jobs of the local executor, when all are done."""
    import submitit

    jobs = [submitit.LocalJob(entry, entry.name) for entry in sorted(folder.iterdir())]
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not all(job.paths.result_pickle.is_file() for job in jobs):
        time.sleep(0.1)
    return jobs


def test_jobs_train_cells(write, tmp_path):
    block = {**STUDY["blocks"][0], "sources": ["scratch"], "shots": [1], "seeds": [0]}
    slurm = {"executor": "local", "resources": {"transfer": {"timeout_min": 5}}}
    study = read_study(write(blocks=[block], slurm=slurm))
    lines = list(submit_study(study, tmp_path))
    assert lines[0].endswith("1 transfer jobs, 1 cells")
    (job,) = run_jobs(tmp_path / "tiny" / ".slurm")
    assert job.result() is None
    assert set(collect(tmp_path / "tiny")["source"]) == {"scratch"}


def test_jobs_wait_for_their_weights_and_say_what_failed(write, tmp_path, monkeypatch):
    block = {**STUDY["blocks"][0], "shots": [1], "seeds": [0]}
    study = read_study(write(blocks=[block], slurm={"executor": "local"}))
    weights, scratch, near = study.cells
    # What failed for good may have been mended before the jobs are submitted.
    for cell in (weights, scratch):
        folder = CellFolder(tmp_path / "tiny" / cell.name)
        folder.path.mkdir(parents=True)
        folder.record_failure("no such folder", "", code=2)
    ready = f"(folder.parent / {weights.name!r} / 'summary.json').is_file()"
    meanwhile = (
        f"assert folder.name != {near.name!r} or {ready}, 'too early'; "
        f"assert folder.name != {scratch.name!r}, 'never'; time.sleep(0.3)"
    )
    for name, value in stub_runs(tmp_path / "hook", meanwhile).items():
        monkeypatch.setenv(name, value)
    lines = list(submit_study(study, tmp_path))
    assert lines[0].endswith("1 pretrain jobs, 1 cells")
    jobs = run_jobs(tmp_path / "tiny" / ".slurm")
    failed = [job for job in jobs if job.exception() is not None]
    assert len(jobs) == 3
    assert len(failed) == 1  # so that the cluster shows it
    assert f"{scratch.name}: never" in str(failed[0].exception())
    assert set(collect(tmp_path / "tiny")["source"]) == {"scratch", "near"}  # the source itself is from scratch
    assert CellFolder(tmp_path / "tiny" / near.name).finished()


@pytest.mark.parametrize(
    ("slurm", "problem"),
    [
        ({"array_limit": 0}, "array_limit: 0"),
        ({"cells_per_job": 0}, "cells_per_job: 0"),
        ({"job_minutes": "1h"}, "job_minutes: '1h'"),
        ({"executor": "slrm"}, "slrm"),
        ({"executor": "local", "resources": {"pretrain": {"gpus": 4}}}, "gpus"),
    ],
)
def test_settings_that_no_cluster_takes_are_named(write, run_cli, tmp_path, slurm, problem):
    code, _, err = run_cli("study", "run", write(slurm=slurm), "--slurm", "--runs_dir", tmp_path)
    assert (code, problem in err, "Traceback" in err) == (2, True, False)


def test_trials_alone_are_submitted_too(write, tmp_path):
    tune = {"settings": {"model.init_args.label_smoothing": [0.0, 0.1]}, "metric": "loss"}
    study = read_study(write(blocks=[{**STUDY["blocks"][0], "sources": ["scratch"], "tune": tune}]))
    trials = {cell.name for cell in study.cells if cell.kind == "trial"}
    names = [name for batch in plan(study, tmp_path, trials) for pack in batch.packs for name in pack.cells]
    assert sorted(names) == sorted(trials)
