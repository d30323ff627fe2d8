"""A run that is killed and started again ends with bit-identical weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_modules.backbones.factory import create_backbone
from lightning_modules.backbones.layers import layer_groups

ROOT = Path(__file__).parent.parent

# 70 images, 63 of them for training: 3 batches of 16 an epoch, 4 epochs; dropout and mixup draw random numbers.
WORDS = [
    *("--trainer.max_epochs", "4", "--model.init_args.mixup_alpha", "0.3", "--checkpoint_every", "1"),
    *("--data.init_args.transform", "inception_crop", "--wandb", "off"),
]
CASES = {"mid-epoch": 4, "epoch boundary": 6}


def fit_all(runs, fits):
    """Fit each (config, name, batches before the kill or −1, further words), all from one process; the exit codes."""
    orders = [
        [kill_after, ["fit", "--config", str(config), "--runs_dir", str(runs), *WORDS, "--run", name, *words]]
        for config, name, kill_after, words in fits
    ]
    command = [sys.executable, "-m", "tests.kill_run", json.dumps(orders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PL_GLOBAL_SEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert set(codes) <= {0, -signal.SIGKILL}, done.stderr
    return codes


def weights(runs, name, experiment="tiny"):
    checkpoint = torch.load(runs / experiment / name / "checkpoints" / "last.ckpt", weights_only=True)
    return {"step": torch.tensor(checkpoint["global_step"]), **checkpoint["state_dict"]}, checkpoint["optimizer_states"]


CONFIG = """
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false, log_every_n_steps: 1}
model:
  class_path: Classification
  init_args:
    backbone: test_resnet
    optimizer: {class_path: SGDAGC, init_args: {lr: 0.05}}
    lr_scheduler: {class_path: WarmupCosine, init_args: {warmup_epochs: 1}}
data:
  class_path: Synthetic
  init_args: {num_train: 70, num_test: 30, classes: 3, image_size: 16, batch_size: 16}
"""


@pytest.mark.timeout(300)
def test_killed_runs_resume_to_identical_weights(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    accumulate = (
        *("--trainer.max_epochs=-1", "--trainer.max_steps", "8", "--data.init_args.max_batch_per_device", "8"),
        *("--checkpoint_every", "2"),
    )
    killed = [
        (config, f"{case}, {workers} workers", after, ("--data.init_args.num_workers", str(workers)))
        for case, after in CASES.items()
        for workers in (0, 2)
    ]
    killed.append((config, "accumulation", 11, accumulate))
    whole = [(config, "whole", -1, ()), (config, "whole accumulation", -1, accumulate)]
    assert fit_all(tmp_path, [*whole, *killed]) == [0, 0, *[-signal.SIGKILL] * 5]
    # 11 device batches are 5 steps, and the last save was at 4.
    steps = {name: 4 if name == "accumulation" else after for _, name, after, _ in killed}
    assert {name: int(weights(tmp_path, name)[0]["step"]) for name in steps} == steps
    assert fit_all(tmp_path, [(config, name, -1, words) for config, name, _, words in killed]) == [0] * 5
    for name in steps:
        (expected, expected_optimizer), (state, optimizer) = (
            weights(tmp_path, run) for run in ("whole accumulation" if name == "accumulation" else "whole", name)
        )
        assert not [key for key in expected if not torch.equal(state[key], expected[key])], name
        for key, entry in expected_optimizer[0]["state"].items():
            torch.testing.assert_close(optimizer[0]["state"][key], entry, rtol=0, atol=0)


def test_sigterm_saves_and_exits_143(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    command = [
        sys.executable,
        "cli.py",
        "fit",
        "--config",
        str(config),
        "--runs_dir",
        str(tmp_path),
        "--run",
        "stopped",
    ]
    command += [*WORDS, "--trainer.max_epochs", "2000", "--checkpoint_every", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "tiny" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "resumes" in errors
    step = int(weights(tmp_path, "stopped")[0]["step"])
    assert 0 < step < 6000


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO

    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    assert torch.load(path, weights_only=True)["state_dict"]["a"].sum() == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.timeout(300)
def test_runs_of_two_phases_and_frozen_ones_resume(tmp_path):
    source = tmp_path / "source.pth"
    torch.save(create_backbone("test_resnet", 5).state_dict(), source)
    words = ["--model.init_args.weights", str(source), "--model.init_args.optimizer.init_args.weight_decay", "0.01"]
    # lp_ft of 10 steps: 4 of the probe, 6 of fine-tuning. Killed in the probe, between the phases, in the second one.
    two_phases = [
        *("--trainer.max_epochs=-1", "--trainer.max_steps", "10", "--model.init_args.probe_fraction", "0.4"),
        *("--model.init_args.layer_decay", "0.8", "--model.init_args.frozen_depth", "1", *words),
    ]
    kills = {"probe": 2, "boundary": 4, "finetuning": 7}
    fits = []
    for number, optimizer in enumerate(("SGDAGC", "torch.optim.AdamW")):
        config = tmp_path / f"optimizer{number}.yaml"
        config.write_text(CONFIG.replace("SGDAGC", optimizer))
        fits.append((config, "whole", -1, two_phases))
        fits += [(config, name, kill, two_phases) for name, after in kills.items() for kill in (after, -1)]
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    depths = {"linear_probe": ["--model.init_args.frozen_depth=-1"], "half": ["--model.init_args.frozen_depth", "3"]}
    fits += [(config, name, kill, [*words, *depth]) for name, depth in depths.items() for kill in (5, -1)]
    assert fit_all(tmp_path, fits) == [*[0, *[-signal.SIGKILL, 0] * 3] * 2, *[-signal.SIGKILL, 0] * 2]
    given, groups = torch.load(source, weights_only=True), layer_groups(create_backbone("test_resnet", 3))
    for experiment in ("optimizer0", "optimizer1"):
        expected, (expected_optimizer,) = weights(tmp_path, "whole", experiment)
        still = {key for key in given if torch.equal(given[key], expected[f"backbone.{key}"])}
        assert still == set(groups[0].tensors)
        for name in kills:
            state, (optimizer_state,) = weights(tmp_path, name, experiment)
            assert not [key for key in expected if not torch.equal(state[key], expected[key])], name
            assert optimizer_state["param_groups"] == expected_optimizer["param_groups"]
            for key, entry in expected_optimizer["state"].items():
                torch.testing.assert_close(optimizer_state["state"][key], entry, rtol=0, atol=0)
    for name, depth in (("linear_probe", 5), ("half", 3)):
        state = weights(tmp_path, name)[0]
        assert state["step"] == 12
        frozen = {key for group in groups[:depth] for key in group.tensors}
        assert {"bn1.running_mean", "bn1.num_batches_tracked"} <= frozen
        moved = {key for key in given if not torch.equal(given[key], state[f"backbone.{key}"])}
        assert moved == set(given) - frozen, name
