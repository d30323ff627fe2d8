"""State dicts of other libraries: names, layouts, and equal outputs of the two libraries' nets."""

import argparse

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_modules.backbones.checkpoints import load_weights, read_weights
from lightning_modules.backbones.convert import backbone_tensors, unwrap
from lightning_modules.backbones.factory import create_backbone
from lightning_modules.backbones.key_maps import bit_npz, bit_port, torchvision_densenet
from lightning_modules.backbones.layouts import LAYOUTS, translate
from lightning_modules.errors import ModelError
from tests.weights_kit import fresh, npz_arrays, port_name, trained

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def lively(model: nn.Module, seed: int = 3) -> nn.Module:
    """Move every tensor away from its initial value: zeros, ones and tiny layer scales would hide a wrong name."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.squeeze().ndim < 2 else 0.02))
    return model.eval()


def assert_same_outputs(ours: nn.Module, theirs: nn.Module, images: torch.Tensor, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = theirs(inputs), ours.eval()(images)
    assert expected.std(dim=0).mean() > 1e-3 * expected.abs().mean(), "the net must tell images apart"
    scale = expected.abs().max()
    assert torch.allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


def saved(tmp_path, state, **more):
    torch.save({"model": state, **more}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


# --- wrappers and parts


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


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "backbone.", "module.backbone.", "_orig_mod.backbone.module.", "module."),
        *("model.", "module.model.", "model._orig_mod.", "model.backbone."),
    ],
)
def test_backbone_tensors_are_found_under_any_prefix(prefix):
    state = {f"{prefix}conv1.weight": torch.ones(1), f"{prefix}fc.bias": torch.zeros(1)}
    assert list(backbone_tensors(state)) == ["conv1.weight", "fc.bias"]


def test_other_towers_are_dropped_and_collisions_refused():
    state = {"backbone.conv1.weight": torch.ones(1), "text.conv1.weight": torch.zeros(1)}
    assert backbone_tensors(state) == {"conv1.weight": torch.ones(1)}
    assert backbone_tensors({"model.a": 1, "criterion.pos_weight": 2, "ema_model.a": 3}) == {"a": 1}
    with pytest.raises(ModelError, match=r"both 'conv1\.weight'"):
        backbone_tensors({"conv1.weight": torch.ones(1), "module.conv1.weight": torch.ones(1)})


def test_collision_after_translation_is_refused():
    state = {
        name: torch.ones(1) for name in ("root.conv.weight", "body.block1.unit01.conv1.weight", "stem.conv.weight")
    }
    with pytest.raises(ModelError, match=r"both 'stem\.conv\.weight'"):
        translate(state)


# --- BiT


def test_bit_names_cover_the_whole_net():
    with torch.device("meta"):
        names = list(create_backbone("resnetv2_50x1_bit", 6).state_dict())
    port = [port_name(name) for name in names]
    assert [bit_port(name) for name in port] == names
    assert "body.block4.unit01.downsample.weight" in port
    assert bit_port("body.block2.unit04.gn3.bias") == "stages.1.blocks.3.norm3.bias"
    assert bit_port("body.block4.unit01.downsample.weight") == "stages.3.blocks.0.downsample.conv.weight"
    assert bit_npz("resnet/block3/unit06/b/group_norm/beta") == "stages.2.blocks.5.norm2.bias"
    assert bit_npz("something/else") == bit_port("something/else") == "something/else"
    model = create_backbone("resnetv2_50x1_bit", 6)
    assert sorted(bit_npz(name) for name in npz_arrays(model)) == sorted(names)


def test_official_bit_file_equals_timms_own_loader(tmp_path):
    source = lively(fresh("resnetv2_50x1_bit", 6))
    path = tmp_path / "BiT-M-R50x1.npz"
    np.savez(path, **npz_arrays(source))
    oracle, model = fresh("resnetv2_50x1_bit", 6), fresh("resnetv2_50x1_bit", 6)
    with torch.no_grad():
        oracle.load_pretrained(str(path))
    report = load_weights(model, path)
    state = oracle.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    images = torch.rand(2, 3, 64, 64)
    assert_same_outputs(model, oracle.eval(), images, images)
    assert report.source_layout == "official BiT .npz"
    assert report.source_preprocessing == ((0.5,) * 3, (0.5,) * 3)
    assert report.standardisation_eps is None, "timm's own loading computes with timm's own"


# --- torchvision


@pytest.mark.parametrize(
    ("theirs", "ours", "layout"),
    [
        ("resnet18", "resnet18", "timm"),
        ("resnet152", "resnet152", "timm"),
        ("resnext50_32x4d", "resnext50_32x4d", "timm"),
        ("wide_resnet50_2", "wide_resnet50_2", "timm"),
        ("densenet161", "densenet161", "timm"),
        ("densenet201", "densenet201", "timm"),
        ("vit_b_16", "vit_base_patch16_224", "torchvision VisionTransformer"),
        ("vit_l_32", "vit_large_patch32_224", "torchvision VisionTransformer"),
        ("convnext_small", "convnext_small", "torchvision ConvNeXt"),
        ("convnext_large", "convnext_large", "torchvision ConvNeXt"),
    ],
)
def test_torchvision_names_and_shapes(theirs, ours, layout):
    with torch.device("meta"):
        source = torchvision.models.get_model(theirs, weights=None).state_dict()
        target = create_backbone(ours, 1000).state_dict()
    state, found, ignored = translate(source)
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in target.items()}
    assert found.name == layout
    assert ignored == ()


def small_vit():
    return torchvision.models.VisionTransformer(32, 16, 3, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=7)


@pytest.mark.parametrize(
    ("theirs", "ours", "preprocessing"),
    [
        (lambda: torchvision.models.resnet18(num_classes=7), lambda: fresh("resnet18", 7), None),
        (lambda: torchvision.models.densenet121(num_classes=7), lambda: fresh("densenet121", 7), None),
        (small_vit, lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=7), IMAGENET),
        (lambda: torchvision.models.convnext_tiny(num_classes=7), lambda: fresh("convnext_tiny", 7), IMAGENET),
    ],
    ids=["resnet18", "densenet121", "vit", "convnext_tiny"],
)
def test_torchvision_outputs(tmp_path, theirs, ours, preprocessing):
    source, model = lively(theirs()), ours()
    report = load_weights(model, saved(tmp_path, source.state_dict()))
    assert report.loaded == tuple(model.state_dict())
    assert report.missing == report.unexpected == report.reinitialised == ()
    assert report.source_preprocessing == preprocessing
    images = torch.rand(2, 3, 32, 32)
    assert_same_outputs(model, source, images, images)


def test_densenet_as_torchvision_published_it(tmp_path):
    """Its files write `norm.1` for `norm1` and lack BatchNorm's step counters."""
    source = lively(torchvision.models.densenet121(num_classes=7))
    published = {}
    for name, tensor in source.state_dict().items():
        for layer in ("norm1", "norm2", "conv1", "conv2"):
            name = name.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.")
        if not name.endswith("num_batches_tracked"):
            published[name] = tensor
    assert torchvision_densenet("features.denseblock3.denselayer24.conv.2.weight") in source.state_dict()
    model = fresh("densenet121", 7)
    report = load_weights(model, saved(tmp_path, published))
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    assert report.source_preprocessing == IMAGENET
    images = torch.rand(2, 3, 32, 32)
    assert_same_outputs(model, source, images, images)


