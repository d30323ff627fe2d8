"""Jobs for a cluster: weights before transfers, packs of a length, arrays of a size; run by a local executor."""

import time

import pytest
import yaml

from studies.cell_folder import CellFolder
from studies.layers import merge
from studies.slurm import plan, submit_study
from studies.spec import read_study
from studies.store import collect
from tests.test_study import STUDY


@pytest.fixture
def write(tmp_path):
    def call(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(merge(STUDY, changes)))
        return path

    return call


def finish(tmp_path, cell, seconds):
    folder = CellFolder(tmp_path / "tiny" / cell.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.run.update_summary(state="finished", run={"seconds": seconds})


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


def test_jobs_run_the_study(write, tmp_path):
    import submitit

    block = {**STUDY["blocks"][0], "shots": [1], "seeds": [0]}
    study = read_study(
        write(blocks=[block], slurm={"executor": "local", "resources": {"transfer": {"timeout_min": 5}}})
    )
    lines = list(submit_study(study, tmp_path))
    assert lines[0].endswith("1 pretrain jobs, 1 cells")
    folders = sorted((tmp_path / "tiny" / ".slurm").iterdir())
    jobs = [submitit.LocalJob(folder, folder.name) for folder in folders]
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not all(job.paths.result_pickle.is_file() for job in jobs):
        time.sleep(0.2)
    assert [job.result() for job in jobs] == [[]] * 3
    assert set(collect(tmp_path / "tiny")["source"]) == {"scratch", "near"}
