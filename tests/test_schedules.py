"""Schedules against the published tables, torch's schedulers and the BiT rule written out step by step."""

import dataclasses
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR

from lightning_modules.errors import ModelError
from lightning_modules.schedules import (
    ConstantSchedule,
    HyperRule,
    HyperRuleSchedule,
    RunLength,
    Schedule,
    WarmupCosine,
    WarmupStep,
    bit_hyperrule,
)

CONFIGS = Path(__file__).parent.parent / "configs" / "transfer"
RUN = RunLength(total_steps=900, steps_per_epoch=10, global_batch=512, train_size=100)


def make_optimizer(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, optimizer, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def bit_rate(step, supports):
    """The rule as its paper tells it: the rate of one step, None after the end."""
    rate = 1.0
    if step < supports[0]:
        return step / supports[0]
    if step >= supports[-1]:
        return None
    for support in supports[1:]:
        if step > support:
            rate /= 10
    return rate


@pytest.mark.parametrize(
    ("train_size", "supports", "mixup_alpha"),
    [
        (1, [100, 200, 300, 400, 500], 0.0),
        (19_999, [100, 200, 300, 400, 500], 0.0),
        (20_000, [500, 3000, 6000, 9000, 10000], 0.1),
        (499_999, [500, 3000, 6000, 9000, 10000], 0.1),
        (500_000, [500, 6000, 12000, 18000, 20000], 0.1),
    ],
)
def test_the_hyperrule_is_its_table(train_size, supports, mixup_alpha):
    rule = bit_hyperrule(train_size)
    assert [rule.warmup, *rule.decays, rule.total] == supports
    assert rule.mixup_alpha == mixup_alpha
    steps = {0, 1, supports[-1] - 1} | {max(support + d, 0) for support in supports[:-1] for d in (-1, 0, 1)}
    for step in steps:
        assert rule.factor(step) == pytest.approx(bit_rate(step, supports))
    assert rule.factor(rule.total) == pytest.approx(1e-3)


def test_mixup_of_the_hyperrule_can_start_elsewhere():
    assert bit_hyperrule(5_000, mixup_from=5_000).mixup_alpha == 0.1
    assert bit_hyperrule(50_000, mixup_from=60_000).mixup_alpha == 0.0


@pytest.mark.parametrize("train_size", [100, 100_000, 1_000_000])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 6, 7, 11, 50, 500, 1234, 100_000])
def test_a_scaled_rule_keeps_its_shape(train_size, total):
    rule = bit_hyperrule(train_size)
    scaled = rule.scaled(total)
    steps = [scaled.warmup, *scaled.decays, scaled.total]
    assert scaled.total == total
    assert scaled.warmup >= 1
    assert scaled.mixup_alpha == rule.mixup_alpha
    if total >= 5:
        assert all(earlier < later for earlier, later in pairwise(steps))
        originals = [rule.warmup, *rule.decays]
        for step, original in zip(steps, originals, strict=False):
            assert step == pytest.approx(original * total / rule.total, abs=1.5)
    if total >= 2:
        assert scaled.warmup < total
        assert scaled.factor(scaled.warmup) == 1.0
    assert rule.scaled(rule.total) == rule


def test_late_decays_of_a_scaled_rule_still_come_before_its_end():
    assert HyperRule(1, (98, 99), 100, 0.0).scaled(5).decays == (3, 4)


def test_linear_warmup_starts_at_the_given_fraction():
    schedule = WarmupStep(warmup_epochs=15, milestones=[30, 60, 80], warmup_start=1 / 64)
    assert schedule.factor(0, RUN) == pytest.approx(1 / 64)
    assert schedule.factor(75, RUN) == pytest.approx((1 / 64 + 1) / 2)
    increments = [schedule.factor(step + 1, RUN) - schedule.factor(step, RUN) for step in range(150)]
    assert increments == pytest.approx([(1 - 1 / 64) / 150] * 150)
    assert schedule.factor(150, RUN) == 1.0


def test_steps_fall_where_torch_lets_them_fall():
    schedule = WarmupStep(warmup_epochs=0, milestones=[30, 60, 80], gamma=0.2)
    optimizer = make_optimizer()
    expected = rates(MultiStepLR(optimizer, [300, 600, 800], gamma=0.2), optimizer, 900)
    assert [schedule.factor(step, RUN) for step in range(900)] == pytest.approx(expected)


def test_cosine_is_torchs_cosine():
    schedule = WarmupCosine(final=0.1)
    optimizer = make_optimizer()
    expected = rates(CosineAnnealingLR(optimizer, T_max=900, eta_min=0.1), optimizer, 900)
    assert [schedule.factor(step, RUN) for step in range(900)] == pytest.approx(expected)


