"""AGC against a slow version that visits every unit, against timm, under mixed precision and Lightning."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.errors import ModelError
from lightning_modules.optimizers import SGDAGC, agc_parameter_groups, layer_decay_groups, scale_rates

SHAPES = [(4, 3, 2, 2), (5,), (3, 7), (), (1, 1, 6), (8, 2, 3), (2,)]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def make_parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = [1.0, 0.0, 1e-4, 2.0, 0.1, 1.0, 5.0]
    return [
        nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for scale, shape in zip(scales, SHAPES, strict=True)
    ]


def set_gradients(parameters, step):
    """Norms on both sides of the bound: from a thousandth of the weights' scale to a thousand times."""
    generator = torch.Generator().manual_seed(100 + step)
    for place, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim >= 2:
            gradient *= 10.0 ** torch.linspace(-3, 0, len(parameter)).view(-1, *[1] * (parameter.ndim - 1))
        parameter.grad = (gradient * 10.0 ** (place % 3 - 2)).to(parameter.dtype)


def slow_clip(weight, gradient, clip_factor, eps):
    """The definition, unit by unit, in Python floats."""
    if weight.ndim >= 2:
        rows = [slow_clip(w.flatten(), g.flatten(), clip_factor, eps) for w, g in zip(weight, gradient, strict=True)]
        return torch.stack(rows).reshape(weight.shape)
    weight_norm = sum(float(value) ** 2 for value in weight.flatten()) ** 0.5
    gradient_norm = sum(float(value) ** 2 for value in gradient.flatten()) ** 0.5
    bound = clip_factor * max(weight_norm, eps)
    return gradient * (bound / gradient_norm) if gradient_norm > bound else gradient.clone()


def slow_steps(parameters, steps, *, lr, momentum, nesterov, weight_decay, clip_factor=0.01, eps=1e-3):
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(steps):
        set_gradients(parameters, step)
        for place, parameter in enumerate(parameters):
            weight = parameter.detach()
            direction = slow_clip(weight, parameter.grad, clip_factor, eps) + weight_decay * weight
            velocities[place] = momentum * velocities[place] + direction
            if momentum:
                direction = direction + momentum * velocities[place] if nesterov else velocities[place]
            parameter.data = weight - lr * direction


