"""Weights by name: timm, the hub, folders that timm wrote; without a network."""

import json
import logging
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch

from lightning_modules.backbones.checkpoints import load_weights, read_weights, weights_hash
from lightning_modules.errors import ModelError
from tests.weights_kit import fresh, same, trained

OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def exported(folder: Path, seed: int = 1):
    """Let timm write a model with a preprocessing of its own; return the model."""
    source = trained("test_resnet", 5, seed=seed)
    timm.models.save_for_hf(source, folder, model_config={"pretrained_cfg": OWN}, safe_serialization=True)
    return source


def put_into_cache(cache: Path, repository: str) -> Path:
    """Return the folder of a repository's files in the hub's cache, where `main` points to."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty download cache and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["test_resnet", "timm:test_resnet", "test_resnet.r160_in1k"])
def test_timm_name(hub, name):
    source = trained("test_resnet", 1000)
    snapshot = put_into_cache(hub, "timm/test_resnet.r160_in1k")
    safetensors.torch.save_file(source.state_dict(), snapshot / "model.safetensors")
    model = fresh("test_resnet", 4)
    report = load_weights(model, name)
    assert same(model.state_dict(), source.state_dict(), report.loaded)
    assert report.reinitialised == ("fc.weight", "fc.bias")
    assert report.source_architecture == "test_resnet"
    assert report.source_preprocessing == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("timm:test_vit", "hf download timm/test_vit.r160_in1k --local-dir test_vit.r160_in1k"),
        ("hf-hub:someone/net", "hf download someone/net --local-dir net"),
        ("hf-hub:someone/net@v2", "hf download someone/net --revision v2 --local-dir net"),
    ],
)
def test_without_network_the_command_to_run_elsewhere_is_given(hub, name, command):
    with pytest.raises(ModelError, match="could not get the weights of") as error:
        read_weights(name)
    assert f"run `{command}` elsewhere" in str(error.value)
    assert f"weights: local-dir:{command.split()[-1]}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 15


def test_the_hubs_attempts_are_not_shown(hub, monkeypatch, caplog):
    """It logs each of a dozen attempts, which pushes the error out of sight."""
    logger = logging.getLogger("huggingface_hub.utils._http")

    def unreachable(*_, **__):
        logger.warning("Retrying in 1s")
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    before = logging.getLogger("huggingface_hub").level
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="no route"):
        read_weights("timm:test_vit")
    assert "Retrying" not in caplog.text
    assert logging.getLogger("huggingface_hub").level == before


def test_hub_name(hub):
    source = exported(put_into_cache(hub, "someone/net"))
    model = fresh("test_resnet", 5)
    report = load_weights(model, "hf-hub:someone/net")
    assert same(model.state_dict(), source.state_dict(), source.state_dict())
    assert report.source_architecture == "test_resnet"
    assert report.source_preprocessing == (OWN["mean"], OWN["std"])
    with pytest.raises(ModelError, match="set `backbone: test_resnet`"):
        load_weights(fresh("resnet18", 5), "hf-hub:someone/net")


def test_hub_name_of_a_net_that_timm_cannot_build(hub):
    snapshot = put_into_cache(hub, "someone/bert")
    (snapshot / "config.json").write_text(json.dumps({"architecture": "bert", "num_classes": 2}))
    with pytest.raises(ModelError, match=r"could not get the weights of hf-hub:someone/bert .*Unknown model"):
        read_weights("hf-hub:someone/bert")


@pytest.mark.parametrize("name", ["local-dir:{}", "{}"])
@pytest.mark.parametrize("flat", [False, True])
def test_folder_that_timm_wrote(tmp_path, name, flat):
    """With or without the prefix; older timm wrote the preprocessing beside the architecture."""
    source = exported(tmp_path / "net")
    config = tmp_path / "net" / "config.json"
    if flat:
        facts = json.loads(config.read_text())
        config.write_text(json.dumps({**facts.pop("pretrained_cfg"), **facts}))
    model = fresh("test_resnet", 5)
    report = load_weights(model, name.format(tmp_path / "net"))
    assert same(model.state_dict(), source.state_dict(), source.state_dict())
    assert report.source_architecture == "test_resnet"
    assert report.source_preprocessing == (OWN["mean"], OWN["std"])
    assert weights_hash(tmp_path / "net") == weights_hash(tmp_path / "net" / "model.safetensors")


def test_folder_with_a_pickle(tmp_path):
    """The tensors of a folder are read like any file: a pickle only without code."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    source = exported(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path).architecture == "test_resnet"
    torch.save({"state_dict": source.state_dict(), "x": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"refused: it holds a pickled \w+\.mkdir"):
        read_weights(f"local-dir:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_damaged_folders(tmp_path):
    with pytest.raises(ModelError, match=r"there is no \S+config\.json"):
        read_weights(f"local-dir:{tmp_path}")
    exported(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="is damaged, cut short"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has a config.json and no weights"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_weights(tmp_path)


def test_timm_name_without_weights_or_with_a_wrong_tag():
    bare = next(name for name in timm.list_models("resnet*") if not timm.models.is_model_pretrained(name))
    with pytest.raises(ModelError, match=f"no pretrained weights for {bare}"):
        read_weights(bare)
    with pytest.raises(ModelError, match=r"resnetv2_50x1_bit\.goog_in21k"):
        read_weights("resnetv2_50x1_bit.nope")
