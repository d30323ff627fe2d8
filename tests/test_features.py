"""Features: against the nets' own parts run one after the other, and a cache that survives kills, races and damage."""

import errno
import multiprocessing
import os
import random
import signal
import time
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models.resnetv2 import _create_resnetv2_bit
from torch import nn

from datamodules.errors import DataError
from datamodules.image_table import ImageTable
from datamodules.synthetic import Synthetic
from lightning_modules.backbones.checkpoints import weights_hash
from lightning_modules.backbones.factory import classifier_names, create_backbone
from lightning_modules.backbones.features import FeatureReader, group_features, group_widths
from lightning_modules.backbones.layers import layer_groups
from lightning_modules.errors import ModelError
from studies import feature_key as keys
from studies import features as studied
from studies.feature_key import feature_key
from studies.features import build_net, extract_features
from tests.data.images import write_image

ARCHITECTURE = "test_resnet"
FORK = multiprocessing.get_context("fork")
SWIN = "swin_tiny_patch4_window7_224"
TINY = {
    "resnetv2_50x1_bit": partial(_create_resnetv2_bit, layers=(1, 2, 1, 1), channels=(128, 128, 128, 256)),
    SWIN: partial(timm.create_model, embed_dim=12, depths=(1, 2), num_heads=(1, 2)),
}
NETS = {"test_resnet": 64, "resnetv2_50x1_bit": 64, "test_convnext": 64, "test_vit": 160}


def build(name, num_classes=3):
    """A net of the family with random weights that are no initial ones: zeros would hide mistakes."""
    torch.manual_seed(0)
    model = TINY.get(name, timm.create_model)(name, num_classes=num_classes).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def by_hand(name, model, x):
    """Features of every group but the last by calling the parts of the net in the order of its paper."""
    if name == "test_vit":
        tokens = [model.norm_pre(model._pos_embed(model.patch_embed(x)))]
        for block in model.blocks[:-1]:
            tokens.append(block(tokens[-1]))
        return [found[:, 1:].mean(1) for found in tokens]
    if name == "test_resnet":
        maps = [model.maxpool(model.act1(model.bn1(model.conv1(x))))]
        stages = (model.layer1, model.layer2, model.layer3)
    else:
        maps, stages = [model.stem(x)], model.stages[:-1]
    for stage in stages:
        maps.append(stage(maps[-1]))
    return [found.mean((2, 3)) for found in maps]


def classifier_input(model, x):
    given = []
    (name,) = classifier_names(model)
    with model.get_submodule(name).register_forward_pre_hook(lambda _, args: given.append(args[0].flatten(1))):
        model(x)
    return given[0]


@pytest.mark.parametrize("name", NETS)
def test_groups_are_the_nets_own_parts_and_the_last_is_what_the_classifier_gets(name):
    model, x = build(name), images(NETS[name])
    names = [group.name for group in layer_groups(model)]
    found = group_features(model, x, names)
    with torch.no_grad():
        expected = [*by_hand(name, model, x), classifier_input(model, x)]
    assert list(found) == names
    for values, right in zip(found.values(), expected, strict=True):
        assert (values.dtype, values.requires_grad) == (torch.float32, False)
        torch.testing.assert_close(values, right)
    assert group_widths(model) == {name: values.shape[1] for name, values in found.items()}


@pytest.mark.parametrize("name", NETS)
def test_a_net_without_classifier_gives_the_same(name):
    model, headless = build(name), build(name, 0)
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if k in headless.state_dict()})
    names = [group.name for group in layer_groups(model)]
    x = images(NETS[name])
    one, other = group_features(model, x, names), group_features(headless, x, names)
    assert all(torch.equal(one[name], other[name]) for name in names)
    assert group_widths(headless) == group_widths(model)


def test_channels_last_maps_are_averaged_over_space():
    model, x = build(SWIN), images(224)
    with torch.no_grad():
        tokens = model.patch_embed(x)
        first = model.layers[0](tokens)
    found = group_features(model, x, ["stage1", "stem"])
    assert list(found) == ["stage1", "stem"]
    torch.testing.assert_close(found["stem"], tokens.mean((1, 2)))
    torch.testing.assert_close(found["stage1"], first.mean((1, 2)))
    assert group_widths(model) == {"stem": 12, "stage1": 12, "stage2": 24}


