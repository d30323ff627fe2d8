"""Loading weights: every form of file, strictness, depth, folding, refusal of pickled code, hashes."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from lightning_modules.backbones.checkpoints import LoadedWeights, load_weights, read_weights, weights_hash
from lightning_modules.backbones.convert import (
    backbone_tensors,
    bit_name_of_npz,
    bit_name_of_port,
    fold_channels,
    unwrap,
)
from lightning_modules.backbones.factory import classifier_parameters, create_backbone
from lightning_modules.backbones.layers import layer_groups
from lightning_modules.errors import ModelError


def trained(name: str, num_classes: int = 5, in_chans: int = 3, seed: int = 1) -> nn.Module:
    """Return a model none of whose tensors has the value it was initialised with."""
    torch.manual_seed(seed)
    model = create_backbone(name, num_classes, in_chans)
    for tensor in model.state_dict().values():
        tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 3)
    return model


def fresh(name: str, num_classes: int = 5, in_chans: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return create_backbone(name, num_classes, in_chans)


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, other, names) -> bool:
    return all(torch.equal(state[name], other[name]) for name in names)


def save_lightning(path: Path, model: nn.Module, **hyper_parameters) -> Path:
    """Write what a Lightning checkpoint of our tasks holds, with an optimizer state and another head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    state["projector.0.weight"] = torch.ones(3)
    momentum = {"momentum_buffer": torch.ones(7)}
    content = {
        "epoch": 3,
        "state_dict": state,
        "hyper_parameters": hyper_parameters,
        "optimizer_states": [{"state": {0: momentum}}],
    }
    torch.save(content, path)
    return path


def npz_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Write a BiT model the way Google's files name and lay out its tensors."""

    def kernel(weight):
        return weight.detach().permute(2, 3, 1, 0).numpy()

    arrays = {
        "resnet/root_block/standardized_conv2d/kernel": kernel(model.stem.conv.weight),
        "resnet/group_norm/gamma": model.norm.weight.detach().numpy(),
        "resnet/group_norm/beta": model.norm.bias.detach().numpy(),
        "resnet/head/conv2d/kernel": kernel(model.head.fc.weight),
        "resnet/head/conv2d/bias": model.head.fc.bias.detach().numpy(),
    }
    for b, stage in enumerate(model.stages, start=1):
        for u, block in enumerate(stage.blocks, start=1):
            unit = f"resnet/block{b}/unit{u:02d}"
            for letter, conv, norm in zip(
                "abc",
                (block.conv1, block.conv2, block.conv3),
                (block.norm1, block.norm2, block.norm3),
                strict=True,
            ):
                arrays[f"{unit}/{letter}/standardized_conv2d/kernel"] = kernel(conv.weight)
                arrays[f"{unit}/{letter}/group_norm/gamma"] = norm.weight.detach().numpy()
                arrays[f"{unit}/{letter}/group_norm/beta"] = norm.bias.detach().numpy()
            if block.downsample is not None:
                arrays[f"{unit}/a/proj/standardized_conv2d/kernel"] = kernel(block.downsample.conv.weight)
    return arrays


@pytest.fixture(scope="module")
def bit() -> nn.Module:
    return trained("resnetv2_50x1_bit", 6)


# --- names


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.module.fc.weight", "fc.weight"),
        ("module._orig_mod.fc.weight", "fc.weight"),
        ("stages.0._orig_mod.conv.weight", "stages.0.conv.weight"),
        ("modules.0.weight", "modules.0.weight"),
    ],
)
def test_unwrap(name, plain):
    assert unwrap(name) == plain


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.", "_orig_mod.backbone.module.", "module."])
def test_backbone_tensors_are_found_under_any_prefix(prefix):
    state = {f"{prefix}conv1.weight": torch.ones(1), f"{prefix}fc.bias": torch.zeros(1)}
    assert list(backbone_tensors(state)) == ["conv1.weight", "fc.bias"]


def test_other_towers_are_dropped_and_collisions_refused():
    state = {"backbone.conv1.weight": torch.ones(1), "text.conv1.weight": torch.zeros(1)}
    assert backbone_tensors(state) == {"conv1.weight": torch.ones(1)}
    with pytest.raises(ModelError, match=r"both 'conv1\.weight'"):
        backbone_tensors({"conv1.weight": torch.ones(1), "module.conv1.weight": torch.ones(1)})


