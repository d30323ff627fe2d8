"""Transfer protocols: their phases, depths and rates, against plain loops and runs that do the same another way."""

import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import nn

from datamodules.synthetic import Synthetic
from lightning_modules.backbones.factory import create_backbone
from lightning_modules.backbones.layers import layer_groups
from lightning_modules.classification import Classification
from lightning_modules.errors import ModelError
from lightning_modules.optimizers import SGDAGC
from lightning_modules.phases import probe_length, within_phase
from lightning_modules.schedules import (
    ConstantSchedule,
    HyperRuleSchedule,
    RunLength,
    WarmupCosine,
    WarmupStep,
)

ROOT = Path(__file__).parent.parent
TRANSFER = ROOT / "configs" / "transfer"
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
OPTIMIZERS = {
    "sgd-agc": partial(SGDAGC, lr=0.05, weight_decay=0.01),
    "sgd": SGD,
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a net with BatchNorm whose statistics have moved, and of one with LayerNorm; no branch is 0."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("test_resnet", "test_convnext")):
        torch.manual_seed(seed)
        model = create_backbone(name, 5).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            model(torch.randn(8, 3, 64, 64))
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return {path.stem: str(path) for path in folder.iterdir()}


def build(files, backbone="test_resnet", **arguments):
    torch.manual_seed(3)
    arguments = {"optimizer": SGD, "weights": files[backbone], "task": "multiclass", **arguments}
    return Classification(backbone, num_classes=3, **arguments)


class Watch(pl.Callback):
    """Keeps what happened at each step; stops after step `stop` with a checkpoint at `path`, as a killed run would."""

    def __init__(self, stop, path):
        self.stop, self.path = stop, path
        self.batches, self.states, self.rates, self.optimizer_states = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((batch["image"], batch["label"]))
        self.states.append({name: value.clone() for name, value in pl_module.backbone.state_dict().items()})
        names = {id(parameter): name for name, parameter in pl_module.backbone.named_parameters()}
        self.optimizer_states.append({names[id(parameter)] for parameter in trainer.optimizers[0].state})
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        names = {id(parameter): name for name, parameter in pl_module.backbone.named_parameters()}
        self.rates.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})


def fit(model, steps, *, stop=None, path=None, resume=None, epochs=-1, trainer=None, **data):
    """Fit on generated images; returns what happened, step by step."""
    data = {"num_train": 70, "num_test": 9, "classes": 3, "image_size": 32, "batch_size": 16, **data}
    watch = Watch(stop, path)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, **(trainer or {})},
        max_steps=steps,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[watch],
    )
    trainer.fit(model, datamodule=Synthetic(**data), ckpt_path=resume)
    return watch


def moved(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("arguments", "protocol", "frozen"),
    [
        ({"weights": None}, "scratch", 0),
        ({"transfer_depth": 0}, "scratch", 0),
        ({"transfer_depth": 0, "probe_fraction": 0.5}, "scratch", 0),
        ({}, "finetune", 0),
        ({"transfer_depth": 5, "layer_decay": 0.7}, "finetune", 0),
        ({"frozen_depth": -1}, "linear_probe", 5),
        ({"backbone": "test_convnext", "frozen_depth": -1, "granularity": "block"}, "linear_probe", 10),
        ({"probe_fraction": 0.5}, "lp_ft", 0),
        ({"probe_fraction": 0.5, "transfer_depth": 3, "frozen_depth": 2}, "lp_ft", 2),
        ({"transfer_depth": 3}, "depth", 0),
        ({"backbone": "test_convnext", "transfer_depth": 5, "granularity": "block"}, "depth", 0),
        ({"frozen_depth": 2}, "depth", 2),
    ],
)
def test_arguments_amount_to_a_protocol(weights, arguments, protocol, frozen):
    model = build(weights, **arguments)
    described = model.describe()
    assert (described["protocol"], described["frozen_depth"]) == (protocol, frozen)
    whole = None if "weights" in arguments else len(layer_groups(model.backbone, model.granularity))
    assert described["transfer_depth"] == arguments.get("transfer_depth", whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe_fraction": 1.0}, "probe_fraction is 1.0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"weights": None, "frozen_depth": 1}, "frozen_depth 1 without weights"),
        ({"frozen_depth": -1, "probe_fraction": 0.5}, "both phases are the same"),
        ({"transfer_depth": 2, "frozen_depth": 3}, "exceeds the 2 layer groups from the weights"),
        ({"transfer_depth": 6}, "no depth of 6"),
        ({"transfer_depth": 6, "granularity": "block"}, r"0 \(none\) to 5: stem, block1"),
        ({"granularity": "fine"}, "granularity is 'fine'"),
        ({"task": "multilabel", "label_smoothing": 0.1}, "label_smoothing 0.1 with multilabel labels would do nothing"),
    ],
)
def test_impossible_protocols_are_named(weights, arguments, message):
    with pytest.raises(ModelError, match=message):
        build(weights, **arguments)


