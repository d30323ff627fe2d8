"""Catalogue, factory and layer groups, on models without data (meta device) or small enough for a CPU."""

import functools
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from lightning_modules.backbones.catalogue import CATALOGUE
from lightning_modules.backbones.factory import (
    classifier_names,
    classifier_parameters,
    create_backbone,
    preprocessing,
)
from lightning_modules.backbones.layers import first_groups, freeze, layer_groups, set_frozen_eval
from lightning_modules.errors import ModelError

FAMILIES = [
    "resnetv2_50x1_bit",
    "resnet18",
    "test_resnet",
    "test_vit",
    "test_convnext",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
    "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224",
]


@functools.cache
def meta(name: str, num_classes: int = 7) -> nn.Module:
    """Build a model without memory or initialisation: enough for names and shapes. Tests only read it."""
    with torch.device("meta"):
        return create_backbone(name, num_classes)


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_catalogue_states_measured_facts(entry):
    parameters = sum(parameter.numel() for parameter in meta(entry.name, 0).parameters())
    assert entry.parameters == pytest.approx(parameters / 1e6, abs=6e-4)
    assert entry.input_size == timm.models.get_pretrained_cfg(entry.name).input_size[-1]


def test_catalogue_imports_neither_torch_nor_timm():
    code = "import sys, lightning_modules.backbones.catalogue; print({'torch', 'timm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize(("num_classes", "in_chans"), [(1, 3), (5, 1)])
def test_create_backbone_gives_logits(name, num_classes, in_chans):
    model = create_backbone(name, num_classes, in_chans).eval()
    assert model(torch.zeros(2, in_chans, 160, 160)).shape == (2, num_classes)


def test_bit_head_is_a_convolution_and_gives_flat_logits():
    model = create_backbone("resnetv2_50x1_bit", 1).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1)
    weight, bias = classifier_parameters(model)
    assert weight.shape == (1, 2048, 1, 1)
    assert bias.shape == (1,)