def test_bit_names_cover_the_whole_net(bit):
    """The names of the PyTorch port are written here from big_transfer's `bit_pytorch/models.py`."""
    names = set(bit.state_dict())
    assert {bit_name_of_npz(name) for name in npz_arrays(bit)} == names
    port = ["root.conv.weight", "head.gn.weight", "head.gn.bias", "head.conv.weight", "head.conv.bias"]
    for block, units in enumerate((3, 4, 6, 3), start=1):
        port.append(f"body.block{block}.unit01.downsample.weight")
        for unit in range(1, units + 1):
            port += [f"body.block{block}.unit{unit:02d}.conv{i}.weight" for i in (1, 2, 3)]
            port += [f"body.block{block}.unit{unit:02d}.gn{i}.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")]
    assert len(port) == len(names)
    assert {bit_name_of_port(name) for name in port} == names
    assert bit_name_of_port("body.block2.unit04.gn3.bias") == "stages.1.blocks.3.norm3.bias"
    assert bit_name_of_port("body.block4.unit01.downsample.weight") == "stages.3.blocks.0.downsample.conv.weight"
    assert bit_name_of_npz("resnet/block3/unit06/b/group_norm/beta") == "stages.2.blocks.5.norm2.bias"
    assert bit_name_of_npz("something/else") == bit_name_of_port("something/else") == "something/else"


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


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema"])
def test_wrapped_and_legacy_state_dicts(tmp_path, key):
    """Averaged weights win over the raw ones beside them, as in timm; old torch files are no zip."""
    source = trained("test_resnet")
    content = {"model": {"other": torch.ones(1)}, key: source.state_dict(), "epoch": 9}
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


def test_official_bit_file_equals_timms_own_loader(tmp_path, bit):
    path = tmp_path / "BiT-M-R50x1.npz"
    np.savez(path, **npz_arrays(bit))
    oracle, model = fresh("resnetv2_50x1_bit", 6), fresh("resnetv2_50x1_bit", 6)
    with torch.no_grad():
        oracle.load_pretrained(str(path))
    report = load_weights(model, path)
    names = list(model.state_dict())
    assert same(model.state_dict(), oracle.state_dict(), names)
    assert same(model.state_dict(), bit.state_dict(), names)
    assert report.source_preprocessing == ((0.5,) * 3, (0.5,) * 3)
    assert weights_hash(path) == weights_hash(LoadedWeights(bit.state_dict(), "memory"))


def test_checkpoint_of_the_scale_study(tmp_path, bit):
    """SLAMPAI files: {"model": BiT port's names, "optimizer": ..., "epoch": ...}."""
    to_port = {
        bit_name_of_port(name): name
        for name in (
            "root.conv.weight",
            "head.gn.weight",
            "head.gn.bias",
            "head.conv.weight",
            "head.conv.bias",
        )
    }
    for name in bit.state_dict():
        unit = re.fullmatch(r"stages\.(\d)\.blocks\.(\d)\.(conv|norm|downsample\.conv)(\d?)\.(\w+)", name)
        if unit:
            s, b, kind, i, leaf = unit.groups()
            layer = {"conv": f"conv{i}", "norm": f"gn{i}", "downsample.conv": "downsample"}[kind]
            to_port[name] = f"body.block{int(s) + 1}.unit{int(b) + 1:02d}.{layer}.{leaf}"
    state = {to_port[name]: tensor for name, tensor in bit.state_dict().items()}
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 90}, tmp_path / "model.pth.tar")
    model = fresh("resnetv2_50x1_bit", 3)
    report = load_weights(model, tmp_path / "model.pth.tar", head=False)
    assert same(model.state_dict(), bit.state_dict(), report.loaded)
    assert report.reinitialised == ("head.fc.weight", "head.fc.bias")


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
    snapshot = hub / "models--timm--test_resnet.r160_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(source.state_dict(), snapshot / "model.safetensors")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    model = fresh("test_resnet", 4)
    report = load_weights(model, name)
    assert same(model.state_dict(), source.state_dict(), report.loaded)
    assert report.reinitialised == ("fc.weight", "fc.bias")
    assert report.source_architecture == "test_resnet"
    assert report.source_preprocessing == ((0.5,) * 3, (0.5,) * 3)


def test_timm_name_without_network_says_what_to_do(hub):
    with pytest.raises(
        ModelError, match=r"could not get the weights of test_vit(.|\n)*timm/test_vit\.r160_in1k elsewhere"
    ):
        read_weights("timm:test_vit")


