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


def fit_all(config, runs, fits):
    """Fit each (name, batches before the kill or −1, further words) in a process of its own; returns the exit codes."""
    common = ["fit", "--config", str(config), "--runs_dir", str(runs), *WORDS]
    orders = [[kill_after, [*common, "--run", name, *words]] for name, kill_after, words in fits]
    command = [sys.executable, "-m", "tests.kill_run", json.dumps(orders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PL_GLOBAL_SEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert set(codes) <= {0, -signal.SIGKILL}, done.stderr
    return codes


def fit(config, runs, name, *, kill_after=-1, words=()):
    """Fit in a process of its own; returns its exit code."""
    return fit_all(config, runs, [(name, kill_after, words)])[0]


def weights(runs, name):
    checkpoint = torch.load(runs / "tiny" / name / "checkpoints" / "last.ckpt", weights_only=True)
    return {"step": torch.tensor(checkpoint["global_step"]), **checkpoint["state_dict"]}, checkpoint["optimizer_states"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of a run that nobody kills; workers do not matter."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    assert fit(config, folder, "whole") == 0
    return weights(folder, "whole")


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_killed_run_resumes_to_identical_weights(tmp_path, undisturbed, case, workers):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    words = ("--data.init_args.num_workers", str(workers))
    assert fit(config, tmp_path, "killed", kill_after=CASES[case], words=words) == -signal.SIGKILL
    partial, _ = weights(tmp_path, "killed")
    assert partial["step"] == CASES[case]
    assert fit(config, tmp_path, "killed", words=words) == 0
    state, optimizer = weights(tmp_path, "killed")
    expected, expected_optimizer = undisturbed
    different = [key for key in expected if not torch.equal(state[key], expected[key])]
    assert not different
    for key, entry in expected_optimizer[0]["state"].items():
        torch.testing.assert_close(optimizer[0]["state"][key], entry, rtol=0, atol=0)


def test_step_based_run_with_accumulation_resumes_too(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    words = (
        *("--trainer.max_epochs=-1", "--trainer.max_steps", "8", "--data.init_args.max_batch_per_device", "8"),
        *("--checkpoint_every", "2"),
    )
    assert fit_all(config, tmp_path, [("whole", -1, words), ("killed", 11, words)]) == [0, -signal.SIGKILL]
    assert weights(tmp_path, "killed")[0]["step"] == 4  # 11 device batches are 5 steps, the last save was at 4
    assert fit(config, tmp_path, "killed", words=words) == 0
    expected, state = weights(tmp_path, "whole")[0], weights(tmp_path, "killed")[0]
    assert not [key for key in expected if not torch.equal(state[key], expected[key])]


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


# lp_ft of 10 steps: 4 of the probe, 6 of fine-tuning. Killed in the probe, between the phases, and in the second one.
@pytest.mark.parametrize("optimizer", ["SGDAGC", "torch.optim.AdamW"])
def test_a_run_of_two_phases_resumes_in_either(tmp_path, optimizer):
    config, source = tmp_path / "tiny.yaml", tmp_path / "source.pth"
    config.write_text(CONFIG.replace("SGDAGC", optimizer))
    torch.save(create_backbone("test_resnet", 5).state_dict(), source)
    words = [
        *("--trainer.max_epochs=-1", "--trainer.max_steps", "10", "--model.init_args.weights", str(source)),
        *("--model.init_args.probe_fraction", "0.4", "--model.init_args.layer_decay", "0.8"),
        *("--model.init_args.frozen_depth", "1", "--model.init_args.optimizer.init_args.weight_decay", "0.01"),
    ]
    kills = {"probe": 2, "boundary": 4, "finetuning": 7}
    fits = [(name, kill_after, words) for name, after in kills.items() for kill_after in (after, -1)]
    assert fit_all(config, tmp_path, [("whole", -1, words), *fits]) == [0, *[-signal.SIGKILL, 0] * 3]
    expected, (expected_optimizer,) = weights(tmp_path, "whole")
    given = torch.load(source, weights_only=True)
    still = {key for key in given if torch.equal(given[key], expected[f"backbone.{key}"])}
    assert still == set(layer_groups(create_backbone("test_resnet", 3))[0].tensors)
    for name in kills:
        state, (optimizer_state,) = weights(tmp_path, name)
        assert not [key for key in expected if not torch.equal(state[key], expected[key])], name
        assert optimizer_state["param_groups"] == expected_optimizer["param_groups"]
        for key, entry in expected_optimizer["state"].items():
            torch.testing.assert_close(optimizer_state["state"][key], entry, rtol=0, atol=0)


def test_frozen_groups_stand_still_through_a_kill(tmp_path):
    config, source = tmp_path / "tiny.yaml", tmp_path / "source.pth"
    config.write_text(CONFIG)
    torch.save(create_backbone("test_resnet", 5).state_dict(), source)
    words = ["--model.init_args.weights", str(source), "--model.init_args.optimizer.init_args.weight_decay", "0.01"]
    depths = {"linear_probe": ["--model.init_args.frozen_depth=-1"], "half": ["--model.init_args.frozen_depth", "3"]}
    fits = [(name, kill, [*words, *depth]) for name, depth in depths.items() for kill in (5, -1)]
    assert fit_all(config, tmp_path, fits) == [-signal.SIGKILL, 0] * 2
    given, groups = torch.load(source, weights_only=True), layer_groups(create_backbone("test_resnet", 3))
    for name, depth in (("linear_probe", 5), ("half", 3)):
        state = weights(tmp_path, name)[0]
        assert state["step"] == 12
        frozen = {key for group in groups[:depth] for key in group.tensors}
        assert {"bn1.running_mean", "bn1.num_batches_tracked"} <= frozen
        moved = {key for key in given if not torch.equal(given[key], state[f"backbone.{key}"])}
        assert moved == set(given) - frozen, name
