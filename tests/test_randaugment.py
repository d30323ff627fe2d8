"""RandAugment and random erasing: torchvision's own result under the same seed, and nothing else disturbed."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from datamodules.dataset import BatchDataset, keep_batch
from datamodules.randaugment import IMAGENET_MEAN, IMAGENET_STD, RandAugment, RandomErasing, torch_seed
from datamodules.transforms import POLICIES, create_transform

BOTH = ["inception_crop_randaugment", "entezari2023"]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def generator(seed):
    return np.random.Generator(np.random.Philox(key=seed))


def entezari_augment():
    return POLICIES["entezari2023"](64, True).finish[0]


@pytest.mark.parametrize("shape", [(3, 57, 64), (1, 64, 57), (3, 331, 331)])
def test_equal_to_torchvision_under_the_same_seed(shape):
    planes = noise(*shape)
    ours, theirs = RandAugment(9, 30), v2.RandAugment(num_ops=2, magnitude=9)
    for seed in range(60 if shape[1] < 100 else 20):
        output = ours(planes, generator(seed))
        torch.manual_seed(int(generator(seed).integers(1 << 32)))
        np.testing.assert_array_equal(output, theirs(torch.from_numpy(planes)).numpy())


@pytest.mark.parametrize("augment", [RandAugment(9, 30), entezari_augment(), RandomErasing(0.5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_decides_and_the_input_stays(augment, channels):
    planes = noise(channels, 48, 40)
    before = planes.copy()
    outputs = [augment(planes, generator(seed)) for seed in range(40)]
    np.random.seed(0)
    torch.manual_seed(0)
    for seed in reversed(range(40)):
        output = augment(planes, generator(seed))
        np.testing.assert_array_equal(output, outputs[seed])
        assert output.dtype == np.uint8
        assert output.shape == planes.shape
        assert output.flags.c_contiguous
    np.testing.assert_array_equal(planes, before)
    assert len({output.tobytes() for output in outputs}) > 15


def test_seeds_that_differ_in_their_upper_half_differ():
    # Torch's CPU generator ignores the upper 32 bits of its seed.
    transform = create_transform("inception_crop_randaugment", 32, train=True)
    image = noise(40, 40, 3)
    assert len({transform(image, seed << 32).tobytes() for seed in range(20)}) >= 19


@pytest.mark.parametrize("policy", BOTH)
def test_no_global_generator_moves(policy):
    import random

    transform = create_transform(policy, 32, train=True)
    image = noise(40, 50, 3)
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    torch.rand(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for seed in range(30):
        transform(image, seed)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert torch.initial_seed() == 11


def draw_and_fail():
    with torch_seed(3):
        raise ZeroDivisionError(torch.rand(2))


def test_the_state_comes_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), before)


class Spy:
    """Records what torchvision is told to apply."""

    def __init__(self, augment, monkeypatch):
        self.calls = []
        for inner in augment._augment.values():
            monkeypatch.setattr(inner, "_apply_image_or_video_transform", self.apply)

    def apply(self, image, name, magnitude, **_):
        self.calls.append((name, magnitude))
        return image


def test_operations_are_drawn_evenly(monkeypatch):
    augment = RandAugment(9, 30)
    spy = Spy(augment, monkeypatch)
    planes = noise(3, 8, 8)
    for seed in range(3000):
        augment(planes, generator(seed))
    names = [name for name, _ in spy.calls]
    assert len(names) == 6000
    counts = {name: names.count(name) for name in v2.RandAugment._AUGMENTATION_SPACE}
    assert len(counts) == 14
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    # The two operations of an image are independent: each pair as often as another.
    pairs = np.zeros((14, 14))
    order = list(counts)
    for first, second in zip(names[::2], names[1::2], strict=True):
        pairs[order.index(first), order.index(second)] += 1
    assert stats.chi2_contingency(pairs).pvalue > 1e-4
    angles = np.array([magnitude for name, magnitude in spy.calls if name == "Rotate"])
    np.testing.assert_allclose(np.abs(angles), 9, rtol=1e-6)
    assert 0.35 < (angles > 0).mean() < 0.65


def test_entezari_applies_half_of_the_operations_at_nine_of_ten(monkeypatch):
    augment = entezari_augment()
    spy = Spy(augment, monkeypatch)
    planes = noise(3, 8, 8)
    applied = []
    for seed in range(3000):
        before = len(spy.calls)
        augment(planes, generator(seed))
        applied.append(len(spy.calls) - before)
    assert stats.chisquare(np.bincount(applied), [750, 1500, 750]).pvalue > 1e-4
    # Magnitude 9 +- 0.5 of 10, cut at 10: 30 degrees are the most.
    angles = np.abs([magnitude for name, magnitude in spy.calls if name == "Rotate"])
    assert abs(angles.mean() - 27) < 0.6
    assert 1.1 < angles.std() < 1.8
    assert 0.005 < (angles > 29.999).mean() < 0.09


def test_what_lies_outside_shows_the_mean_colour():
    white = np.full((3, 64, 64), 255, np.uint8)
    augment = RandAugment(9, 10, interpolation="bilinear", fill=(124.0, 116.0, 104.0))
    corners = {tuple(augment(white, generator(seed))[:, 0, 0].tolist()) for seed in range(80)}
    assert (124, 116, 104) in corners
    grey = {int(augment(white[:1], generator(seed))[0, 0, 0]) for seed in range(80)}
    assert 115 in grey or 114 in grey


def boxes(erasing, planes, seeds):
    """(height, width, top, left) of what was erased, None where nothing was; planes must be constant."""
    found = []
    for seed in range(seeds):
        changed = (erasing(planes, generator(seed)) != planes).any(axis=0)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        if len(rows) == 0:
            found.append(None)
            continue
        found.append((np.ptp(rows) + 1, np.ptp(columns) + 1, rows[0], columns[0]))
    return found


def test_erasing_probability_area_aspect_and_place():
    # 1 never comes out of the noise where it is clipped to 0 or drawn around 114, or hardly ever.
    planes = np.full((3, 100, 120), 1, np.uint8)
    found = boxes(RandomErasing(0.25), planes, 2000)
    erased = np.array([box for box in found if box is not None], dtype=float)
    low, high = stats.binom.interval(0.9999, 2000, 0.25)
    assert low <= len(erased) <= high
    height, width, top, left = erased.T
    area, aspect = height * width / 12_000, height / width
    assert 0.018 < area.min() < 0.04
    assert 0.3 < area.max() < 1 / 3 + 0.01
    assert 0.28 < aspect.min() < 0.4
    assert 2.7 < aspect.max() < 3.5
    # Rejection of what does not fit thins out extreme aspects of large areas only; small ones are as drawn.
    small = area < 0.2
    uniform = stats.uniform(math.log(0.3), 2 * math.log(1 / 0.3))
    assert stats.kstest(np.log(aspect[small]), uniform.cdf).pvalue > 1e-4
    assert stats.kstest(top / (100 - height + 1), "uniform").pvalue > 1e-6
    assert stats.kstest(left / (120 - width + 1), "uniform").pvalue > 1e-6
    assert (top + height).max() == 100
    assert top.min() == 0


def test_erased_pixels_are_noise_around_the_mean_colour():
    planes = np.full((3, 200, 200), 255, np.uint8)
    erasing = RandomErasing(1.0, area=(0.5, 0.5), aspect=(1.0, 1.0))
    output = erasing(planes, generator(0))
    changed = (output != 255).any(axis=0)
    pixels = output[:, changed].astype(float)
    assert pixels.shape[1] == pytest.approx(20_000, rel=0.02)
    # The standard normal on the normalised scale, rounded and clipped: compare with its exact moments.
    for channel in range(3):
        levels = np.arange(256)
        edges = np.concatenate([[-np.inf], levels[1:] - 0.5, [np.inf]])
        share = np.diff(stats.norm(IMAGENET_MEAN[channel], IMAGENET_STD[channel]).cdf(edges))
        mean = (levels * share).sum()
        std = math.sqrt(((levels - mean) ** 2 * share).sum())
        assert abs(pixels[channel].mean() - mean) < 5 * std / math.sqrt(20_000)
        assert pixels[channel].std() == pytest.approx(std, rel=0.03)
    assert abs(np.corrcoef(pixels)[np.triu_indices(3, 1)]).max() < 0.05


def test_a_rectangle_that_cannot_fit_leaves_the_image():
    for shape in ((1, 1, 1), (3, 1, 50)):
        planes = noise(*shape)
        for seed in range(20):
            np.testing.assert_array_equal(RandomErasing(1.0)(planes, generator(seed)), planes)


@pytest.mark.parametrize("policy", BOTH)
def test_evaluation_is_that_of_inception_crop(policy):
    image = noise(60, 90, 3)
    expected = create_transform("inception_crop", 32, train=False)(image, 0)
    np.testing.assert_array_equal(create_transform(policy, 32, train=False)(image, 5), expected)


@pytest.mark.parametrize("policy", BOTH)
def test_batches_are_the_same_for_any_number_of_workers(policy):
    images = noise(12, 40, 40, 3)
    dataset = BatchDataset(
        lambda rows: [images[row] for row in rows], create_transform(policy, 32, train=True), np.arange(12)
    )
    keys = [[(row, 1000 + row, row) for row in range(first, first + 4)] for first in (0, 4, 8)]
    batches = {}
    for workers in (0, 2):
        torch.manual_seed(workers)
        loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=keep_batch)
        batches[workers] = torch.cat([batch["image"] for batch in loader])
    assert batches[0].dtype == torch.uint8
    assert torch.equal(batches[0], batches[2])
