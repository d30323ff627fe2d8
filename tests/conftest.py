"""Settings of the whole suite: one thread a process, no mirror, the real images where they are."""

import os
import re
import tarfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ.pop("FARSHOT_DATA", None)

import pytest
import torch
import yaml

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("FARSHOT_REAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Fingerprints of test images stay out of the user's cache."""
    os.environ["FARSHOT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_nih(tmp_path_factory):
    """1,000 real radiographs in the official layout."""
    archive = REAL_DATA / "nih_chestxray14_mini.tar"
    if not archive.is_file():
        pytest.skip(f"no real radiographs: {archive} is not there (FARSHOT_REAL_DATA names the folder)")
    folder = tmp_path_factory.mktemp("real_nih")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "NIH-ChestXRay-14"


@pytest.fixture(scope="session")
def real_cifar(tmp_path_factory):
    """1,200 real CIFAR-10 photos as JPEG files: train and test folders of class folders."""
    archive = REAL_DATA / "cifar10_jpeg.tar.gz"
    if not archive.is_file():
        pytest.skip(f"no real photos: {archive} is not there (FARSHOT_REAL_DATA names the folder)")
    folder = tmp_path_factory.mktemp("real_cifar")
    wanted = re.compile(r"(?:.*/)?(?:train/\w+/00\d\d|test/\w+/000\d|test/\w+/001\d)\.jpg$")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, members=[one for one in tar if wanted.match(one.name)], filter="data")
    (train,) = folder.rglob("train")
    return train.parent


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys):
    """Run the command line in this process: returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for name in ("FARSHOT_RESUME", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*words):
        from cli import main

        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def tiny_config(tmp_path):
    """A configuration of a run that takes a second: a small net on a few generated images."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        """
trainer: {accelerator: cpu, devices: 1, max_epochs: 2, enable_progress_bar: false, log_every_n_steps: 1}
model:
  class_path: Classification
  init_args:
    backbone: test_resnet
    optimizer: {class_path: SGDAGC, init_args: {lr: 0.05}}
data:
  class_path: Synthetic
  init_args: {num_train: 70, num_test: 30, classes: 3, image_size: 16, batch_size: 16}
"""
    )
    return path


@pytest.fixture
def write(tmp_path):
    """Write the small study of tests/test_study.py, with changes laid over its block and it: returns its path."""
    from studies.layers import merge
    from tests.test_study import STUDY

    def call(block=None, **changes):
        path = tmp_path / "study.yaml"
        blocks = {"blocks": [{**STUDY["blocks"][0], **block}]} if block is not None else {}
        path.write_text(yaml.safe_dump(merge(STUDY, blocks, changes)))
        return path

    return call