def test_timm_name_without_weights_or_with_a_wrong_tag():
    bare = next(name for name in timm.list_models("resnet*") if not timm.models.is_model_pretrained(name))
    with pytest.raises(ModelError, match=f"no pretrained weights for {bare}"):
        read_weights(bare)
    with pytest.raises(ModelError, match=r"resnetv2_50x1_bit\.goog_in21k"):
        read_weights("resnetv2_50x1_bit.nope")


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


# --- strictness


def altered(change) -> LoadedWeights:
    state = copy_of(trained("test_resnet"))
    change(state)
    return LoadedWeights(state, "altered.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layer2.0.conv1.weight"), r"missing in the weights: layer2\.0\.conv1\.weight"),
        (lambda s: s.pop("bn1.running_mean"), r"missing in the weights: bn1\.running_mean"),
        (lambda s: s.update(extra=torch.ones(1)), "unknown to the model: extra"),
        (lambda s: s.update({"bn1.bias": torch.ones(3)}), r"of another shape: bn1\.bias \(3,\) for \("),
        (lambda s: (s.clear(), s.update({"encoder.w": torch.ones(1)})), "not one name"),
    ],
)
def test_misfits_raise_and_leave_the_model_alone(change, words):
    model = fresh("test_resnet")
    before = copy_of(model)
    with pytest.raises(ModelError, match=words):
        load_weights(model, altered(change))
    assert same(model.state_dict(), before, before)


def test_another_architecture_is_named(tmp_path):
    path = save_lightning(tmp_path / "w.ckpt", trained("test_resnet"), backbone="test_resnet")
    with pytest.raises(ModelError, match="set `backbone: test_resnet`") as error:
        load_weights(fresh("resnet18"), path)
    assert len(str(error.value).splitlines()) <= 15


def test_a_long_list_of_misfits_stays_short():
    with pytest.raises(ModelError, match=r"\(\d+ in all\)") as error:
        load_weights(fresh("resnet18"), LoadedWeights(trained("resnet10t", 5).state_dict(), "w"))
    assert len(str(error.value).splitlines()) <= 6


def test_what_may_be_lacking_is_reported():
    """Old torchvision files have no step counters, old Swin files a table that timm computes itself."""
    weights = altered(lambda s: s.pop("bn1.num_batches_tracked"))
    report = load_weights(fresh("test_resnet"), weights)
    assert report.missing == ("bn1.num_batches_tracked",)
    assert "bn1.num_batches_tracked" not in report.loaded + report.reinitialised
    swin = create_backbone("swin_tiny_patch4_window7_224", 2)
    index = "layers.0.blocks.0.attn.relative_position_index"
    assert index not in swin.state_dict()
    old = LoadedWeights({**swin.state_dict(), index: torch.zeros(49, 49)}, "old.pth")
    assert load_weights(swin, old).unexpected == (index,)


# --- head and depth


def test_head_only_where_it_fits_and_is_wanted():
    weights = LoadedWeights(trained("test_resnet", 5).state_dict(), "w")
    for num_classes, head, loaded in ((5, True, True), (5, False, False), (4, True, False), (1, True, False)):
        model = fresh("test_resnet", num_classes)
        before = copy_of(model)
        report = load_weights(model, weights, head=head)
        names = ("fc.weight", "fc.bias")
        assert same(model.state_dict(), weights.state if loaded else before, names)
        assert report.reinitialised == (() if loaded else names)
        assert set(report.loaded) | set(report.reinitialised) == set(model.state_dict())
    assert load_weights(fresh("test_resnet", 0), weights).unexpected == names
    headless = LoadedWeights(trained("test_resnet", 0).state_dict(), "w")
    report = load_weights(fresh("test_resnet", 5), headless)
    assert report.missing == report.reinitialised == names
    assert load_weights(fresh("test_resnet", 5), headless, head=False).missing == ()


@pytest.mark.parametrize("depth", range(6))
def test_transfer_depth(depth):
    """The first groups come from the weights with their BatchNorm statistics; the rest stays as it was."""
    weights = LoadedWeights(trained("test_resnet").state_dict(), "w")
    model = fresh("test_resnet")
    before = copy_of(model)
    report = load_weights(model, weights, head=False, groups=depth)
    inside = [name for group in layer_groups(model)[:depth] for name in group.tensors]
    assert sorted(report.loaded) == sorted(inside)
    assert same(model.state_dict(), weights.state, inside)
    outside = [name for name in before if name not in inside]
    assert list(report.reinitialised) == outside
    assert same(model.state_dict(), before, outside)
    assert not any(torch.equal(before[n], weights.state[n]) for n in before)


