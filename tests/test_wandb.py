"""The mirror: offline without a key, and never in the way of a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_modules.callbacks.wandb_mirror import WandbMirror

ROOT = Path(__file__).parent.parent


def fit(config, runs, *words, **environment):
    """Fit in a process of its own, so that W&B's settings and services end with it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "cli.py", "fit", "--config", config, "--runs_dir", runs, "--run", "a", *words]
    environment = {**kept, "OMP_NUM_THREADS": "1", "HOME": str(runs), **environment}
    started = time.monotonic()
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    return done, time.monotonic() - started


def results(runs):
    summary = json.loads((runs / "tiny/a/summary.json").read_text())
    return summary["state"], [row["value"] for row in summary["validation"]]


def test_without_a_key_the_mirror_is_offline_and_holds_no_paths(tiny_config, tmp_path):
    done, _ = fit(tiny_config, tmp_path, "--data.init_args.root", tmp_path / "private", FARSHOT_WANDB_PATIENCE="60")
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stderr
    (file,) = (tmp_path / "tiny" / "a" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"private" not in content
    assert results(tmp_path)[0] == "finished"


def test_dead_server_changes_no_result_and_costs_a_short_wait(tiny_config, tmp_path):
    plain, alone = fit(tiny_config, tmp_path / "off", "--wandb", "off")
    dead, longer = fit(
        *(tiny_config, tmp_path / "dead", "--wandb", "online"),
        WANDB_API_KEY="0123456789" * 4,
        WANDB_BASE_URL="http://127.0.0.1:9",
    )
    assert (plain.returncode, dead.returncode) == (0, 0), dead.stderr
    assert results(tmp_path / "off") == results(tmp_path / "dead")
    assert longer - alone < 60
    assert "goes on without it" in dead.stderr


def test_a_call_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.callbacks.wandb_mirror.PATIENCE", -1.9)
    mirror = WandbMirror(tmp_path, "p", "g", "offline", {})
    started = time.monotonic()
    assert mirror._guarded(lambda: time.sleep(5)) is False
    assert time.monotonic() - started < 2
    mirror.log_metrics({"a": 1.0}, step=1)  # given up: nothing happens any more
    assert mirror._run is None


@pytest.mark.parametrize(
    ("mode", "wanted", "expected"), [("auto", "disabled", "off"), ("offline", "online", "offline")]
)
def test_environment_decides_auto_only(tmp_path, monkeypatch, mode, wanted, expected):
    monkeypatch.setenv("WANDB_MODE", wanted)
    assert WandbMirror(tmp_path, "p", "g", mode, {})._mode() == expected