def test_vit_as_torchvision_published_it():
    """Its files write `mlp.linear_1` for `mlp.0`."""
    state = small_vit().state_dict()
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}
    assert old.keys() != state.keys()
    assert translate(old)[0].keys() == translate(state)[0].keys()


def test_files_of_torchvisions_training_script(tmp_path):
    """They hold arguments in a Namespace, and averaged weights with a counter; the averaged ones are used."""
    raw, averaged = trained("test_resnet", seed=4), trained("test_resnet", seed=5)
    ema = {f"module.{name}": tensor for name, tensor in averaged.state_dict().items()}
    path = saved(
        tmp_path,
        raw.state_dict(),
        model_ema={"n_averaged": torch.tensor(9), **ema},
        args=argparse.Namespace(lr=0.1, data_path="/x"),
    )
    model = fresh("test_resnet")
    report = load_weights(model, path)
    assert report.unexpected == ("n_averaged",)
    assert all(torch.equal(tensor, averaged.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_net_of_torchvision_is_refused(tmp_path):
    path = saved(tmp_path, torchvision.models.mobilenet_v3_small(num_classes=3).state_dict())
    for name in ("convnext_tiny", "densenet121", "resnet18", "mobilenetv3_small_100"):
        with pytest.raises(ModelError, match=f"do not fit {name}: not one name"):
            load_weights(create_backbone(name, 3), path)
    deeper = saved(tmp_path, torchvision.models.resnet34(num_classes=3).state_dict())
    with pytest.raises(ModelError, match=r"unknown to the model: layer1\.2\.conv1\.weight"):
        load_weights(create_backbone("resnet18", 3), deeper)


# --- torchxrayvision


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("calibrated", [False, True])
def test_torchxrayvision_densenet(tmp_path, in_chans, calibrated):
    """The image goes through torchxrayvision's own scaling there, and through the mean and std we report here."""
    xrv = pytest.importorskip("torchxrayvision")
    source = lively(xrv.models.DenseNet(weights=None))
    state = dict(source.state_dict())
    if calibrated:  # its published weights come with operating points, which its own outputs are scaled by
        state["op_threshs"] = torch.rand(18)
    model = fresh("densenet121", 18, in_chans)
    report = load_weights(model, saved(tmp_path, state))
    assert report.loaded == tuple(model.state_dict())
    assert report.unexpected == (("op_threshs",) if calibrated else ())
    assert report.source_layout == "torchxrayvision DenseNet"
    grey = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64)).astype(np.float32)
    theirs = torch.from_numpy(xrv.datasets.normalize(grey, 255))
    assert theirs.min() < -1000
    assert theirs.max() > 1000
    (mean,), (std,) = report.source_preprocessing
    ours = ((torch.from_numpy(grey) / 255 - mean) / std).expand(-1, in_chans, -1, -1)
    assert_same_outputs(model, source, ours, theirs)


def test_grey_densenet_of_ours_is_not_taken_for_torchxrayvision(tmp_path):
    path = saved(tmp_path, create_backbone("densenet121", 14, 1).state_dict())
    assert read_weights(path).layout == "timm"
    assert read_weights(path).mean is None


def test_layouts_tell_each_other_apart():
    """No state dict has the marks of two layouts but the last, which takes what no other one knows."""
    assert not LAYOUTS[-1].marks
    for layout in LAYOUTS[:-1]:
        state = {name: torch.zeros(shape or (2,)) for name, shape in layout.marks.items()}
        assert [other.name for other in LAYOUTS if other.fits(state)] == [layout.name, "timm"]
