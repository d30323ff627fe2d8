"""NT-Xent and InfoNCE against loops in float64 and analytic cases; scales; bad input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.contrastive_losses import LARGEST_SCALE, clamp_log_scale_, clamped_scale, info_nce, nt_xent
from lightning_modules.errors import ModelError


def pairs(n, width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return (3 * first).to(dtype), (first + 0.5 * second).to(dtype)


def cosine(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def slow_nt_xent(first, second, temperature):
    """Equation 1 of the paper, one term after the other."""
    views = np.concatenate([first.numpy(), second.numpy()])
    n, total = len(first), 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        own = math.exp(cosine(views[i], views[partner]) / temperature)
        others = sum(math.exp(cosine(views[i], views[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(own / others)
    return total / (2 * n)


def slow_info_nce(images, texts, scale):
    images, texts = images.numpy(), texts.numpy()
    n, total = len(images), 0.0
    for i in range(n):
        own = math.exp(scale * cosine(images[i], texts[i]))
        total -= math.log(own / sum(math.exp(scale * cosine(images[i], texts[k])) for k in range(n)))
        total -= math.log(own / sum(math.exp(scale * cosine(images[k], texts[i])) for k in range(n)))
    return total / (2 * n)


@pytest.mark.parametrize("n", [2, 3, 17])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_losses_equal_the_sums_of_their_definitions(n, temperature):
    first, second = pairs(n)
    assert nt_xent(first, second, temperature).item() == pytest.approx(slow_nt_xent(first, second, temperature))
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    assert info_nce(first, second, scale).item() == pytest.approx(slow_info_nce(first, second, 1 / temperature))


def test_equal_embeddings_leave_only_chance():
    same = torch.ones(7, 5)
    assert nt_xent(same, 2 * same, 0.1).item() == pytest.approx(math.log(2 * 7 - 1))
    assert info_nce(same, 2 * same, torch.tensor(10.0)).item() == pytest.approx(math.log(7))


def test_orthogonal_pairs_have_a_closed_form():
    n, temperature = 6, 0.4
    basis = torch.eye(n, dtype=torch.float64)
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    simclr = -1 / temperature + math.log(math.exp(1 / temperature) + 2 * n - 2)
    clip = -1 / temperature + math.log(math.exp(1 / temperature) + n - 1)
    assert nt_xent(basis, 3 * basis, temperature).item() == pytest.approx(simclr)
    assert info_nce(basis, 3 * basis, scale).item() == pytest.approx(clip)


def test_gradients_are_those_of_finite_differences():
    first, second = (side.requires_grad_() for side in pairs(4, width=3))
    log_scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (first, second))
    assert torch.autograd.gradcheck(lambda a, b, s: info_nce(a, b, clamped_scale(s)), (first, second, log_scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    first, second = (side.requires_grad_() for side in pairs(8, dtype=dtype))
    exact = [side.detach().float() for side in (first, second)]
    scale = torch.tensor(20.0)
    for loss in (lambda a, b: nt_xent(a, b, 0.05), lambda a, b: info_nce(a, b, scale)):
        value = loss(first, second)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(*exact).item(), rel=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(first, second), value)
        value.backward()
        assert first.grad.dtype == dtype
        assert first.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30])
def test_losses_stay_finite_at_tiny_temperatures(temperature):
    first, second = (side.requires_grad_() for side in pairs(8, dtype=torch.float32))
    for loss in (nt_xent(first, second, temperature), info_nce(first, second, torch.tensor(1 / temperature))):
        gradients = torch.autograd.grad(loss, (first, second))
        assert all(value.isfinite().all() for value in (loss, *gradients))


def test_a_dead_projection_gives_a_finite_loss():
    first, second = pairs(4, dtype=torch.float32)
    first[1] = 0
    first.requires_grad_()
    loss = nt_xent(first, second, 0.1)
    loss.backward()
    assert loss.isfinite()
    assert first.grad.isfinite().all()


def test_scale_is_bounded_and_can_come_back():
    large = nn.Parameter(torch.tensor(1e5))
    scale = clamped_scale(large)
    assert scale.item() == pytest.approx(LARGEST_SCALE, rel=1e-5)
    # Every pair is matched wrongly, so that the loss asks for a smaller scale.
    images = torch.eye(4)
    info_nce(images, images.roll(1, 0), scale).backward()
    assert 0 < large.grad.item() < math.inf
    clamp_log_scale_(large)
    assert large.exp().item() == pytest.approx(LARGEST_SCALE, rel=1e-5)
    small = nn.Parameter(torch.tensor(math.log(14.0)))
    clamp_log_scale_(small)
    assert clamped_scale(small).item() == small.exp().item() == pytest.approx(14.0)


def test_both_clamps_take_another_bound():
    parameter = nn.Parameter(torch.tensor(5.0))
    assert clamped_scale(parameter, largest=8.0).item() == pytest.approx(8.0)
    clamp_log_scale_(parameter, largest=8.0)
    assert parameter.item() == pytest.approx(math.log(8.0))


@pytest.mark.parametrize("n", [0, 1])
def test_a_single_pair_has_no_negatives(n):
    one = torch.ones(n, 3)
    for loss in (lambda: nt_xent(one, one, 0.1), lambda: info_nce(one, one, torch.tensor(10.0))):
        with pytest.raises(ModelError, match=f"{n} pair.*no negatives"):
            loss()


def test_bad_arguments_are_named():
    first, second = pairs(4)
    with pytest.raises(ModelError, match=r"\(4, 6\) and \(3, 6\)"):
        nt_xent(first, second[:3], 0.1)
    with pytest.raises(ModelError, match=r"\(4, 6\) and \(4, 5\)"):
        info_nce(first, second[:, :5], torch.tensor(1.0))
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ModelError, match="temperature"):
            nt_xent(first, second, temperature)
