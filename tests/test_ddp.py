"""Two processes (ddp, gloo, CPU) train, and evaluate to the numbers of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent


def run(*words):
    """Run the command line in a process of its own, which starts the second rank itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("FARSHOT_RESUME", "LOCAL_RANK", "PL_GLOBAL_SEED"):
        environment.pop(name, None)
    command = [sys.executable, "cli.py", *(str(word) for word in words), "--wandb", "off"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.timeout(600)
def test_two_processes_train_and_evaluate_like_one(tiny_config, tmp_path):
    # 31 test images do not divide by 2, and validation has 7: padding would count some of them twice.
    words = ["--config", tiny_config, "--runs_dir", tmp_path, "--data.init_args.num_test", 31]
    ddp = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    run("fit", *words, "--run", "two", "--evaluate", "true", *ddp)
    summary = json.loads((tmp_path / "tiny/two/summary.json").read_text())
    predictions = pd.read_parquet(tmp_path / "tiny/two/predictions.parquet")
    assert predictions["split"].value_counts().to_dict() == {"test": 31, "validation": 7}
    assert predictions["id"].is_unique
    # The same weights, evaluated by one process, give the same numbers.
    two = {(row["name"], row["class_name"]): row["value"] for row in summary["test"]}
    run("test", "--run", tmp_path / "tiny/two", "--trainer.devices", 1, "--trainer.strategy", "auto")
    again = json.loads((tmp_path / "tiny/two/summary.json").read_text())["test"]
    one = {(row["name"], row["class_name"]): row["value"] for row in again}
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-6), key
    assert summary["run"]["images_seen"] == 2 * 3 * 16  # the global batch stays 16
    # Devices are no part of a run's identity: one process finds the two-process run finished.
    assert "is finished" in run("fit", *words, "--run", "two").stdout