def test_blocks():
    model, x = build("resnetv2_50x1_bit"), images(64)
    found = group_features(model, x, ["block2", "block3", "stage2", "block5", "stage4"])
    with torch.no_grad():
        first = model.stages[1].blocks[0](model.stages[0](model.stem(x)))
        second = model.stages[1].blocks[1](first)
    torch.testing.assert_close(found["block2"], first.mean((2, 3)))
    torch.testing.assert_close(found["block3"], second.mean((2, 3)))
    assert torch.equal(found["block3"], found["stage2"])
    assert torch.equal(found["block5"], found["stage4"])
    assert FeatureReader(model, ["block3", "stage2"]).depths == {"block3": 4, "stage2": 3}
    assert group_widths(model, ["block3"]) == {"block3": 128}


def test_modes_are_kept_and_norms_stand_still():
    model, x = build(ARCHITECTURE), images(64)
    expected = group_features(model, x, ["stage4"])["stage4"]
    model.train().layer1.eval()
    modes = [module.training for module in model.modules()]
    before = model.bn1.running_mean.clone()
    assert torch.equal(group_features(model, x, ["stage4"])["stage4"], expected)
    assert torch.equal(model.bn1.running_mean, before)
    assert [module.training for module in model.modules()] == modes


def test_no_hooks_are_left_behind():
    model = build(ARCHITECTURE).train()
    with pytest.raises(RuntimeError):
        group_features(model, torch.zeros(2, 5, 64, 64), ["stem", "stage2"])
    assert all(module.training for module in model.modules())
    group_features(model, images(64), ["stem", "stage2"])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("groups", "problem"), [(["stem", "stage9"], "no layer group 'stage9'"), ([], "no layer gr")])
def test_unknown_groups_name_the_valid_ones(groups, problem):
    with pytest.raises(ModelError, match=rf"{problem}.*\n.*stem, stage1, stage2, stage3, stage4, or block1 to block4"):
        group_features(build(ARCHITECTURE), images(64), groups)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def synthetic(**kwargs):
    return Synthetic(**{"num_train": 40, "num_test": 10, "image_size": 32, "classes": 3, **kwargs})


def bare_loop(data, rows, weights=None):
    """Features of the last group by the net itself, a row at a time."""
    net = build_net(weights, ARCHITECTURE)[0]
    net.backbone.fc = nn.Identity()
    batches = [next(iter(data.evaluation_dataloader(np.array([row])))) for row in rows]
    with torch.no_grad():
        return np.concatenate([net(net.normalise(batch["image"])).numpy() for batch in batches])


@pytest.mark.parametrize("look", ["natural", "radiograph"])
def test_rows_come_in_the_order_asked_for(cache, look):
    data, rows = synthetic(look=look), np.array([41, 3, 3, 0, 17, 3])
    (found,) = extract_features(None, data, rows, backbone=ARCHITECTURE, batch_size=4).values()
    assert (found.group, found.depth, found.architecture) == ("stage4", 5, ARCHITECTURE)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.labels, data.read_table().labels[rows])
    np.testing.assert_allclose(found.values, bare_loop(data, rows), atol=1e-5)
    assert (type(found.values), found.values.dtype) == (np.memmap, np.float32)
    with pytest.raises(ValueError, match="read-only"):
        found.values[0] = 0


def test_each_group_is_extracted_once(cache, monkeypatch):
    data, rows = synthetic(), np.arange(20)
    first = extract_features(None, data, rows, backbone=ARCHITECTURE, groups=["stem", "stage2"])
    (stem,) = cache.glob("*/stem.npy")
    written = stem.stat().st_mtime_ns
    both = extract_features(None, data, rows, backbone=ARCHITECTURE, groups=["stage1", "stem"], batch_size=7)
    assert list(both) == ["stage1", "stem"]
    assert stem.stat().st_mtime_ns == written
    assert {path.name for path in stem.parent.iterdir()} == {"stem.npy", "stage1.npy", "stage2.npy", "lock"}
    monkeypatch.delattr(studied, "_read_batches")  # whatever extracts now fails
    again = extract_features(None, data, rows, backbone=ARCHITECTURE, groups=["stage2"], num_workers=3)
    np.testing.assert_array_equal(again["stage2"].values, first["stage2"].values)


