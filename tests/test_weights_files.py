"""Reading weights from files and runs: every form of file, damage, pickled code."""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lightning_modules.backbones.checkpoints import load_weights, read_weights, weights_hash
from lightning_modules.errors import ModelError
from tests.weights_kit import fresh, same, save_lightning, trained

# --- forms of sources


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_state_dict_files(tmp_path, suffix, name):
    source, path = trained(name), tmp_path / f"weights{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    model = fresh(name)
    report = load_weights(model, str(path))
    assert same(model.state_dict(), source.state_dict(), source.state_dict())
    assert report.loaded == tuple(model.state_dict())
    assert report.missing == report.unexpected == report.reinitialised == ()
    assert report.source_preprocessing is report.source_architecture is None


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "state_dict_ema", "model_state_dict"])
def test_wrapped_and_legacy_state_dicts(tmp_path, key):
    """Averaged weights win over the raw ones beside them, as in timm; old torch files are no zip."""
    source = trained("test_resnet")
    content = {"epoch": 9, key: source.state_dict()}
    if key != "model_state_dict":  # PyTorch's tutorials alone write that one
        content = {"model": {"other": torch.ones(1)}, **content}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").state.keys() == source.state_dict().keys()


def test_lightning_checkpoint_brings_its_preprocessing(tmp_path):
    source = trained("test_resnet")
    path = save_lightning(
        tmp_path / "x.ckpt",
        source,
        backbone="test_resnet",
        mean=[0.1, 0.2, 0.3],
        std=(1, 1, 1),
        _instantiator="cli",
    )
    model = fresh("test_resnet", 9)
    report = load_weights(model, path)
    assert report.source_preprocessing == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert report.source_architecture == "test_resnet"
    assert report.reinitialised == ("fc.weight", "fc.bias")
    assert same(model.state_dict(), source.state_dict(), report.loaded)


def test_given_weights_are_used_for_timm_models(tmp_path):
    """A ignored the given file for every timm model: the features must be those of the source."""
    source = trained("test_convnext", 0).eval()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    model, images = fresh("test_convnext", 0).eval(), torch.rand(2, 3, 64, 64)
    assert not torch.allclose(model(images), source(images))
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model(images), source(images))


def test_run_folder_prefers_what_the_summary_names(tmp_path):
    run = tmp_path / "runs" / "x" / "y"
    hashes = {}
    for seed, name in enumerate(("last.ckpt", "best.ckpt", "step=7.ckpt"), start=1):
        path = save_lightning(run / "checkpoints" / name, trained("test_resnet", seed=seed))
        hashes[name] = weights_hash(path)
        if name != "step=7.ckpt":
            assert weights_hash(run) == hashes[name]
    assert weights_hash(str(run)) == hashes["best.ckpt"]
    for named in ("checkpoints/step=7.ckpt", "step=7.ckpt", "/elsewhere/checkpoints/step=7.ckpt"):
        (run / "summary.json").write_text(json.dumps({"checkpoint": named}))
        assert weights_hash(run) == hashes["step=7.ckpt"]
    (run / "summary.json").write_text(json.dumps({"rows": []}))
    assert weights_hash(run) == hashes["best.ckpt"]
    (run / "summary.json").write_text(json.dumps({"checkpoint": "gone.ckpt"}))
    with pytest.raises(ModelError, match=r"gone\.ckpt"):
        read_weights(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        read_weights(run)
    with pytest.raises(ModelError, match=r"best\.ckpt or .*last\.ckpt"):
        read_weights(tmp_path)


def test_folder_with_nothing_but_weights(tmp_path):
    """As `weights get` fills it: the file must be named, and the message does."""
    safetensors.torch.save_file(trained("test_resnet").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"did you mean {tmp_path}/model\.safetensors\?"):
        read_weights(tmp_path)


# --- what is refused


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_never_run(tmp_path, legacy):
    path = tmp_path / "w.pth"
    content = {"model": trained("test_resnet").state_dict(), "config": Payload(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=r"w\.pth is refused: it holds a pickled \w+\.mkdir") as error:
        read_weights(path)
    assert ".safetensors" in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".pth.tar", ".npz", ".safetensors"])
def test_bare_pickle_is_never_run(tmp_path, protocol, suffix):
    """A plain pickle under any of the names is refused, also one whose first action is the payload."""
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(ModelError, match=r"refused|damaged"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()


def test_object_array_is_never_run(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([Payload(tmp_path / "ran")], dtype=object))
    with pytest.raises(ModelError, match="damaged"):
        read_weights(tmp_path / "w.npz")
    assert not (tmp_path / "ran").exists()


def test_whole_pickled_model_says_how_to_convert_it(tmp_path):
    """torchxrayvision publishes its nets so."""
    torch.save(trained("test_resnet"), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"(?s)a pickled timm\.models\.\S+ResNet.*\.state_dict\(\), 'state\.pth'"):
        read_weights(tmp_path / "w.pt")


def test_pickled_config_is_refused(tmp_path):
    """A's checkpoints carried pickled configuration objects."""
    torch.save({"model": {"w": torch.ones(1)}, "config": Path("x")}, tmp_path / "w.pth.tar")
    with pytest.raises(ModelError, match=r"it holds a pickled pathlib"):
        read_weights(tmp_path / "w.pth.tar")


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors", ".npz"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"w{suffix}"
    state = trained("test_resnet").state_dict()
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"version https://git-lfs\n", "empty": b""}[damage]
    )
    with pytest.raises(ModelError, match=rf"w{re.escape(suffix)} .*bytes\) is damaged(.|\n)*a run folder, \.ckpt"):
        read_weights(path)


@pytest.mark.parametrize("name", ["gone.ckpt", "runs/x/y", "gone.safetensors", "nomodel"])
def test_missing_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"no weights at {re.escape(name)}(.|\n)*a run folder, \.ckpt"):
        read_weights(name)
    with pytest.raises(ModelError, match="no weights at"):
        read_weights(tmp_path / "resnet50")


def test_misspelt_timm_name_gets_a_suggestion():
    with pytest.raises(ModelError, match=r"did you mean .*resnetv2_50x1_bit"):
        read_weights("resnetv2_50x1bit")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"\x89HDF")
    with pytest.raises(ModelError, match=r"w\.h5 is not a kind of weights file"):
        read_weights(tmp_path / "w.h5")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="holds no tensors; its keys are epoch"):
        read_weights(tmp_path / "w.pth")
    torch.save([torch.ones(1)], tmp_path / "w.pth")
    with pytest.raises(ModelError, match="not a weights file"):
        read_weights(tmp_path / "w.pth")
