"""Mixup and the losses against loops over cells, scipy and analytic cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.errors import ModelError
from lightning_modules.losses import cross_entropy, masked_bce
from lightning_modules.mixup import mixup

NAN = float("nan")


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def basis_images(size):
    """Image i is 1 in column i and 0 elsewhere, so a mixed image shows its partner and its weight."""
    return torch.eye(size).view(size, 1, 1, size)


def test_images_and_targets_share_one_weight_and_one_permutation():
    torch.manual_seed(3)
    size = 12
    images, targets = mixup(basis_images(size), torch.arange(size), alpha=1.0, num_classes=size + 2)
    rows = images.view(size, size)
    torch.testing.assert_close(targets[:, :size], rows)
    assert targets.shape == (size, size + 2)
    assert torch.equal(targets[:, size:], torch.zeros(size, 2))
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(size))
    torch.testing.assert_close(rows.sum(dim=0), torch.ones(size))  # every image is somebody's partner once
    own = rows.diagonal()
    weights = own[own < 1]  # images that are not their own partner
    assert len(weights) > size // 2
    torch.testing.assert_close(weights, weights[0].expand_as(weights))


def draw_weights(alpha, count):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        images, _ = mixup(basis_images(8).double(), torch.arange(8), alpha, 8, generator)
        own = images.view(8, 8).diagonal()
        yield float(own.min())  # 1 for images that are their own partner, the weight for all others


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_the_weight_is_beta_distributed(alpha):
    weights = list(draw_weights(alpha, 400))
    assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_a_tiny_alpha_picks_one_of_the_two():
    weights = list(draw_weights(1e-4, 200))
    assert all(min(weight, 1 - weight) < 1e-3 for weight in weights)
    assert 70 <= sum(weights) <= 130


def test_torchs_seed_governs_the_draw_and_a_generator_replaces_it():
    images, targets = torch.randn(6, 3, 2, 2), torch.arange(6)
    torch.manual_seed(0)
    first = mixup(images, targets, 0.5, 6)
    second = mixup(images, targets, 0.5, 6)
    torch.manual_seed(0)
    again = mixup(images, targets, 0.5, 6)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])
    state = torch.get_rng_state()
    alone = [mixup(images, targets, 0.5, 6, torch.Generator().manual_seed(9))[0] for _ in range(2)]
    assert torch.equal(*alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cell_unknown_in_either_partner_is_unknown():
    torch.manual_seed(1)
    size = 40
    images = torch.eye(size).view(size, 1, 1, size)
    targets = torch.randint(0, 2, (size, 5)).float()
    targets[torch.rand(size, 5) < 0.3] = NAN
    mixed, soft = mixup(images, targets, 1.0, 5)
    rows = mixed.view(size, size)
    for row in range(size):
        shares = {int(partner): float(rows[row, partner]) for partner in rows[row].nonzero()}
        for label in range(5):
            expected = sum(share * float(targets[partner, label]) for partner, share in shares.items())
            assert float(soft[row, label]) == pytest.approx(expected, nan_ok=True, abs=1e-6)
    assert soft.isnan().sum() > targets.isnan().sum()


def test_alpha_zero_changes_nothing_and_draws_nothing():
    images, targets = torch.randn(4, 1, 2, 2), torch.arange(4)
    state = torch.get_rng_state()
    mixed, same = mixup(images, targets, 0.0, 4)
    assert mixed is images
    assert same is targets
    assert torch.equal(torch.get_rng_state(), state)


def test_mixup_names_what_it_cannot_mix():
    images, targets = torch.randint(0, 255, (4, 1, 2, 2), dtype=torch.uint8), torch.arange(4)
    with pytest.raises(ModelError, match=r"images are torch\.uint8"):
        mixup(images, targets, 0.1, 4)
    with pytest.raises(ModelError, match=r"alpha is -0\.1"):
        mixup(images.float(), targets, -0.1, 4)


def slow_bce(logits, targets):
    cells = []
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        if not math.isnan(target):
            probability = 1 / (1 + math.exp(-logit))
            cells.append(-target * math.log(probability) - (1 - target) * math.log(1 - probability))
    return sum(cells) / len(cells)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_bce_averages_the_known_cells(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, 5, dtype=dtype)).requires_grad_()
    targets = torch.rand(6, 5)
    targets[torch.rand(6, 5) < 0.4] = NAN
    loss = masked_bce(logits, targets)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(slow_bce(logits.detach(), targets), rel=1e-5)
    loss.backward()
    known = ~targets.isnan()
    expected = torch.where(known, (logits.detach().sigmoid() - targets) / known.sum(), 0.0)
    torch.testing.assert_close(logits.grad, expected.to(dtype), rtol=1e-5, atol=1e-7)


def test_masked_bce_without_labels_is_zero_and_so_is_its_gradient():
    logits = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss = masked_bce(logits, torch.full((1, 2), NAN))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(1, 2))


def test_masked_bce_does_not_hide_a_diverged_model():
    assert masked_bce(torch.tensor([[NAN, 1.0]]), torch.tensor([[1.0, NAN]])).isnan()


def test_masked_bce_neither_indexes_nor_waits():
    logits, targets = torch.randn(4, 3, requires_grad=True), torch.tensor([[0.0, NAN, 1.0]]).repeat(4, 1)
    with Operations() as operations:
        masked_bce(logits, targets).backward()
    assert not {"_local_scalar_dense", "nonzero", "index", "masked_select", "is_nonzero"} & set(operations.names)
    with pytest.raises(ValueError, match="size"):
        masked_bce(torch.randn(4, 1), torch.zeros(4))  # must not broadcast to (4, 4)


def test_losses_of_halves_are_computed_in_float32():
    logits = torch.tensor([[12.0, -3.0, 0.5]], dtype=torch.bfloat16)
    targets = torch.tensor([[1.0, 0.0, NAN]])
    torch.testing.assert_close(masked_bce(logits, targets), masked_bce(logits.float(), targets), rtol=0, atol=0)
    soft = torch.tensor([[0.3, 0.3, 0.4]])
    torch.testing.assert_close(cross_entropy(logits, soft), cross_entropy(logits.float(), soft), rtol=0, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_takes_classes_and_probabilities(label_smoothing):
    torch.manual_seed(0)
    logits, classes = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    soft = (1 - label_smoothing) * F.one_hot(classes, 4) + label_smoothing / 4
    log_probabilities = (logits.exp() / logits.exp().sum(dim=1, keepdim=True)).log()
    expected = -(soft * log_probabilities).sum(dim=1).mean()
    torch.testing.assert_close(cross_entropy(logits, classes, label_smoothing), expected)
    torch.testing.assert_close(cross_entropy(logits, soft.float()), expected, rtol=1e-6, atol=1e-6)


def test_cross_entropy_of_mixed_targets_is_the_mixture_of_losses():
    torch.manual_seed(0)
    logits, first, second = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2]), torch.tensor([1, 1, 1, 0, 3])
    mixed = 0.3 * F.one_hot(first, 4).float() + 0.7 * F.one_hot(second, 4).float()
    expected = 0.3 * cross_entropy(logits, first) + 0.7 * cross_entropy(logits, second)
    torch.testing.assert_close(cross_entropy(logits, mixed), expected)