def test_two_phases_need_two_steps(weights):
    assert [probe_length(total, 0.5) for total in (2, 3, 4, 500)] == [1, 2, 2, 250]
    assert [probe_length(10, fraction) for fraction in (0.01, 0.99)] == [1, 9]
    run = RunLength(total_steps=10, steps_per_epoch=2, global_batch=8, train_size=16)
    assert [within_phase(step, 4, run)[0] for step in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert [within_phase(step, 4, run)[1].total_steps for step in (3, 4)] == [4, 6]
    with pytest.raises(ModelError, match="1 step has no room"):
        fit(build(weights, probe_fraction=0.5), 1)


# Head and depth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "resnetv2_50x1_bit", "test_vit"])
def test_a_zero_head_changes_the_classifier_alone(backbone):
    models = []
    for head_init in ("default", "zero"):
        torch.manual_seed(0)
        models.append(Classification(backbone, num_classes=3, task="multiclass", head_init=head_init).backbone)
    default, zero = (model.state_dict() for model in models)
    head = {name for name, value in zero.items() if value.shape[:1] == (3,) and name.endswith(("weight", "bias"))}
    assert len(head) == 2
    assert moved(default, zero) <= head
    assert not any(zero[name].any() for name in head)
    assert any(default[name].any() for name in head)


def test_a_depth_within_a_stage_trains_what_it_should(weights):
    """7 blocks from the weights, 4 of them fixed; the classifier and the rest as fresh as from scratch."""
    arguments = {"backbone": "test_convnext", "granularity": "block"}
    model = build(weights, transfer_depth=7, frozen_depth=4, **arguments)
    given, random = (
        torch.load(weights["test_convnext"], weights_only=True),
        build(weights, transfer_depth=0, **arguments),
    )
    groups = layer_groups(model.backbone, "block")
    inside, fixed = ({name for group in groups[:depth] for name in group.tensors} for depth in (7, 4))
    start = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    for name, value in start.items():
        assert torch.equal(value, given[name] if name in inside else random.backbone.state_dict()[name]), name
    after = fit(model, 3).states[-1]
    assert moved(start, after) == set(start) - fixed


# Frozen groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("depth", [2, -1])
def test_frozen_tensors_are_bit_identical_also_after_a_resume(weights, tmp_path, depth, optimizer):
    arguments = {"frozen_depth": depth, "optimizer": optimizer, "layer_decay": 0.5}
    given = torch.load(weights["test_resnet"], weights_only=True)
    assert len(fit(build(weights, **arguments), 6, stop=3, path=tmp_path / "last.ckpt").states) == 3
    resumed = build(weights, **arguments)
    states = fit(resumed, 6, resume=tmp_path / "last.ckpt").states
    assert len(states) == 3
    groups = layer_groups(resumed.backbone)
    frozen = {name for group in groups[: resumed.frozen_depth] for name in group.tensors}
    assert "bn1.num_batches_tracked" in frozen
    assert given["bn1.num_batches_tracked"] == 1  # the weights' own step stays, too
    assert moved(given | {"fc.weight": 0 * states[-1]["fc.weight"], "fc.bias": torch.zeros(3)}, states[-1]) == (
        set(given) - frozen
    )
    whole = fit(build(weights, **arguments), 6).states
    assert not moved(whole[-1], states[-1])


# Layer-wise rates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["coarse", "block"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_rate_in_effect_falls_with_the_distance_from_the_classifier(weights, optimizer, granularity):
    schedule = WarmupCosine(warmup_steps=2)
    arguments = {"layer_decay": 0.6, "frozen_depth": 2, "granularity": granularity, "lr_scheduler": schedule}
    model = build(weights, "test_convnext", optimizer=optimizer, **arguments)
    watch = fit(model, 6)
    base, groups = optimizer.keywords["lr"], layer_groups(model.backbone, granularity)
    run = RunLength(total_steps=6, steps_per_epoch=3, global_batch=16, train_size=63)
    distance = {name: len(groups) - place for place, group in enumerate(groups) for name in group.parameters}
    frozen = {name for group in groups[:2] for name in group.parameters}
    for step, rates in enumerate(watch.rates):
        assert set(rates) == {name for name, _ in model.backbone.named_parameters()} - frozen
        for name, rate in rates.items():
            expected = base * schedule.factor(step, run) * 0.6 ** distance.get(name, 0)
            assert rate == pytest.approx(expected, rel=1e-12), (name, step)
    assert {name for name in rates if name not in distance} == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize("stop", [2, 4, 6, 8])
def test_rates_survive_a_resume_in_either_phase(weights, tmp_path, stop):
    arguments = {"layer_decay": 0.6, "lr_scheduler": WarmupCosine(warmup_steps=3), "probe_fraction": 0.5}
    whole = fit(build(weights, **arguments), 8)
    first = fit(build(weights, **arguments), 8, stop=stop, path=tmp_path / "last.ckpt")
    rest = fit(build(weights, **arguments), 8, resume=tmp_path / "last.ckpt")
    assert first.rates + rest.rates == whole.rates
    assert not moved(whole.states[-1], (first.states + rest.states)[-1])


def test_a_decay_scales_what_a_step_does(weights):
    """Without momentum and clipping a step is −rate × gradient, whatever the optimizer's groups say."""
    changes = []
    for decay in (None, 0.5):
        model = build(weights, optimizer=partial(torch.optim.SGD, lr=0.1), layer_decay=decay)
        start = {name: value.double() for name, value in model.backbone.state_dict().items()}
        after = fit(model, 1).states[-1]
        changes.append({name: after[name].double() - start[name] for name in start})
    groups = layer_groups(model.backbone)
    distance = {name: len(groups) - place for place, group in enumerate(groups) for name in group.parameters}
    for name, change in changes[0].items():
        assert change.any()
        torch.testing.assert_close(changes[1][name], change * 0.5 ** distance.get(name, 0), rtol=1e-3, atol=1e-7)


# Two phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    ("schedule", "alone"),
    [
        (WarmupCosine(warmup_steps=2), WarmupCosine(warmup_steps=2)),
        (WarmupStep(warmup_epochs=0.5, milestones=[1]), WarmupStep(warmup_epochs=0.5, milestones=[1])),
        (HyperRuleSchedule(length=8), HyperRuleSchedule(length=4)),
    ],
)
def test_the_first_phase_is_a_linear_probe_bit_by_bit(weights, optimizer, schedule, alone):
    arguments = {"optimizer": optimizer, "mixup_alpha": 0.4, "layer_decay": 0.7}
    both = fit(build(weights, probe_fraction=0.5, lr_scheduler=schedule, **arguments), 8)
    probe = fit(build(weights, frozen_depth=-1, lr_scheduler=alone, **arguments), 4)
    for mine, other in zip(both.states[:4], probe.states, strict=True):
        assert not moved(mine, other)
    assert [rates["fc.weight"] for rates in both.rates[:4]] == [rates["fc.weight"] for rates in probe.rates]
    assert both.optimizer_states[:4] == probe.optimizer_states == [{"fc.weight", "fc.bias"}] * 4
    assert moved(both.states[0], both.states[3]) == {"fc.weight", "fc.bias"}
    # From the fifth step on everything moves, running statistics included.
    assert moved(both.states[3], both.states[-1]) == set(both.states[0])