def test_create_backbone_starts_from_random_weights():
    """A's timm path always took timm's own weights; ours is the from-scratch baseline."""
    stems = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        stems.append(create_backbone("test_resnet", 2).get_parameter("conv1.0.weight"))
    assert torch.equal(stems[0], stems[1])
    assert not torch.equal(stems[0], stems[2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnetv2_50x1_bitt", "resnetv2_50x1_bit"),
        ("tv_resnet50", "resnet50"),
        ("resnet50.nope", "resnet50.a1_in1k"),
        ("zzz", "list models"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(name, words):
    with pytest.raises(ModelError, match=words):
        create_backbone(name, 2)


@pytest.mark.parametrize(("num_classes", "in_chans"), [(-1, 3), (2, 0)])
def test_impossible_sizes(num_classes, in_chans):
    with pytest.raises(ModelError, match="test_resnet cannot have"):
        create_backbone("test_resnet", num_classes, in_chans)


def test_preprocessing_belongs_to_the_weights():
    assert preprocessing("resnetv2_50x1_bit") == ((0.5,) * 3, (0.5,) * 3)
    assert preprocessing("resnet50.a1_in1k") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", FAMILIES)
def test_classifier_is_what_timm_says_and_nothing_of_equal_width(name):
    """A took every layer as wide as the number of classes for the classifier, and never its bias."""
    width = next(parameter.shape[0] for parameter in meta(name).parameters() if parameter.ndim == 4)
    model = meta(name, width)
    assert sum(parameter.shape[0] == width for parameter in model.parameters()) > 2
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    expected = [id(parameter) for head in heads for parameter in head.parameters()]
    assert [id(parameter) for parameter in classifier_parameters(model)] == expected
    assert len(expected) == 2 * len(classifier_names(model))
    assert classifier_parameters(meta(name, 0)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_backbone_tensor_is_in_exactly_one_group(name):
    model = meta(name)
    groups = layer_groups(model)
    classifier = {id(parameter) for parameter in classifier_parameters(model)}
    backbone = [key for key, parameter in model.named_parameters() if id(parameter) not in classifier]
    assert sorted(key for group in groups for key in group.parameters) == sorted(backbone)
    buffers = [key for key, _ in model.named_buffers()]
    assert sorted(key for group in groups for key in group.buffers) == sorted(buffers)
    assert all(group.parameters for group in groups)
    assert [group.name for group in groups] == ["stem"] + [f"stage{i}" for i in range(1, len(groups))]


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_do_not_depend_on_a_classifier(name):
    assert layer_groups(meta(name, 0)) == layer_groups(meta(name, 7))


@pytest.mark.parametrize("name", FAMILIES)
def test_buffers_are_in_their_modules_group(name):
    model = meta(name)
    group_of = {key: index for index, group in enumerate(layer_groups(model)) for key in group.tensors}
    for path, module in model.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        own = [f"{path}.{key}" for key, _ in tensors]
        if path and own and own[0] in group_of:
            assert len({group_of[key] for key in own}) == 1, path


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnetv2_50x1_bit", 5, "stem.conv.weight", "norm.weight"),
        ("resnetv2_152x4_bit", 5, "stem.conv.weight", "norm.bias"),
        ("resnet50", 5, "bn1.weight", "layer4.2.bn3.weight"),
        ("convnext_tiny", 5, "stem.1.bias", "head.norm.weight"),
        ("vit_small_patch16_224", 13, "cls_token", "norm.weight"),
        ("efficientnet_b0", 8, "conv_stem.weight", "bn2.weight"),
        ("vit_base_patch16_siglip_224", 13, "pos_embed", "attn_pool.mlp.fc2.bias"),
    ],
)
def test_stem_first_and_final_norm_in_the_last_group(name, count, first, last):
    groups = layer_groups(meta(name))
    assert len(groups) == count
    assert first in groups[0].parameters
    assert last in groups[-1].parameters


def test_groups_come_in_the_order_of_the_forward_pass():
    model = create_backbone("test_resnet", 3).eval()
    group_of = {path: i for i, group in enumerate(layer_groups(model)) for path in group.modules}
    seen = []
    for path, module in model.named_modules():
        if path in group_of:
            module.register_forward_hook(lambda *_, index=group_of[path]: seen.append(index))
    model(torch.zeros(1, 3, 64, 64))
    assert seen == sorted(seen)
    assert set(seen) == set(range(5))


def test_a_net_without_groups_says_so():
    with pytest.raises(ModelError, match="no layer groups for caformer_s18"):
        layer_groups(meta("caformer_s18"))


@pytest.mark.parametrize("depth", range(6))
def test_freeze_depends_on_depth_alone(depth):
    model = create_backbone("test_resnet", 3)
    for before in (5, depth, depth):
        freeze(model, before)
    frozen = {key for group in layer_groups(model)[:depth] for key in group.parameters}
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == frozen
    assert all(parameter.requires_grad for parameter in classifier_parameters(model))


def test_frozen_norms_and_dropout_stand_still():
    """Fact: requires_grad=False does not stop a BatchNorm's running statistics."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, drop_path_rate=0.5)
    model.train()
    freeze(model, 3)
    set_frozen_eval(model, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    optimizer.step()
    frozen = {key for group in layer_groups(model)[:3] for key in group.tensors}
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert "bn1.running_mean" in frozen
    assert not moved & frozen
    assert {"layer3.0.bn1.running_mean", "layer4.0.bn2.weight", "fc.weight", "fc.bias"} <= moved
    dropped = {path for path, m in model.named_modules() if path.endswith("drop_path") and m.training}
    assert dropped == {"layer3.0.drop_path", "layer4.0.drop_path"}
    model.train()
    set_frozen_eval(model, 0)
    assert all(module.training for module in model.modules())


def test_eval_mode_never_reaches_the_model_that_owns_frozen_tokens():
    """A transformer owns its class token directly; it must not pull the trained blocks into eval mode."""
    model = create_backbone("test_vit", 3).train()
    set_frozen_eval(model, 2)
    assert "" in layer_groups(model)[0].modules
    assert model.training
    assert not model.get_submodule("blocks.0").training
    assert all(module.training for module in model.get_submodule("blocks.1").modules())


@pytest.mark.parametrize("depth", [-1, 6])
def test_impossible_depths_name_the_groups(depth):
    model = create_backbone("test_resnet", 3)
    for use in (freeze, set_frozen_eval, first_groups):
        with pytest.raises(ModelError, match=r"0 \(none\) to 5: stem, stage1, stage2, stage3, stage4"):
            use(model, depth)