def test_workers_and_a_trainer_of_many_ranks_change_nothing(cache):
    data, rows = synthetic(), np.arange(30)
    expected = np.array(extract_features(None, data, rows, backbone=ARCHITECTURE)["stage4"].values)
    next(cache.glob("*/stage4.npy")).unlink()
    data.trainer = type("Trainer", (), {"world_size": 2, "global_rank": 1})()
    found = extract_features(None, data, rows, backbone=ARCHITECTURE, num_workers=1)["stage4"].values
    np.testing.assert_array_equal(found, expected)
    assert (data.num_workers, data.trainer is None) == (0, False)


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        write_image(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", number)
    return tmp_path / "photos"


def key_of(folder, rows=(0, 1, 2), backbone=ARCHITECTURE, change=lambda net: None, **kwargs):
    data = ImageTable(root=str(folder), **{"image_size": 16, **kwargs})
    net = build_net(None, backbone)[0]
    change(net)
    return feature_key(net, data, np.array(rows))


@pytest.mark.parametrize(
    "other",
    [
        {"rows": (0, 2, 1)},
        {"rows": (0, 1)},
        {"image_size": 17},
        {"transform": "chest_xray"},
        {"mode": "grey"},
        {"window": (0, 1000)},
        {"dataset_name": "others"},
        {"backbone": "test_resnet.r160_in1k", "change": lambda net: net.set_normalisation([0.4], [0.5])},
        {"change": lambda net: net.backbone.conv1[0].weight.data.mul_(1.001)},
        {"change": lambda net: setattr(net.backbone.bn1, "eps", 1e-3)},
        {"backbone": "test_convnext"},
    ],
)
def test_whatever_changes_features_changes_the_key(folder, other):
    assert key_of(folder, **other) != key_of(folder)


def test_nothing_else_changes_the_key(folder):
    same = {"batch_size": 5, "num_workers": 1, "shots": 1, "val_fraction": 0.4, "split_seed": 3}
    retrained = {"change": lambda net: net.backbone.fc.weight.data.add_(1)}
    torch.manual_seed(7)
    assert key_of(folder, **same, **retrained) == key_of(folder)


def test_a_changed_file_changes_the_key_of_its_own_row_only(folder):
    before = [key_of(folder, rows=[row]) for row in range(2)]
    path = folder / ImageTable(root=str(folder)).read_table().paths[0]
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert [key_of(folder, rows=[row]) == key for row, key in enumerate(before)] == [False, True]


def test_processes_find_the_same_key(folder, monkeypatch):
    monkeypatch.setattr(keys, "KEY_ROWS", 2)
    here = key_of(folder, rows=(0, 1, 2, 5))
    monkeypatch.setattr(keys, "PARALLEL_FROM", 1)
    monkeypatch.setattr(keys, "usable_cores", lambda: 2)
    assert key_of(folder, rows=(0, 1, 2, 5)) == here


def test_rendered_images_enter_the_key_by_their_pixels():
    """Their paths are the same in every world."""
    net, rows = build_net(None, ARCHITECTURE)[0], np.arange(40)
    sets = [{}, {}, {"world": 1}, {"role": "target", "similarity": 0.95}, {"role": "target", "similarity": 0.9}]
    found = [feature_key(net, synthetic(**settings), rows) for settings in sets]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def slowed(monkeypatch, seconds, log):
    """Let every batch take some time, and note each extraction in a file."""
    read = studied._read_batches

    def slow(*arguments):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        for batch in read(*arguments):
            time.sleep(seconds)
            yield batch

    monkeypatch.setattr(studied, "_read_batches", slow)


def test_killed_processes_leave_nothing_that_looks_finished(cache, tmp_path, monkeypatch):
    data, rows, groups = synthetic(), np.arange(50), ["stem", "stage4"]
    slowed(monkeypatch, 0.05, tmp_path / "log")
    rng, killed = random.Random(0), 0
    task = partial(extract_features, None, data, rows, backbone=ARCHITECTURE, groups=groups, batch_size=2)
    for _ in range(5):
        child = FORK.Process(target=task)
        child.start()
        deadline = time.monotonic() + 20
        while not list(cache.glob("*/.stem.*.tmp.npy")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        assert not list(cache.glob("*/s*.npy"))
    assert killed == 5
    assert list(cache.glob("*/.stem.*.tmp.npy"))
    found = task()
    np.testing.assert_allclose(found["stage4"].values, bare_loop(data, rows), atol=1e-5)
    assert {path.name for path in cache.glob("*/*")} == {"lock", "stem.npy", "stage4.npy"}


def test_processes_that_want_the_same_extract_it_once(cache, tmp_path, monkeypatch):
    data, rows, log = synthetic(), np.arange(50), tmp_path / "log"
    slowed(monkeypatch, 0.02, log)
    task = partial(extract_features, None, data, rows, backbone=ARCHITECTURE, batch_size=5)
    children = [FORK.Process(target=task) for _ in range(3)]
    for step in ("start", "join"):
        for child in children:
            getattr(child, step)()
    assert [child.exitcode for child in children] == [0] * 3
    assert len(log.read_text().splitlines()) == 1
    monkeypatch.delattr(studied, "_read_batches")  # whatever extracts now fails
    found = task()["stage4"]
    np.testing.assert_allclose(found.values, bare_loop(data, rows), atol=1e-5)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[:30], lambda content: b""])
