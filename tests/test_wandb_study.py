"""A study's report in W&B: aggregate rows, figures and settings only, and never in the way."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datamodules.errors import DataError
from lightning_modules.callbacks import wandb_mirror
from lightning_modules.callbacks.wandb_mirror import WandbMirror
from studies import wandb_study
from studies.results import rows_to_frame
from studies.wandb_study import aggregate, mirror_study, shown

ROOT = Path(__file__).parent.parent

SCRIPT = """
import atexit, json, sys, time
atexit.register(lambda: print(json.dumps([came, took, time.monotonic() - started - took])))  # after W&B's own
from pathlib import Path
from studies.results import read_csv
from studies.wandb_study import mirror_study
folder = Path(sys.argv[1])
frame, started = read_csv(folder / "results.csv"), time.monotonic()
config = {"targets": {"nih": {"data": {"init_args": {"root": "/hospital/private", "batch_size": 64}}}}}
came = mirror_study(
    "chest study", frame, [folder / "few_shot.png"], config=config, project="p", mode=sys.argv[2], folder=folder
)
took = time.monotonic() - started
"""


def frame():
    """Result rows of two cells and three seeds, with rows and columns that must stay at home."""
    values = {
        ("chexpert", 0): 0.70,
        ("chexpert", 1): 0.74,
        ("chexpert", 2): 0.78,
        ("/hospital/private/net.pth", 0): 0.5,
    }
    run = {"study": "chest study", "target": "nih", "architecture": "resnet10t", "protocol": "finetune", "shots": "5"}
    return rows_to_frame(
        run
        | {"source": source, "seed": seed, "cell": f"cell-{seed}-{source}", "run": "secretrun", "value": value}
        | what
        for (source, seed), value in values.items()
        for what in (
            {"metric": "mean_auroc"},
            {"metric": "auroc", "class_name": "Hernia", "value": 0.123},
            {"metric": "mean_auroc", "subgroup": "site=secretsite", "value": 0.321},
        )
    )


@pytest.fixture
def report(tmp_path):
    frame().to_csv(tmp_path / "results.csv", index=False)
    (tmp_path / "few_shot.png").write_bytes(b"\x89PNG figure")
    return tmp_path


def mirror(folder, mode, **environment):
    """Mirror in a process of its own, so that W&B's settings and services end with it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "HOME": str(folder / "home"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), mode],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 280},
    )
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_offline_report_holds_aggregates_figures_and_settings_only(report):
    came, _, _, _ = mirror(report, "auto", FARSHOT_WANDB_PATIENCE="120")
    assert came == "offline"
    (log,) = report.glob("wandb/offline-run-*/*.wandb")
    content = log.read_bytes()
    for word in (b"chest study", b"few_shot.png", b"batch_size", b"figures"):
        assert word in content, word
    (file,) = report.glob("wandb/offline-run-*/files/media/table/*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == list(aggregate(frame()).columns)
    assert len(table["data"]) == 2
    kept = b"".join(path.read_bytes() for path in report.glob("wandb/**/*") if path.is_file() and path.suffix != ".log")
    for secret in (b"secret", b"hospital", b"private", b"Hernia", b"cell-0", b"0.321"):
        assert secret not in kept, secret


def test_server_that_never_answers_costs_a_short_wait(report):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        key = "0123456789" * 4
        came, took, at_exit, errors = mirror(
            report, "auto", FARSHOT_WANDB_PATIENCE="1", WANDB_API_KEY=key, WANDB_BASE_URL=address
        )
    assert came in ("offline", "off")  # on a busy machine a second is too short to start offline
    assert took < 60  # W&B itself waits 90 s, and then stops the process
    assert at_exit < 15  # and 22 s more at the end
    assert "W&B online: " in errors
    assert "goes on without it" in errors


# Without W&B ----------------------------------------------------------------------------------------------------------


class Run:
    """What stands for a run of W&B: counts its calls; `fails` is raised by `log`."""

    def __init__(self, mode, fails=None):
        self.settings = type("Settings", (), {"mode": mode})
        self.fails, self.calls = fails, []

    def log(self, values):
        self.calls += values
        if self.fails is not None:
            raise self.fails

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def starts(monkeypatch):
    """Replace W&B's start: a list of what it is asked, and one of what it answers, raises, or that it hangs."""
    asked, answers, released = [], [], threading.Event()

    def init(**facts):
        asked.append(facts)
        answer = answers.pop(0)
        if answer == "hangs":
            released.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(wandb_mirror, "_init", init)
    monkeypatch.setattr(wandb_mirror, "PATIENCE", 60.0)  # only a hang is slow here, whatever the machine does
    yield asked, answers
    released.set()


def send(folder, mode):
    return mirror_study("s/1", frame(), [], config={"name": "s/1"}, project="p", mode=mode, folder=folder)


def test_report_is_one_run_in_the_group_of_the_study(starts, tmp_path):
    asked, answers = starts
    answers.append(run := Run("online"))
    assert send(tmp_path, "online") == "online"
    (facts,) = asked
    assert {**facts} == {
        **{"mode": "online", "project": "p", "group": "s/1", "job_type": "report", "name": "report"},
        **{"id": "s-1-report", "dir": str(tmp_path), "config": {"name": "s/1"}},
    }
    assert run.calls == ["cells", "finish"]


def test_cells_have_the_job_type_of_their_kind(starts, tmp_path):
    asked, answers = starts
    answers.append(Run("offline"))
    WandbMirror(tmp_path / "cell", "p", "study", "offline", {}, job_type="pretrain").start()
    assert [asked[0][name] for name in ("group", "job_type", "name")] == ["study", "pretrain", "cell"]


def test_no_start_online_means_offline_under_another_id(starts, tmp_path, caplog):
    asked, answers = starts
    answers += [ValueError("no server"), Run("offline")]
    assert send(tmp_path, "online") == "offline"
    assert [facts["id"] for facts in asked] == ["s-1-report", "s-1-report-offline"]
    answers += [OSError("no server"), OSError("read-only")]
    assert send(tmp_path, "online") == "off"
    said = ("W&B online: no server", "W&B online: no server", "W&B offline: read-only")
    assert tuple(line.split(";")[0] for line in caplog.messages) == said


def test_a_start_that_hangs_is_given_up(starts, tmp_path, caplog, monkeypatch):
    _, answers = starts
    monkeypatch.setattr(wandb_mirror, "PATIENCE", -1.0)  # and 2 seconds of grace
    answers += ["hangs", OSError("read-only")]
    started = time.monotonic()
    assert send(tmp_path, "online") == "off"
    assert 1 <= time.monotonic() - started < 30
    assert caplog.messages[0].startswith("W&B online: no answer")


def test_a_run_that_breaks_is_finished_and_said(starts, tmp_path, caplog):
    _, answers = starts
    answers.append(run := Run("online", fails=OSError("disk full")))
    assert send(tmp_path, "online") == "online"
    assert run.calls == ["cells", "finish"]
    assert "disk full; what was not sent is kept" in caplog.text


def test_off_is_off(starts, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (send(tmp_path, "auto"), send(tmp_path, "off")) == ("off", "off")
    assert starts[0] == []


def test_only_figures_are_sent(tmp_path):
    with pytest.raises(DataError, match=r"predictions\.parquet is no figure"):
        mirror_study(
            *("s", frame(), [tmp_path / "a.svg", tmp_path / "predictions.parquet"]),
            **{"config": {}, "project": "p", "mode": "offline", "folder": tmp_path},
        )


def test_aggregates_are_means_over_seeds():
    table = aggregate(frame()).set_index("source")
    assert list(table.index) == ["net.pth", "chexpert"]
    row = table.loc["chexpert"]
    half = 4.302652729911275 * 0.04 / np.sqrt(3)  # t(0.975; 2)
    numbers = row[["n", "mean", "sd", "low", "high"]].astype(float).to_numpy()
    assert numbers == pytest.approx([3, 0.74, 0.04, 0.74 - half, 0.74 + half])
    assert table.loc["net.pth", "n"] == 1
    assert pd.isna(table.loc["net.pth", ["sd", "low", "high"]]).all()
    allowed = {*wandb_study.CELL, "n", "mean", "sd", "low", "high"}
    assert {*table.columns, "source"} == allowed
    assert not allowed & {"study", "cell", "run", "seed", "class_name", "subgroup", "weights_hash", "config_hash"}


def test_settings_lose_places_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    init_args = {
        "root": "data/hospital",
        "num_workers": 4,
        "shots": "5",
        "noise_confusion": "lists",
        "csv": "~/a/b.csv",
    }
    config = {
        "targets": {"nih": {"data": {"init_args": init_args}}},
        "weights": ["/hospital/net.pth", "hf_hub:org/net", "../x/y.ckpt"],
        "monitor": "validation/loss",
        "path": Path("studies/mine.yaml"),
        "trainer": {"devices": 2, "max_epochs": 3},
    }
    assert shown(config) == {
        **{f"targets.nih.data.init_args.{k}": v for k, v in (("shots", "5"), ("noise_confusion", "lists"))},
        "targets.nih.data.init_args.csv": "b.csv",
        "weights": ["net.pth", "hf_hub:org/net", "y.ckpt"],
        **{"monitor": "validation/loss", "path": "mine.yaml", "trainer.max_epochs": 3},
    }