def take_steps(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_the_loop_over_units(dtype, tolerance, momentum, nesterov, weight_decay):
    options = {"lr": 0.3, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    ours, slow = make_parameters(dtype), make_parameters(dtype)
    take_steps(SGDAGC(ours, **options), ours, 4)
    slow_steps(slow, 4, **options)
    for mine, other, start in zip(ours, slow, make_parameters(dtype), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        assert not torch.equal(mine, start)


def test_clips_as_timm_does():
    ours, theirs = make_parameters(), make_parameters()
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    before = [parameter.grad.clone() for parameter in ours]
    SGDAGC(ours, lr=0.1).step()
    adaptive_clip_grad(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-9)
    changed = torch.cat([(p.grad != b).flatten() for p, b in zip(ours, before, strict=True)])
    assert changed.any()
    assert not changed.all()


def test_rescales_to_the_bound_and_adds_weight_decay_after_clipping():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]]))
    weight.grad = torch.tensor([[0.0, 100.0], [1.0, 0.0], [0.03, 0.0]])
    SGDAGC([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.5, clip_factor=0.01, eps=1e-3).step()
    expected = torch.tensor([[1.5, 2.0 - 0.05], [-1e-5, 0.0], [1.5 - 0.03, 2.0]])  # bounds 0.05, 1e-5 and 0.05
    torch.testing.assert_close(weight.detach(), expected)


def test_zero_gradients_stay_and_non_finite_ones_show():
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    SGDAGC([weight], lr=1.0).step()
    assert torch.equal(weight[0].detach(), torch.ones(2))
    assert weight[1:, 0].isnan().all()


def test_groups_without_agc_are_plain_sgd():
    ours, theirs = make_parameters(), make_parameters()
    take_steps(SGDAGC([{"params": ours, "agc": False}], lr=0.1, weight_decay=0.01), ours, 3)
    take_steps(torch.optim.SGD(theirs, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), theirs, 3)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_options_differ_by_group():
    first, second = make_parameters()[:3], make_parameters()[3:]
    optimizer = SGDAGC(first, lr=0.1)
    optimizer.add_param_group({"params": second, "lr": 0.0, "clip_factor": 0.02})
    take_steps(optimizer, first + second, 1)
    start = make_parameters()
    assert not torch.equal(first[0], start[0])
    assert all(torch.equal(mine, old) for mine, old in zip(second, start[3:], strict=True))
    assert [group["clip_factor"] for group in optimizer.param_groups] == [0.01, 0.02]


def test_the_closure_runs_with_gradients_and_its_loss_comes_back():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = SGDAGC([weight], lr=0.1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (weight < 1).all()


def test_frozen_and_unused_parameters_do_not_crash():
    """The paper's AGC fails on parameters whose grad is None."""
    parameters = make_parameters()
    frozen, unused, *others = parameters
    frozen.requires_grad_(False)
    optimizer = SGDAGC(parameters, lr=0.1)
    optimizer.step()
    set_gradients(others, 0)
    optimizer.step()
    start = make_parameters()
    assert torch.equal(frozen, start[0])
    assert torch.equal(unused, start[1])
    assert not torch.equal(others[0], start[2])


def test_a_parameter_that_joins_late_gets_its_own_momentum():
    together, apart = make_parameters(), make_parameters()
    optimizer = SGDAGC(together, lr=0.1)
    set_gradients(together, 0)
    together[2].grad = None
    optimizer.step()
    take_steps(optimizer, together, 2, start=1)
    alone = SGDAGC([apart[2]], lr=0.1)
    for step in (1, 2):
        set_gradients(apart, step)
        alone.step()
    torch.testing.assert_close(together[2], apart[2])


def test_the_classifier_is_known_by_identity_and_not_by_width():
    """The paper's code exempts every weight that is as wide as the head, and never the head's bias."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].weight.requires_grad_(False)
    body, head = agc_parameter_groups(model, model[2].parameters())
    assert [id(p) for p in body["params"]] == [id(p) for p in (model[0].bias, *model[1].parameters())]
    assert [id(p) for p in head["params"]] == [id(p) for p in model[2].parameters()]
    assert (body["agc"], head["agc"]) == (True, False)

    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    SGDAGC([body, head], lr=1.0, momentum=0.0, nesterov=False).step()
    assert torch.equal(model[0].weight, before[0].weight)
    moved = [(new - old).abs().max().item() for new, old in zip(model.parameters(), before.parameters(), strict=True)]
    assert max(moved[1:4]) < 0.05
    assert moved[4:] == pytest.approx([1.0, 1.0])


def test_empty_groups_are_left_out_and_strangers_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    assert [group["agc"] for group in agc_parameter_groups(model, [])] == [True]
    model[0].requires_grad_(False)
    assert [group["agc"] for group in agc_parameter_groups(model, model[1].parameters())] == [False]
    with pytest.raises(ModelError, match="2 of 2 classifier parameters"):
        agc_parameter_groups(model, nn.Linear(3, 4).parameters())


@pytest.mark.parametrize("make", [SGDAGC, torch.optim.SGD, torch.optim.AdamW])
def test_layers_learn_at_rates_of_their_own(make):
    """lr × decay^(distance from the classifier), whatever is clipped, frozen or scheduled."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    model[1].bias.requires_grad_(False)
    layers = [[*model[0].parameters(), *model[1].parameters()], model[2].parameters(), model[3].parameters()]
    groups = layer_decay_groups(agc_parameter_groups(model, model[4].parameters()), layers, 0.5)
    optimizer = make(groups, lr=0.8)
    scale_rates(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        rates = {id(p): (group["lr"], group["agc"]) for group in optimizer.param_groups for p in group["params"]}
        for layer, distance in enumerate((3, 3, 2, 1, 0)):
            for parameter in model[layer].parameters():
                expected = (pytest.approx(0.8 * 0.5**distance / (1 + step)), distance > 0)
                assert rates.get(id(parameter)) == (expected if parameter.requires_grad else None)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_impossible_decays_are_named(decay):
    with pytest.raises(ModelError, match=f"layer decay is {decay}"):
        layer_decay_groups([], [], decay)


def test_few_operations_and_no_wait_for_the_device():
    parameters = [nn.Parameter(torch.randn(4, 3, 3, 3)) for _ in range(20)]
    parameters += [nn.Parameter(torch.randn(4)) for _ in range(40)]
    optimizer = SGDAGC(parameters, lr=0.1, weight_decay=0.1)
    take_steps(optimizer, parameters, 1)
    set_gradients(parameters, 1)
    with Operations() as operations:
        optimizer.step()
    assert len(operations.names) <= 3 * 20 + 20
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(operations.names)


@pytest.mark.parametrize("where", ["gradient", "momentum"])
def test_memory_formats_may_differ(where):
    """The fused kernel walks raw memory: with unequal layouts it would update the wrong elements."""
    expected, weights = [torch.nn.Parameter(torch.arange(24.0).reshape(2, 3, 2, 2)) for _ in range(2)]
    reference = SGDAGC([expected], lr=0.1)
    take_steps(reference, [expected], 1)
    weights.data = weights.data.to(memory_format=torch.channels_last)
    optimizer = SGDAGC([weights], lr=0.1)
    if where == "gradient":
        take_steps(optimizer, [weights], 1)
    else:
        weights.data.copy_(expected.data)
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for step in (1, 2):
        for parameter, owner in ((expected, reference), (weights, optimizer)):
            set_gradients([parameter], step)
            if where == "momentum":
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            owner.step()
    torch.testing.assert_close(weights.detach().contiguous(), expected.detach())


def test_a_1x1_convolution_in_channels_last_keeps_the_fused_kernel():
    weight = nn.Parameter(torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last))
    weight.grad = torch.randn(4, 3, 1, 1).contiguous()
    assert weight.stride() != weight.grad.stride()
    with Operations() as operations:
        SGDAGC([weight], lr=0.1).step()
    assert "_fused_sgd_" in operations.names


def test_halves_are_clipped_by_norms_that_do_not_overflow():
    weight = nn.Parameter(torch.full((1, 4), 8.0, dtype=torch.float16))
    weight.grad = torch.full((1, 4), 6e4, dtype=torch.float16)  # norm 1.2e5 > 65,504
    SGDAGC([weight], lr=1.0, momentum=0.0, nesterov=False, clip_factor=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((1, 4), 4.0, dtype=torch.float16))


def scaled_update(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = SGDAGC(agc_parameter_groups(model, model[2].parameters()), lr=0.1, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 5)).square().mean() * 10
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return [new.detach() - old for new, old in zip(model.parameters(), before, strict=True)]


def test_the_update_does_not_depend_on_the_loss_scale():
    for small, large in zip(scaled_update(1.0), scaled_update(65_536.0), strict=True):
        torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-9)
        assert small.abs().max() > 0


def test_does_not_claim_to_unscale():
    assert not SGDAGC(make_parameters(), lr=0.1)._step_supports_amp_scaling


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)
        self.norms = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def on_before_zero_grad(self, optimizer):
        if self.layer.weight.grad is not None:
            parts = [parameter.grad.flatten() for parameter in self.layer.parameters()]
            self.norms.append(torch.cat(parts).norm().item())

    def configure_optimizers(self):
        return SGDAGC([{"params": list(self.layer.parameters()), "agc": False}], lr=1e-3)