def test_a_damaged_file_is_made_anew(cache, damage):
    data, rows = synthetic(), np.arange(5)
    expected = np.array(extract_features(None, data, rows, backbone=ARCHITECTURE)["stage4"].values)
    (path,) = cache.glob("*/stage4.npy")
    path.write_bytes(damage(path.read_bytes()))
    found = extract_features(None, data, rows, backbone=ARCHITECTURE)["stage4"].values
    np.testing.assert_array_equal(found, expected)


def test_features_that_are_not_finite_name_the_first_image(cache, folder, monkeypatch):
    data = ImageTable(root=str(folder), image_size=16)
    normalise = build_net(None, ARCHITECTURE)[0].normalise

    def poisoned(self, batch):
        values = normalise(batch)
        values[2:4] = np.nan
        return values

    monkeypatch.setattr("lightning_modules.classification.Classification.normalise", poisoned)
    rows = np.array([5, 4, 3, 2, 1, 0])
    with pytest.raises(DataError, match=rf"{data.read_table().paths[3]} and 1 more of 6 images"):
        extract_features(None, data, rows, backbone=ARCHITECTURE)
    assert {path.name for path in cache.glob("*/*")} == {"lock"}


def test_a_full_disk_and_a_cache_that_is_no_folder(cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"do not fit on the disk(.|\n)*FARSHOT_CACHE"):
        extract_features(None, synthetic(), np.arange(5), backbone=ARCHITECTURE)
    assert {path.name for path in cache.glob("*/*")} == {"lock"}
    monkeypatch.setenv("FARSHOT_CACHE", str(next(cache.glob("*/lock"))))
    with pytest.raises(DataError, match="cannot be written"):
        extract_features(None, synthetic(), np.arange(5), backbone=ARCHITECTURE)


@pytest.mark.parametrize("rows", [[], [0.5], [[1]], [True], [-1], [50]])
def test_impossible_rows(rows):
    with pytest.raises(DataError, match=r"rows of type|has no row (-1|50)"):
        extract_features(None, synthetic(), np.array(rows), backbone=ARCHITECTURE)


def test_the_architecture_comes_from_the_weights_or_the_user(cache, tmp_path):
    weights = str(tmp_path / "net.safetensors")
    safetensors.torch.save_file(create_backbone(ARCHITECTURE, 0).state_dict(), weights)
    data, rows = synthetic(), np.arange(4)
    found = extract_features(weights, data, rows, backbone=ARCHITECTURE)["stage4"]
    assert found.weights_hash == weights_hash(weights)
    np.testing.assert_allclose(found.values, bare_loop(data, rows, weights), atol=1e-5)
    for source, problem in ((weights, "do not say which net"), (None, "no weights and no net")):
        with pytest.raises(DataError, match=problem):
            extract_features(source, data, rows)
    net = build_net(weights, ARCHITECTURE)[0]
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": net.hyper_parameters()}, tmp_path / "run.ckpt")
    same = extract_features(str(tmp_path / "run.ckpt"), data, rows)["stage4"]
    np.testing.assert_array_equal(same.values, found.values)
    assert len(list(cache.iterdir())) == 1  # the same net from another file
    with pytest.raises(DataError, match="are of test_resnet, not of test_vit"):
        extract_features(str(tmp_path / "run.ckpt"), data, rows, backbone="test_vit")