def test_both_phases_are_what_a_plain_loop_does(weights):
    """The head by an optimizer of its own, then everything by a new one: no momentum or decay crosses the boundary."""
    schedule = WarmupCosine(warmup_steps=1)
    model = build(weights, "test_convnext", probe_fraction=0.5, frozen_depth=1, lr_scheduler=schedule)
    net = build(weights, "test_convnext").backbone
    watch = fit(model, 6)
    run = RunLength(total_steps=3, steps_per_epoch=3, global_batch=16, train_size=63)
    everything = [parameter for name, parameter in net.named_parameters() if not name.startswith("stem.")]
    for start, trained in ((0, list(net.head.fc.parameters())), (3, everything)):
        optimizer = SGD(trained)
        for step in range(3):
            image, label = watch.batches[start + step]
            optimizer.param_groups[0]["lr"] = 0.05 * schedule.factor(step, run)
            optimizer.zero_grad()
            net.zero_grad()
            nn.functional.cross_entropy(net(model.normalise(image)), label).backward()
            optimizer.step()
            for name, value in net.state_dict().items():
                torch.testing.assert_close(watch.states[start + step][name], value, rtol=1e-5, atol=1e-7)


def test_a_run_from_scratch_has_one_phase(weights):
    """So a study's protocol lp_ft has its partner from scratch."""
    arguments = {"weights": None, "lr_scheduler": WarmupCosine(warmup_steps=2)}
    one, other = (fit(build(weights, probe_fraction=share, **arguments), 4) for share in (None, 0.5))
    assert one.rates == other.rates
    assert not moved(one.states[-1], other.states[-1])