def test_lightning_clips_by_norm_under_a_loss_scale(tmp_path):
    model = Regression()
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[precision],
        gradient_clip_val=1e-3,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    before = model.layer.weight.detach().clone()
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4))
    assert not torch.equal(model.layer.weight, before)
    assert model.norms == pytest.approx([1e-3] * len(model.norms), rel=1e-2)
    assert model.norms


def test_a_restored_state_continues_identically(tmp_path):
    whole, first = make_parameters(), make_parameters()
    take_steps(SGDAGC(whole, lr=0.1, weight_decay=0.01), whole, 6)

    optimizer = SGDAGC(first, lr=0.1, weight_decay=0.01)
    take_steps(optimizer, first, 3)
    torch.save({"weights": first, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = state["weights"]
    resumed = SGDAGC(second, lr=9.0)
    resumed.load_state_dict(state["optimizer"])
    take_steps(resumed, second, 3, start=3)
    for mine, other in zip(second, whole, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": 0.0}, "Nesterov needs momentum"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"clip_factor": 0.0}, "clip_factor is 0.0"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ModelError, match=message):
        SGDAGC(make_parameters(), **{"lr": 0.1, **options})
    optimizer = SGDAGC(make_parameters(), lr=0.1)
    with pytest.raises(ModelError, match=message):
        optimizer.add_param_group({"params": make_parameters(seed=1), **options})