def test_depth_asks_only_for_its_groups():
    weights = altered(lambda s: (s.pop("layer4.0.conv1.weight"), s.update({"layer3.0.bn1.bias": torch.ones(2)})))
    assert load_weights(fresh("test_resnet"), weights, groups=3).loaded
    for depth in (4, 5, None):
        with pytest.raises(ModelError):
            load_weights(fresh("test_resnet"), weights, groups=depth)
    with pytest.raises(ModelError, match="no depth of 6"):
        load_weights(fresh("test_resnet"), weights, groups=6)


def test_final_norm_is_transferred_with_a_new_head(bit):
    model = fresh("resnetv2_50x1_bit", 3)
    head = [parameter.clone() for parameter in classifier_parameters(model)]
    load_weights(model, LoadedWeights(bit.state_dict(), "w"), head=False)
    assert torch.equal(model.norm.weight, bit.norm.weight)
    assert all(torch.equal(a, b) for a, b in zip(head, classifier_parameters(model), strict=True))


# --- channels


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize(("source_chans", "chans"), [(3, 1), (1, 3)])
def test_stem_folds_between_grey_and_colour(name, source_chans, chans):
    """A grey image gives the same features through one channel or repeated over three."""
    source = trained(name, 0, source_chans).eval()
    model = fresh(name, 0, chans).eval()
    report = load_weights(model, LoadedWeights(source.state_dict(), "w"))
    assert report.loaded == tuple(model.state_dict())
    grey = torch.rand(2, 1, 160, 160)
    expected = source(grey.expand(-1, source_chans, -1, -1))
    assert torch.allclose(model(grey.expand(-1, chans, -1, -1)), expected, rtol=1e-3, atol=1e-4)


def test_bit_stem_folds_by_sum(bit):
    model = fresh("resnetv2_50x1_bit", 3, 1)
    load_weights(model, LoadedWeights(bit.state_dict(), "w"))
    assert torch.allclose(model.stem.conv.weight[:, 0], bit.stem.conv.weight.sum(1))


def test_other_channel_changes_are_refused():
    weight = torch.rand(2, 3, 7, 7)
    assert fold_channels(weight, 5) is weight
    with pytest.raises(ModelError, match=r"conv1\.0\.weight"):
        load_weights(fresh("test_resnet", 2, 5), LoadedWeights(trained("test_resnet").state_dict(), "w"))


# --- hash


def test_hash_is_of_the_backbone_alone(tmp_path):
    source = trained("test_resnet")
    state = copy_of(source)
    torch.save(state, tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pt")
    safetensors.torch.save_file(dict(reversed(state.items())), tmp_path / "c.safetensors")
    save_lightning(tmp_path / "d.ckpt", source, backbone="test_resnet", mean=[0.5])
    torch.save({"model": {f"module.{n}": t for n, t in state.items() if n[:3] != "fc."}}, tmp_path / "e.pth.tar")
    hashes = {weights_hash(tmp_path / name) for name in ("a.pth", "b.pt", "c.safetensors", "d.ckpt", "e.pth.tar")}
    assert len(hashes) == 1
    assert re.fullmatch("[0-9a-f]{16}", hashes.pop())


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["conv1.0.weight"][0, 0, 0, 0].add_(1e-3),
        lambda s: s["bn1.running_var"].mul_(2),
        lambda s: s.update({"bn1.bias": s["bn1.bias"].double()}),
        lambda s: s.update({"bn1.bias": s["bn1.bias"].reshape(1, -1)}),
        lambda s: s.update({"bn9.bias": s.pop("bn1.bias")}),
    ],
)
def test_hash_sees_every_change(change):
    state = copy_of(trained("test_resnet"))
    before = weights_hash(LoadedWeights(dict(state), "w"))
    change(state)
    assert weights_hash(LoadedWeights(state, "w")) != before


def test_hash_reads_every_number_type():
    types = (torch.float16, torch.bfloat16, torch.int64, torch.bool)
    hashes = {weights_hash(LoadedWeights({"w": torch.ones(3).to(dtype)}, "w")) for dtype in types}
    assert len(hashes) == len(types)