def test_phases_are_counted_in_optimizer_steps(weights):
    """Two device batches a step: the boundary lies between steps, and the phases have the same lengths."""
    model = build(weights, probe_fraction=0.5)
    watch = fit(model, 4, max_batch_per_device=8)
    assert len(watch.states) == 8
    backbone = [{name for name in moved(a, b) if not name.startswith("fc.")} for a, b in pairwise(watch.states)]
    parameters = {name for name, _ in model.backbone.named_parameters() if not name.startswith("fc.")}
    assert not any(backbone[:3])
    assert [bool(names & parameters) for names in backbone[3:]] == [False, True, False, True]


# Schedules and presets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"probe_fraction": 0.5}], ids=["finetune", "lp_ft"])
@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSchedule(),
        WarmupStep(warmup_epochs=15, milestones=[30, 60, 80]),
        WarmupCosine(warmup_epochs=15),
        WarmupCosine(warmup_steps=500),
        HyperRuleSchedule(length=6),
    ],
)
def test_a_one_shot_run_reaches_its_rate(weights, schedule, arguments):
    """3 images, one step an epoch: every phase trains at the full rate at some step."""
    model = build(weights, lr_scheduler=schedule, **arguments)
    rates = [rates["fc.weight"] for rates in fit(model, -1, epochs=6, shots=1).rates]
    assert len(rates) == 6
    phases = [rates[:3], rates[3:]] if arguments else [rates]
    assert [max(phase) for phase in phases] == [0.05] * len(phases)


def test_a_preset_goes_through_the_command_line(weights, run_cli, tmp_path):
    code, _, err = run_cli(
        *("fit", "--config", ROOT / "configs/trainer/cpu.yaml", "--config", ROOT / "configs/data/synthetic.yaml"),
        *("--config", TRANSFER / "hyperrule_bit.yaml", "--runs_dir", tmp_path, "--run", "a", "--wandb", "off"),
        *("--model.init_args.weights", weights["test_resnet"], "--model.init_args.backbone", "test_resnet"),
        *("--model.init_args.lr_scheduler.init_args.length", "2", "--data.init_args.shots", "1"),
        *("--data.init_args.image_size", "16", "--trainer.enable_progress_bar", "false"),
    )
    assert (code, err) == (0, "")
    written = yaml.safe_load((tmp_path / "hyperrule_bit/a/config.yaml").read_text())
    own = yaml.safe_load((TRANSFER / "hyperrule_bit.yaml").read_text())
    assert written["data"]["init_args"]["batch_size"] == 512
    assert written["data"]["init_args"]["transform"] == own["data"]["init_args"]["transform"]
    rule = written["model"]["init_args"]["lr_scheduler"]["init_args"]
    assert {**own["model"]["init_args"]["lr_scheduler"]["init_args"], "length": 2, "reference_batch": None} == rule


# Several devices -----------------------------------------------------------------------------------------------------


def fit_both_phases(files, path, **trainer):
    model = build(files, "test_convnext", probe_fraction=0.5, optimizer=partial(SGDAGC, lr=0.5))
    fit(model, 4, stop=4, path=path, trainer=trainer)


@pytest.mark.timeout(300)
def test_two_processes_share_the_gradients_of_both_phases(weights, tmp_path):
    """DDP learns of parameters when it wraps the net: those that train later must be reduced, too."""
    fit_both_phases(weights, tmp_path / "one.ckpt")
    # Forks of a process that has trained nothing: autograd's threads, where there are any, do not survive a fork.
    command = [sys.executable, "-m", "tests.test_protocols", weights["test_convnext"], str(tmp_path / "two.ckpt")]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{run}.ckpt", weights_only=True)["state_dict"] for run in ("one", "two"))
    for name, value in torch.load(weights["test_convnext"], weights_only=True).items():
        if not name.startswith("head.fc"):
            change = (one[f"backbone.{name}"] - value).norm()
            assert change > 0, name
            assert (two[f"backbone.{name}"] - one[f"backbone.{name}"]).norm() < 0.05 * change, name


if __name__ == "__main__":
    fit_both_phases({"test_convnext": sys.argv[1]}, sys.argv[2], devices=2, strategy="ddp_fork")