def test_cosine_after_warmup_spans_the_rest_of_the_run():
    for schedule in (WarmupCosine(warmup_epochs=10), WarmupCosine(warmup_steps=100)):
        assert schedule.factor(50, RUN) == pytest.approx(0.5)
        assert schedule.factor(100, RUN) == 1.0
        assert schedule.factor(500, RUN) == pytest.approx(0.5)
        assert schedule.factor(900, RUN) == pytest.approx(0.0)
        assert schedule.factor(901, RUN) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSchedule(),
        WarmupStep(warmup_epochs=15, milestones=[30]),
        WarmupCosine(warmup_steps=500),
        WarmupCosine(warmup_epochs=15),
        HyperRuleSchedule(),
        HyperRuleSchedule(length=3_000),
        HyperRuleSchedule(boundaries=((499, 500), (1, 2), (1, 2))),
    ],
)
@pytest.mark.parametrize("train_size", [1, 30_000])
@pytest.mark.parametrize("total_steps", [*range(1, 13), 40, 499])
def test_every_run_reaches_the_peak_by_its_middle(schedule, total_steps, train_size):
    run = RunLength(total_steps=total_steps, steps_per_epoch=1, global_batch=8, train_size=train_size)
    factors = [schedule.factor(step, run) for step in range(total_steps)]
    assert max(factors) == 1.0
    assert factors.index(1.0) <= total_steps // 2


@pytest.mark.parametrize("schedule", [WarmupStep(warmup_epochs=15, milestones=[30]), WarmupCosine(warmup_steps=500)])
@pytest.mark.parametrize("total_steps", [1, 2, 5, 40])
def test_a_warmup_takes_at_most_half_of_the_run(schedule, total_steps):
    run = RunLength(total_steps=total_steps, steps_per_epoch=10, global_batch=8, train_size=100)
    assert [schedule.factor(step, run) for step in range(total_steps)].index(1.0) == total_steps // 2


def test_a_run_shorter_than_its_table_gets_the_table_in_proportion():
    for total in (5, 50, 250):
        run = RunLength(total_steps=total, steps_per_epoch=1, global_batch=8, train_size=100)
        rule = bit_hyperrule(100).scaled(total)
        for schedule in (HyperRuleSchedule(), HyperRuleSchedule(length=400), HyperRuleSchedule(length=total)):
            assert [schedule.factor(step, run) for step in range(total)] == [rule.factor(step) for step in range(total)]


def test_linear_scaling_multiplies_every_schedule():
    for schedule in (
        ConstantSchedule(reference_batch=256),
        WarmupStep(0, [1000], reference_batch=256),
        HyperRuleSchedule(reference_batch=256),
    ):
        assert schedule.factor(150, RUN) == 2.0
    assert ConstantSchedule().factor(3, RUN) == 1.0
    assert WarmupCosine(reference_batch=1024).factor(0, RUN) == 0.5


def test_hyperrule_schedule_follows_its_rule():
    own, short = HyperRuleSchedule(), HyperRuleSchedule(length=50)
    run = RunLength(total_steps=500, steps_per_epoch=1, global_batch=32, train_size=100)
    rule = bit_hyperrule(100)
    assert [own.factor(step, run) for step in range(501)] == [rule.factor(step) for step in range(501)]
    assert own.plan(100) == rule
    assert short.plan(100) == rule.scaled(50)
    assert ConstantSchedule().plan(100) is None
    large = RunLength(total_steps=10_000, steps_per_epoch=1, global_batch=32, train_size=20_000)
    assert own.factor(250, large) == 0.5
    assert [short.factor(step, run) for step in (5, 10, 20, 21, 41)] == pytest.approx([0.5, 1, 1, 0.1, 1e-3])


def test_every_constant_of_the_hyperrule_is_an_argument():
    schedule = HyperRuleSchedule(
        sizes=(10, 50), boundaries=((2, 4, 6), (3, 9, 12), (5, 20)), gamma=0.5, mixup_alpha=0.3, mixup_from=50
    )
    assert schedule.plan(9) == HyperRule(2, (4,), 6, 0.0, 0.5)
    assert schedule.plan(49) == HyperRule(3, (9,), 12, 0.0, 0.5)
    assert schedule.plan(50) == HyperRule(5, (), 20, 0.3, 0.5)
    run = RunLength(total_steps=6, steps_per_epoch=1, global_batch=1, train_size=9)
    assert [schedule.factor(step, run) for step in range(6)] == [0, 0.5, 1, 1, 1, 0.5]
    assert replace(schedule, length=60).plan(9) == HyperRule(20, (40,), 60, 0.0, 0.5)


