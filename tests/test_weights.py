"""Loading weights into a model: strictness, head, depth, stem channels, hashes."""

import re
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_modules.backbones.checkpoints import LoadedWeights, load_weights, weights_hash
from lightning_modules.backbones.convert import fold_channels
from lightning_modules.backbones.factory import classifier_parameters, create_backbone
from lightning_modules.backbones.layers import layer_groups
from lightning_modules.errors import ModelError
from tests.weights_kit import copy_of, fresh, same, save_lightning, trained


@pytest.fixture(scope="module")
def bit() -> nn.Module:
    return trained("resnetv2_50x1_bit", 6)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    weights = altered(lambda s: s["layer3.0.conv1.weight"][0, 0].fill_(value))
    model = fresh("test_resnet")
    before = copy_of(model)
    with pytest.raises(ModelError, match=r"are NaN or infinite in layer3\.0\.conv1\.weight\n"):
        load_weights(model, weights)
    assert same(model.state_dict(), before, before)
    assert load_weights(model, weights, groups=2).loaded, "what is not asked for may be anything"


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
