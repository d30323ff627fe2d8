"""Stages and blocks: both enumerations against the nets' own structure, and weights loaded as deep as a block."""

import functools

import pytest
import timm
import torch

from lightning_modules.backbones.checkpoints import load_weights
from lightning_modules.backbones.factory import classifier_parameters, create_backbone
from lightning_modules.backbones.layers import first_groups, freeze, layer_groups, set_frozen_eval
from lightning_modules.backbones.partial import load_first_groups
from lightning_modules.classification import Classification
from lightning_modules.errors import ModelError

FAMILIES = [
    "resnetv2_50x1_bit",
    "resnetv2_152x4_bit",
    "resnet18",
    "resnet50",
    "resnet10t",
    "convnext_tiny",
    "vit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "densenet121",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
]
GRANULARITIES = ["coarse", "block"]


@functools.cache
def meta(name, num_classes=7):
    with torch.device("meta"):
        return create_backbone(name, num_classes)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_but_the_classifiers_is_in_exactly_one_group(name, granularity):
    model = meta(name)
    groups = layer_groups(model, granularity)
    classifier = {id(parameter) for parameter in classifier_parameters(model)}
    parameters = [key for key, parameter in model.named_parameters() if id(parameter) not in classifier]
    assert sorted(key for group in groups for key in group.parameters) == sorted(parameters)
    assert sorted(key for group in groups for key in group.buffers) == sorted(key for key, _ in model.named_buffers())
    assert all(group.parameters for group in groups)
    part = "stage" if granularity == "coarse" else "block"
    assert [group.name for group in groups] == ["stem"] + [f"{part}{i}" for i in range(1, len(groups))]
    assert layer_groups(meta(name, 0), granularity) == groups


@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_of_a_stage_follow_each_other_and_make_it_up(name):
    model = meta(name)
    blocks = iter(layer_groups(model, "block"))
    for stage in layer_groups(model):
        found = set()
        while len(found) < len(stage.tensors):
            found |= set(next(blocks).tensors)
        assert found == set(stage.tensors)
    assert next(blocks, None) is None


def bit_blocks(depths):
    groups = [["stem."], *([f"stages.{s}.blocks.{b}."] for s, depth in enumerate(depths) for b in range(depth))]
    groups[-1].append("norm.")
    return groups


def resnet_blocks(depths):
    return [["conv1.", "bn1."], *([f"layer{s}.{b}."] for s, depth in enumerate(depths, 1) for b in range(depth))]


def convnext_blocks(depths):
    groups = [["stem."]]
    for stage, depth in enumerate(depths):
        groups += [[f"stages.{stage}.blocks.{block}."] for block in range(depth)]
        groups[-depth].append(f"stages.{stage}.downsample.")
    groups[-1].append("head.norm.")
    return groups


def vit_blocks(depth):
    groups = [["cls_token", "pos_embed", "patch_embed."], *([f"blocks.{block}."] for block in range(depth))]
    groups[-1].append("norm.")
    return groups


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnetv2_50x1_bit", bit_blocks([3, 4, 6, 3])),
        ("resnetv2_152x4_bit", bit_blocks([3, 8, 36, 3])),
        ("resnet18", resnet_blocks([2, 2, 2, 2])),
        ("resnet50", resnet_blocks([3, 4, 6, 3])),
        ("convnext_tiny", convnext_blocks([3, 3, 9, 3])),
        ("vit_small_patch16_224", vit_blocks(12)),
    ],
)
def test_blocks_are_the_nets_own(name, expected):
    model = meta(name)
    names = [key for key, _ in model.named_parameters()]
    wanted = [{key for key in names if key.startswith(tuple(prefixes))} for prefixes in expected]
    assert [set(group.parameters) for group in layer_groups(model, "block")] == wanted


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resnet18", "densenet121"])
def test_groups_come_in_the_order_of_the_forward_pass(name, granularity):
    model = create_backbone(name, 3).eval()
    groups = layer_groups(model, granularity)
    # A transformer owns its tokens itself: a group's modules are those below the net.
    group_of = {path: index for index, group in enumerate(groups) for path in group.modules if path}
    seen = []
    for path, module in model.named_modules():
        if path in group_of:
            module.register_forward_hook(lambda *_, index=group_of[path]: seen.append(index))
    side = 160 if name == "test_vit" else 64
    model(torch.zeros(1, 3, side, side))
    assert seen == sorted(seen)
    assert set(seen) == set(range(len(groups)))


def test_unknown_granularities_and_depths_are_named():
    with pytest.raises(ModelError, match="granularity is 'fine'"):
        layer_groups(meta("resnet18"), "fine")
    with pytest.raises(ModelError, match=r"0 \(none\) to 9: stem, block1, .*block8"):
        first_groups(meta("resnet18"), 10, "block")


def test_a_net_without_groups_trains_whole(tmp_path):
    """timm cuts a few architectures into no groups: only what counts groups needs them."""
    net, arguments = "pit_ti_224", {"num_classes": 3, "task": "multiclass"}
    with torch.device("meta"):
        assert Classification(net, **arguments).protocol == "scratch"
    torch.save(create_backbone(net, 5).state_dict(), tmp_path / "weights.pth")
    model = Classification(net, weights=str(tmp_path / "weights.pth"), **arguments)
    assert model.protocol == "finetune"
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())
    assert model.describe()["transfer_depth"] is None
    for counting in ({"frozen_depth": -1}, {"layer_decay": 0.5}):
        with pytest.raises(ModelError, match="no layer groups for pit_ti_224"):
            Classification(net, weights=str(tmp_path / "weights.pth"), **counting, **arguments)


def test_a_block_freezes_within_its_stage():
    model = timm.create_model("resnet18", num_classes=3).train()
    freeze(model, 4, "block")  # the stem, layer1 and the first half of layer2
    set_frozen_eval(model, 4, "block")
    frozen = {key for group in layer_groups(model, "block")[:4] for key in group.parameters}
    assert "layer2.0.downsample.0.weight" in frozen
    assert {key for key, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    norms = {key: module.training for key, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert {key for key, training in norms.items() if not training} == {
        key for key in norms if key.startswith(("bn1", "layer1", "layer2.0"))
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("source") / "weights.pth"
    torch.save(create_backbone("resnet18", 5).state_dict(), path)
    return path


def fresh():
    torch.manual_seed(1)
    return create_backbone("resnet18", 3)


@pytest.mark.parametrize("depth", range(10))
def test_weights_come_as_deep_as_a_block(source, depth):
    given, random, model = torch.load(source, weights_only=True), fresh().state_dict(), fresh()
    report = load_first_groups(model, source, depth, "block")
    inside = {name for group in layer_groups(model, "block")[:depth] for name in group.tensors}
    for name, value in model.state_dict().items():
        assert torch.equal(value, (given if name in inside else random)[name]), name
    assert set(report.loaded) == inside
    assert set(report.reinitialised) == set(random) - inside
    assert list(report.reinitialised) == [name for name in random if name not in inside]
    assert report.missing == ()


def test_a_stages_last_block_and_the_stage_are_the_same_depth(source):
    blocks, stages, whole = fresh(), fresh(), fresh()
    assert load_first_groups(blocks, source, 5, "block") == load_weights(stages, source, head=False, groups=3)
    assert all(torch.equal(a, b) for a, b in zip(blocks.parameters(), stages.parameters(), strict=True))
    assert load_first_groups(whole, source, None, "block") == load_weights(fresh(), source, head=False)
    with pytest.raises(ModelError, match="has 9 layer groups: no depth of 10"):
        load_first_groups(fresh(), source, 10, "block")