@pytest.mark.parametrize("name", ["bit", "cherti2022"])
def test_presets_write_every_constant_out(name):
    config = yaml.safe_load((CONFIGS / f"hyperrule_{name}.yaml").read_text())
    given = config["model"]["init_args"]
    rule = given["lr_scheduler"]["init_args"]
    assert set(rule) == {field.name for field in dataclasses.fields(HyperRuleSchedule)} - {"length", "reference_batch"}
    tables = tuple(tuple(table) for table in rule["boundaries"])
    schedule = HyperRuleSchedule(**{**rule, "sizes": tuple(rule["sizes"]), "boundaries": tables})
    for size in (1, 19_999, 20_000, 499_999, 500_000):
        assert schedule.plan(size) == bit_hyperrule(size)
    optimizer = given["optimizer"]["init_args"]
    facts = (optimizer.pop("lr"), optimizer.pop("momentum"), optimizer.pop("nesterov"), optimizer.pop("weight_decay"))
    found = (*facts, given["head_init"], config["data"]["init_args"]["batch_size"], optimizer)
    if name == "bit":
        assert found == (0.003, 0.9, False, 0.0, "zero", 512, {})
    else:
        assert found == (0.001, 0.9, True, 0.0, "default", 128, {"clip_factor": 0.01, "eps": 0.001})


def test_lambda_lr_runs_a_schedule():
    schedule = WarmupStep(warmup_epochs=1, milestones=[2], reference_batch=256)
    optimizer = make_optimizer(lr=0.1)
    seen = rates(LambdaLR(optimizer, lambda step: schedule.factor(step, RUN)), optimizer, 30)
    assert [seen[0], seen[5], seen[10], seen[19], seen[20]] == pytest.approx([0, 0.1, 0.2, 0.2, 0.02])


def take_schedule(schedule: Schedule) -> Schedule:
    return schedule


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("class_path: ConstantSchedule", ConstantSchedule()),
        (
            "class_path: WarmupStep\ninit_args: {warmup_epochs: 5, milestones: [30, 60], reference_batch: 8}",
            WarmupStep(5.0, [30.0, 60.0], reference_batch=8),
        ),
        (
            "class_path: WarmupCosine\ninit_args: {warmup_steps: 500, final: 0.1}",
            WarmupCosine(0.0, 500, 0.0, 0.1),
        ),
        ("class_path: HyperRuleSchedule\ninit_args: {length: 50}", HyperRuleSchedule(50)),
        (
            "class_path: HyperRuleSchedule\ninit_args: {sizes: [9], boundaries: [[1, 2], [3, 4, 5]], gamma: 0.5}",
            HyperRuleSchedule(sizes=(9,), boundaries=((1, 2), (3, 4, 5)), gamma=0.5),
        ),
    ],
)
def test_yaml_names_a_schedule_by_its_class(tmp_path, lines, expected):
    path = tmp_path / "schedule.yaml"
    path.write_text("schedule:\n" + "".join(f"  {line}\n" for line in lines.split("\n")))
    schedule = jsonargparse.auto_cli(take_schedule, args=[f"--config={path}"], as_positional=False)
    assert type(schedule) is type(expected)
    assert schedule == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunLength(-1, 10, 8, 80), "total_steps is -1"),
        (lambda: RunLength(math.inf, 10, 8, 80), "total_steps is inf"),
        (lambda: RunLength(10, 0, 8, 80), "steps_per_epoch is 0"),
        (lambda: bit_hyperrule(0), "train_size is 0"),
        (lambda: HyperRule(100, (50,), 500, 0.0), "do not ascend"),
        (lambda: bit_hyperrule(10).scaled(0), "length is 0"),
        (lambda: RunLength(10, 10, 8, 0), "train_size is 0"),
        (lambda: HyperRuleSchedule(length=0), "length is 0"),
        (lambda: HyperRuleSchedule(sizes=(500, 20)), r"sizes is \[500, 20\]"),
        (lambda: HyperRuleSchedule(sizes=(9,)), "number of boundaries' tables is 3"),
        (lambda: HyperRuleSchedule(sizes=(), boundaries=((5, 3),)), "do not ascend"),
        (lambda: HyperRuleSchedule(sizes=(9,), boundaries=((1, 2), (5, 3))), "do not ascend"),
        (lambda: HyperRuleSchedule(sizes=(), boundaries=((5,),)), r"boundaries \[5\]"),
        (lambda: HyperRuleSchedule(gamma=0.0), "gamma is 0.0"),
        (lambda: HyperRuleSchedule(mixup_alpha=-1.0), "mixup_alpha is -1.0"),
        (lambda: WarmupStep(15, [15, 30]), r"milestones is \[15, 30\]"),
        (lambda: ConstantSchedule(reference_batch=0), "reference_batch is 0"),
        (lambda: WarmupStep(-1, []), "warmup_epochs is -1"),
        (lambda: WarmupStep(1, [], gamma=0.0), "gamma is 0.0"),
        (lambda: WarmupStep(1, [], warmup_start=1.5), "warmup_start is 1.5"),
        (lambda: WarmupCosine(warmup_epochs=1, warmup_steps=5), "warmup_steps is 5"),
        (lambda: WarmupCosine(final=-0.1), "final is -0.1"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ModelError, match=message):
        make()
