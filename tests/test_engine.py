"""The study engine: axes become cells, trials choose, several processes share the work, kills cost nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from studies.cell_folder import ATTEMPTS, CellFolder
from studies.jobs import run_study
from studies.layers import merge
from studies.spec import read_study
from studies.store import collect
from studies.worker import work
from tests.test_study import STUDY

ROOT = Path(__file__).parent.parent
BLOCK = STUDY["blocks"][0]
LR = "model.init_args.optimizer.init_args.lr"
OPTIMIZER = {"model": {"init_args": {"optimizer": {"class_path": "SGDAGC", "init_args": {"lr": 0.1}}}}}


@pytest.fixture
def write(tmp_path):
    def call(block=None, **changes):
        path = tmp_path / "study.yaml"
        blocks = {"blocks": [{**BLOCK, **block}]} if block is not None else {}
        path.write_text(yaml.safe_dump(merge(STUDY, blocks, changes)))
        return path

    return call


def transfers(study):
    return [cell for cell in study.cells if cell.kind == "transfer"]


# Axes ----------------------------------------------------------------------------------------------------------------


def test_a_source_may_vary(write):
    vary = {"data.init_args.fraction": [0.5, 1.0], "model.init_args.label_smoothing": [0.0, 0.1]}
    study = read_study(write(sources={"near": {"vary": vary}}))
    weights = [cell for cell in study.cells if cell.kind == "pretrain"]
    assert [cell.config["data"]["init_args"]["fraction"] for cell in weights] == [0.5, 0.5, 1.0, 1.0]
    # Dials have columns of their own; what has none stands in the source's name, so that nothing is averaged.
    assert {cell.columns["source"] for cell in transfers(study)} == {
        "scratch", "near (label_smoothing=0.0)", "near (label_smoothing=0.1)",
    }  # fmt: skip
    assert len(transfers(study)) == 4 + 4 * 4


def test_a_block_may_vary_any_setting(write):
    study = read_study(write({"sources": ["scratch"], "vary": {"trainer.max_steps": [2, 3]}}))
    assert {cell.columns["protocol"] for cell in study.cells} == {"finetune (max_steps=2)", "finetune (max_steps=3)"}
    assert {cell.config["trainer"]["max_steps"] for cell in study.cells} == {2, 3}


def test_depths_and_folds_are_axes(write):
    study = read_study(write({"sources": ["near"], "depths": [0, {"transfer": 2, "frozen": 1}], "folds": 3}))
    init = [(cell.config["model"]["init_args"], cell.config["data"]["init_args"]) for cell in transfers(study)]
    assert {(model["transfer_depth"], model["frozen_depth"]) for model, _ in init} == {(0, 0), (2, 1)}
    assert {(data["folds"], data["fold"]) for _, data in init} == {(3, 0), (3, 1), (3, 2)}
    assert len(init) == 2 * 3 * 4


def test_given_weights_are_an_axis(write):
    block = {key: value for key, value in BLOCK.items() if key not in ("sources", "architectures")}
    path = write(weights={"in21k": "resnetv2_50x1_bit.goog_in21k"})
    spec = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**spec, "blocks": [{**block, "weights": ["in21k", "resnet18.a1_in1k"]}]}))
    study = read_study(path)
    assert {cell.columns["source"] for cell in study.cells} == {"in21k", "resnet18.a1_in1k"}
    assert {cell.config["model"]["init_args"]["weights"] for cell in study.cells} == {
        "resnetv2_50x1_bit.goog_in21k", "resnet18.a1_in1k",
    }  # fmt: skip
    assert all(not cell.needs and "architecture" not in cell.columns for cell in study.cells)


def test_given_weights_bring_their_architecture_along(write, tmp_path):
    source = write({"sources": ["near"], "shots": [1], "seeds": [0]}, name="first")
    assert run_study(read_study(source), tmp_path) == []
    (weights,) = (tmp_path / "first").glob("pretrain*")
    path = write(name="second", weights={"mine": str(weights)})
    spec = yaml.safe_load(path.read_text())
    spec["blocks"] = [{"weights": ["mine"], "targets": ["far"], "protocols": ["finetune"], "shots": [1], "seeds": [0]}]
    spec["config"] = merge(spec["config"], {"model": {"class_path": "Classification"}})
    path.write_text(yaml.safe_dump(spec))
    assert run_study(read_study(path), tmp_path) == []
    old, new = (collect(tmp_path / name).query("metric == 'accuracy'") for name in ("first", "second"))
    old = old[old["protocol"] == "finetune"]
    assert set(new["architecture"]) == {"test_resnet"}
    assert set(new["source"]) == {"mine"}
    assert new["value"].tolist() == old["value"].tolist()
    assert new["weights_hash"].tolist() == old["weights_hash"].tolist()


def test_a_scale_replaces_parts_axes_and_settings(write):
    tiny = {
        "axes": {"seeds": [7]},
        "config": {"trainer": {"max_steps": 1}},
        "targets": {"far": {"data": {"init_args": {"classes": 2}}}},
    }
    path = write(scales={"tiny": tiny})
    whole, small = read_study(path), read_study(path, "tiny")
    assert (whole.name, small.name) == ("tiny", "tiny-tiny")
    assert {cell.columns["seed"] for cell in transfers(small)} == {7}
    assert {cell.config["trainer"]["max_steps"] for cell in small.cells} == {1}
    assert {cell.config["data"]["init_args"]["classes"] for cell in transfers(small)} == {2}
    assert {cell.config["data"]["init_args"]["classes"] for cell in transfers(whole)} == {3}


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"vary": {"trainer.max_steps": 3}}, "vary should map settings to lists"),
        ({"depths": [{"transferred": 2}]}, "unknown key 'transferred'; did you mean 'transfer'"),
        ({"folds": 1}, "folds: 1"),
        ({"weights": ["x"]}, "either sources or weights"),
        ({"tune": {"settings": {LR: [0.1]}}}, "no metric to choose by"),
        ({"tune": {"settings": {LR: 0.1}, "metric": "accuracy"}}, "settings:"),
        ({"tune": {"setings": {}}}, "did you mean 'settings'"),
    ],
)
def test_mistakes_in_a_block(write, run_cli, block, problem):
    code, _, err = run_cli("study", "status", write(block))
    assert (code, "Traceback" in err) == (2, False)
    assert problem in err


def test_an_unknown_scale_and_filter(write, run_cli, tmp_path):
    code, _, err = run_cli("study", "run", write(scales={"tiny": {}}), "--scale", "tinny")
    assert code == 2
    assert "did you mean 'tiny'" in err
    code, _, err = run_cli("study", "run", write(), "--only", "sauce=near", "--runs_dir", tmp_path)
    assert code == 2
    assert "did you mean 'source'" in err
    code, _, err = run_cli("study", "run", write(), "--only", "source=nowhere", "--runs_dir", tmp_path)
    assert (code, "no cell of tiny fulfils" in err) == (2, True)


# Tuning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [None, 2])
def test_trials_choose_and_only_the_winner_sees_test_images(write, tmp_path, folds):
    tune = {"settings": {LR: [1e-6, 0.1]}, "metric": "loss", **({"folds": folds} if folds else {})}
    shots = {"shots": [4], "seeds": [0], "sources": ["scratch"]}
    longer = {"trainer": {"max_steps": 12}}
    path = write({**shots, "tune": tune, "config": merge(OPTIMIZER, longer)})
    study = read_study(path)
    trials = [cell for cell in study.cells if cell.kind == "trial"]
    assert len(trials) == 2 * (folds or 1)
    (winner,) = transfers(study)
    assert set(winner.needs) == {cell.name for cell in trials}
    assert run_study(study, tmp_path) == []
    summaries = {cell.name: CellFolder(tmp_path / "tiny" / cell.name).run.read_summary() for cell in study.cells}
    assert all("test" not in summaries[cell.name] and "rows" not in summaries[cell.name] for cell in trials)
    losses = {}
    for cell in trials:
        (loss,) = (row["value"] for row in summaries[cell.name]["validation"] if row["name"] == "loss")
        rate = cell.config["model"]["init_args"]["optimizer"]["init_args"]["lr"]
        losses[rate] = losses.get(rate, 0.0) + loss
    best = min(losses, key=losses.get)
    frame = collect(tmp_path / "tiny")
    assert set(frame["tuned"]) == {f"lr={best}"}
    assert set(frame["trials"]) == {len(trials)}
    assert frame["selection"].str.startswith("settings by loss on").all()
    ran = CellFolder(tmp_path / "tiny" / winner.name).run.read_config()
    assert ran["model"]["init_args"]["optimizer"]["init_args"]["lr"] == best
    assert not list((tmp_path / "tiny").glob("trial*/checkpoints"))


def test_a_metric_that_no_trial_has_is_named(write, tmp_path):
    tune = {"settings": {LR: [0.1, 0.2]}, "metric": "acuracy"}
    path = write({"shots": [2], "seeds": [0], "sources": ["scratch"], "tune": tune, "config": OPTIMIZER})
    (failure,) = run_study(read_study(path), tmp_path)
    assert "no trial has a validation acuracy" in failure.reason
    assert failure.lasting


# Several processes, kills, crashes ------------------------------------------------------------------------------------


def finish(tmp_path, cell):
    folder = CellFolder(tmp_path / "tiny" / cell.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.run.update_summary(state="finished")


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


def command(path, runs, *words):
    root = [sys.executable, str(ROOT / "cli.py"), "study", "run", str(path), "--runs_dir", str(runs)]
    return [*root, "--wandb", "off", *words]


def start(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


VOLATILE = ["seconds", "peak_memory", "energy"]


def test_killed_studies_end_like_undisturbed_ones(write, tmp_path):
    path = write({"shots": [1, 2]}, config={"trainer": {"max_steps": 4}})
    study = read_study(path)
    assert run_study(study, tmp_path / "whole") == []
    chance = random.Random(0)
    begun = time.monotonic()
    for _ in range(2):
        process = start(command(path, tmp_path / "killed", "--jobs", "2"))
        done = len(list((tmp_path / "killed").glob("tiny/*/summary.json")))
        while process.poll() is None and time.monotonic() - begun < 120:
            now = len(list((tmp_path / "killed").glob("tiny/*/summary.json")))
            if now >= done + 2:
                break
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert run_study(study, tmp_path / "killed") == []
    frames = [collect(tmp_path / name / "tiny").drop(columns=VOLATILE) for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*frames)
    assert len(frames[0]) > 100


def test_a_worker_that_dies_costs_its_cell_a_try(write, tmp_path, monkeypatch):
    """The first try of one cell kills its process, as the kernel does when memory runs out."""
    path = write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1, 2]})
    study = read_study(path)
    marker = tmp_path / "marker"
    hook = tmp_path / "hook"
    hook.mkdir()
    doomed = tmp_path / "runs" / "tiny" / study.cells[1].name
    (hook / "sitecustomize.py").write_text(
        "import os, signal, sys, threading, time, pathlib\n"
        f"marker, cell = pathlib.Path({str(marker)!r}), pathlib.Path({str(doomed)!r})\n"
        "def watch():\n"
        "    while not marker.exists():\n"
        "        lock = cell / 'lock'\n"
        "        if lock.exists() and lock.read_text() == str(os.getpid()):\n"
        "            marker.write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "        time.sleep(0.002)\n"
        "if 'studies.worker' in ' '.join(sys.orig_argv):\n"
        "    threading.Thread(target=watch, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_study(study, tmp_path / "runs", jobs=2) == []
    assert marker.exists()
    assert len(list((tmp_path / "runs" / "tiny").glob("*/summary.json"))) == 3
    assert "SIGKILL" in (doomed / "failed.log").read_text()


def test_cells_with_processes_of_their_own_run_alone(write, tmp_path, run_cli):
    strategy = {"trainer": {"strategy": "ddp", "devices": 2}}
    path = write({"sources": ["scratch"], "shots": [2], "seeds": [0]}, config=strategy)
    code, _, err = run_cli("study", "run", path, "--runs_dir", tmp_path, "--jobs", "2")
    assert (code, "takes several devices by itself" in err) == (2, True)
    code, _, err = run_cli("study", "run", path, "--runs_dir", tmp_path)
    assert (code, err) == (0, "")
    frame = collect(tmp_path / "tiny")
    assert set(frame["source"]) == {"scratch"}
    assert set(frame["study"]) == {"tiny"}


# What it says ---------------------------------------------------------------------------------------------------------


def test_dry_run_and_query(write, run_cli, tmp_path):
    path = write({"shots": [1], "seeds": [0]})
    code, out, _ = run_cli("study", "run", path, "--runs_dir", tmp_path, "--dry-run")
    assert code == 0
    assert "3 cells (1 pretrain, 2 transfer), 0 finished" in out
    assert "3 cells cannot be judged" in out
    assert not (tmp_path / "tiny").exists()
    only = ("--only", "source=scratch", "kind=transfer")
    assert run_cli("study", "run", path, "--runs_dir", tmp_path, *only)[0] == 0
    code, out, _ = run_cli("study", "run", path, "--runs_dir", tmp_path, "--dry-run")
    assert "1 finished" in out
    assert "for 1 cells, judged by 1 finished ones" in out
    code, out, _ = run_cli(
        "study", "query", path, "--runs_dir", tmp_path, "--where", "metric=accuracy,mean_auroc", "value>=0"
    )
    assert (code, "2 rows" in out) == (0, True)
    table = tmp_path / "rows.parquet"
    code, *_ = run_cli(
        "study", "query", path, "--runs_dir", tmp_path, "--where", "class_name=class 0", "--output", table
    )
    assert code == 0
    assert set(pd.read_parquet(table)["class_name"]) == {"class 0"}
    code, _, err = run_cli("study", "query", path, "--runs_dir", tmp_path, "--where", "metrik=accuracy")
    assert (code, "did you mean 'metric'" in err) == (2, True)


def test_status_shows_what_runs(write, run_cli, tmp_path):
    path = write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1]})
    first, _ = read_study(path).cells
    folder = CellFolder(tmp_path / "tiny" / first.name)
    with folder.claim() as mine:
        assert mine
        lines = [{"step": 1, "train/loss": 0.7}, {"step": 2, "train/loss": 0.5}]
        folder.run.metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "tr')
        code, out, _ = run_cli("study", "status", path, "--runs_dir", tmp_path)
    assert code == 0
    assert f"running: {first.name}  step 2, train/loss 0.500" in out
