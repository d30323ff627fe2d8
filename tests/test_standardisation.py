"""The ε of weight standardisation, on checkpoints of BiT's PyTorch port whose filters are tiny."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.backbones.checkpoints import LoadedWeights, load_weights, read_weights, weights_hash
from lightning_modules.backbones.factory import create_backbone
from lightning_modules.backbones.standardisation import (
    portable_state,
    set_standardisation_eps,
    standardisation_eps,
)
from lightning_modules.classification import Classification
from lightning_modules.errors import ModelError
from tests.weights_kit import copy_of, fresh, port_state, same, save_lightning, trained

BIT = "resnetv2_50x1_bit"


def reference_forward(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Compute BiT ResNet-50x1 as Kolesnikov et al. (arXiv 1912.11370) describe it, in float64, from the port's names.

    Pre-activation bottlenecks; GroupNorm of 32 groups; standardised convolutions with ε = 1e-10 under the root; a 7 × 7
    stem of stride 2 padded by 3, one ring of zeros, 3 × 3 max-pool of stride 2; projections see the activated input.
    """
    state = {name: tensor.double() for name, tensor in state.items()}

    def conv(x, name, stride=1, padding=0):
        weight = state[f"{name}.weight"]
        centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / (variance + 1e-10).sqrt(), stride=stride, padding=padding)

    def activated(x, name):
        groups = x.reshape(len(x), 32, -1)
        deviation = (groups.var(dim=2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normed = ((groups - groups.mean(dim=2, keepdim=True)) / deviation).reshape(x.shape)
        return (normed * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]).clamp(min=0)

    x = F.max_pool2d(F.pad(conv(images.double(), "root.conv", 2, 3), (1, 1, 1, 1)), 3, 2)
    for block, units in enumerate((3, 4, 6, 3), start=1):
        for number in range(1, units + 1):
            unit = f"body.block{block}.unit{number:02d}"
            stride = 2 if block > 1 and number == 1 else 1
            y = activated(x, f"{unit}.gn1")
            shortcut = conv(y, f"{unit}.downsample", stride) if number == 1 else x
            y = activated(conv(y, f"{unit}.conv1"), f"{unit}.gn2")
            y = activated(conv(y, f"{unit}.conv2", stride, 1), f"{unit}.gn3")
            x = conv(y, f"{unit}.conv3") + shortcut
    pooled = activated(x, "head.gn").mean(dim=(2, 3))
    return pooled @ state["head.conv.weight"][:, :, 0, 0].T + state["head.conv.bias"]


@pytest.fixture(scope="module")
def port():
    """A state dict of the PyTorch port whose filters have σ between 1e-6 and 1e-4, another one in every layer."""
    generator = torch.Generator().manual_seed(0)

    def values(shape):
        return torch.randn(shape, generator=generator)

    state = port_state(fresh(BIT, 5))
    for number, (name, tensor) in enumerate(state.items()):
        sigma = 10.0 ** -(4 + number % 5 / 2)
        if tensor.ndim == 4 and name != "head.conv.weight":
            state[name] = values(tensor.shape) * sigma
        else:
            state[name] = values(tensor.shape) * 0.1 + (0 if name.startswith("head.conv") else 1)
    return state


@pytest.fixture(scope="module")
def port_file(port, tmp_path_factory):
    """The file as it was published: {"model": ..., "optimizer": ..., "epoch": ...}."""
    path = tmp_path_factory.mktemp("port") / "model.pth.tar"
    momentum = {"momentum_buffer": torch.ones(7)}
    torch.save({"model": port, "optimizer": {"state": {0: momentum}, "param_groups": [{"lr": 0.1}]}, "epoch": 89}, path)
    return path


@pytest.fixture(scope="module")
def bit(port_file):
    """The model with these weights, in evaluation mode."""
    model = fresh(BIT, 5)
    load_weights(model, port_file)
    return model.eval()


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def distance(model, expected) -> float:
    """Largest difference of the logits, in units of the largest expected logit."""
    return float((model(IMAGES) - expected).abs().max() / expected.abs().max())


def test_published_checkpoint_computes_what_the_original_net_does(port, port_file, bit):
    assert max(tensor.std() for name, tensor in port.items() if ".conv" in name and "head" not in name) < 1.01e-4
    expected = reference_forward(port, IMAGES)
    assert distance(bit, expected) < 1e-4, "float32"
    in_double = copy.deepcopy(bit).double()
    with torch.no_grad():
        difference = (in_double(IMAGES.double()) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-9
    with_timm_eps = copy.deepcopy(bit)
    set_standardisation_eps(with_timm_eps, None)
    assert distance(with_timm_eps, expected) > 0.1, "timm's ε is another net"
    report = load_weights(fresh(BIT, 3), port_file, head=False)
    assert report.reinitialised == ("head.fc.weight", "head.fc.bias")
    assert (report.source_layout, report.standardisation_eps) == ("PyTorch port of BiT", 1e-10)
    assert report.source_preprocessing is None, "nets of photos and of radiographs differ"


def test_eps_comes_back_from_our_own_checkpoint(tmp_path, bit):
    """A model that was fine-tuned from such weights keeps its ε: it is a plain number in the hyper-parameters."""
    assert standardisation_eps(bit) == 1e-10
    assert standardisation_eps(copy.deepcopy(bit)) == 1e-10
    path = save_lightning(tmp_path / "a.ckpt", bit, backbone=BIT, standardisation_eps=standardisation_eps(bit))
    model = fresh(BIT, 5)
    assert standardisation_eps(model) is None
    report = load_weights(model, path)
    assert report.standardisation_eps == standardisation_eps(model) == 1e-10
    with torch.no_grad():
        assert distance(model.eval(), bit(IMAGES)) < 1e-6


def test_source_decides(tmp_path, bit, port_file):
    """A source without an ε of its own means timm's; nothing of the backbone loaded leaves the model as it is."""
    plain = save_lightning(tmp_path / "a.ckpt", bit, backbone=BIT, standardisation_eps=None)
    model = fresh(BIT, 2)
    load_weights(model, port_file, head=False, groups=0)
    assert standardisation_eps(model) is None
    load_weights(model, port_file, head=False, groups=1)
    assert standardisation_eps(model) == 1e-10
    load_weights(model, plain, head=False)
    assert standardisation_eps(model) is None
    assert model.stem.conv.eps == create_backbone(BIT, 2).stem.conv.eps


def test_timms_own_eps_is_no_departure():
    model = fresh(BIT, 2)
    set_standardisation_eps(model, model.stem.conv.eps)
    assert standardisation_eps(model) is None
    assert standardisation_eps(fresh("test_resnet")) is None
    set_standardisation_eps(fresh("test_resnet"), None)


def test_eps_needs_standardised_convolutions():
    weights = LoadedWeights(trained("test_resnet").state_dict(), "w", standardisation_eps=1e-10)
    model = fresh("test_resnet")
    before = copy_of(model)
    with pytest.raises(ModelError, match="does not standardise its weights"):
        load_weights(model, weights)
    assert same(model.state_dict(), before, before)
    with pytest.raises(ModelError, match="above 0"):
        set_standardisation_eps(fresh(BIT, 2), 0.0)


def test_hash_tells_the_two_nets_apart(tmp_path, bit, port_file):
    assert weights_hash(LoadedWeights(bit.state_dict(), "w")) != weights_hash(port_file)
    path = save_lightning(tmp_path / "a.ckpt", bit, backbone=BIT, standardisation_eps=1e-10)
    assert weights_hash(path) == weights_hash(port_file)
    assert read_weights(path).layout == "timm"


def test_portable_state_needs_no_eps(bit):
    """A plain timm model with the portable state computes the same: what an export must hold."""
    plain = create_backbone(BIT, 5).eval()
    plain.load_state_dict(portable_state(bit))
    with torch.no_grad():
        expected = bit(IMAGES)
    assert distance(plain, expected) < 1e-4
    plain.load_state_dict(bit.state_dict())
    assert distance(plain, expected) > 0.1
    untouched = fresh(BIT, 5)
    assert same(portable_state(untouched), untouched.state_dict(), untouched.state_dict())


def test_a_checkpoint_carries_it():
    facts = {"backbone": "resnetv2_50x1_bit", "num_classes": 2, "task": "multiclass", "class_names": ["a", "b"]}
    trained = Classification(**facts, standardisation_eps=1e-10)
    assert standardisation_eps(trained.backbone) == 1e-10
    rebuilt = Classification(**trained.hyper_parameters())
    assert standardisation_eps(rebuilt.backbone) == 1e-10
    checkpoint = {}
    trained.on_save_checkpoint(checkpoint)
    resumed = Classification(**facts)
    resumed.on_load_checkpoint(checkpoint)
    assert standardisation_eps(resumed.backbone) == 1e-10
    resumed.on_load_checkpoint({"hyper_parameters": Classification(**facts).hyper_parameters()})
    assert standardisation_eps(resumed.backbone) is None
