"""SimCLR's views: every operation is torchvision's, every draw has its distribution, and so have the outputs."""

import inspect
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision import transforms as tv
from torchvision.transforms import functional as F

from benchmarks.simclr_views import describe, difference, ours, photos, sample, theirs, torchvision_views
from datamodules import colour, simclr_views
from datamodules.randaugment import torch_seed
from datamodules.simclr_views import (
    ColourJitter,
    RandomFlip,
    RandomGaussianBlur,
    RandomGrey,
    RandomResizedCrop,
    RandomRotation,
    blur,
)
from datamodules.transforms import POLICIES, create_transform

SIMCLR = ["simclr", "simclr_cifar", "simclr_chest_xray"]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def generator(seed):
    return np.random.Generator(np.random.Philox(key=seed))


@pytest.fixture(scope="module")
def pictures():
    """Two real photos and noise, which has every colour, as (150, 200, 3)."""
    return [np.ascontiguousarray(photo[100:250, 100:300]) for photo in load_sample_images().images] + [
        noise(150, 200, 3)
    ]


def gap(ours, theirs):
    """Mean and largest difference in grey levels."""
    difference = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    return difference.mean(), difference.max()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.2, 0.61, 1.0, 1.37, 1.8])
def test_light_and_saturation_are_torchvisions(pictures, name, factor):
    for picture in pictures:
        mine = getattr(colour, f"adjust_{name}")(picture, factor)
        mean, largest = gap(mine, getattr(F, f"adjust_{name}")(Image.fromarray(picture), factor))
        # Pillow rounds the grey of each pixel before it mixes, we do not.
        assert mean < (0.3 if name == "saturation" else 0.05)
        assert largest <= 1
        if name != "saturation":
            single = picture[..., :1]
            pillow = getattr(F, f"adjust_{name}")(Image.fromarray(single[..., 0]), factor)
            mine = getattr(colour, f"adjust_{name}")(single, factor)
            assert mine.shape == single.shape
            assert gap(mine[..., 0], pillow)[1] <= 1


@pytest.mark.parametrize("turns", [-0.5, -0.2, -0.07, 0.0, 0.1, 0.2, 0.5])
def test_hue_is_torchvisions_and_nearer_to_the_exact_turn(pictures, turns):
    for picture, limit in zip(pictures, (1.0, 2.0, 2.5), strict=True):  # noise has the strongest colours
        mine = colour.adjust_hue(picture, turns)
        assert gap(mine, F.adjust_hue(Image.fromarray(picture), turns))[0] < limit
        hsv = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + 360 * turns) % 360
        assert np.abs(mine - 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).mean() < 1


def test_hue_turns_the_colour_circle_by_its_share():
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    # One of 256 hues is 6 levels wide.
    for turns, expected in ((1 / 3, [0, 255, 0]), (-1 / 3, [0, 0, 255]), (0.5, [0, 255, 255]), (0.0, [255, 0, 0])):
        assert np.abs(colour.adjust_hue(red, turns).astype(int) - expected).max() <= 6


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.8, 1.3, 2.0])
def test_blur_is_torchvisions(pictures, sigma):
    for picture in pictures:
        planes = np.ascontiguousarray(picture.transpose(2, 0, 1))
        mine = blur(planes, sigma, 11).transpose(1, 2, 0)
        mean, largest = gap(mine, F.gaussian_blur(Image.fromarray(picture), 23, sigma))
        assert mean < 0.05
        assert largest <= 1
        # A kernel that is cut short.
        assert (
            gap(blur(planes, sigma, 1).transpose(1, 2, 0), F.gaussian_blur(Image.fromarray(picture), 3, sigma))[1] <= 1
        )
    flat = np.full((1, 30, 30), 255, np.uint8)
    assert (blur(flat, sigma, 5) == 255).all()


def test_rotation_is_torchvisions_apart_from_the_border(pictures):
    step = RandomRotation(10)
    for picture in pictures[:2]:
        angle = generator(3).uniform(-10, 10)
        mine = step(np.ascontiguousarray(picture.transpose(2, 0, 1)), generator(3)).transpose(1, 2, 0)
        pillow = np.asarray(F.rotate(Image.fromarray(picture), angle, tv.InterpolationMode.BILINEAR))
        assert gap(mine[30:-30, 30:-30], pillow[30:-30, 30:-30])[0] < 1
        unturned = gap(mine[30:-30, 30:-30], picture[30:-30, 30:-30])[0]
        assert unturned > 5
        assert (mine == 0).all(axis=2).mean() > 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_is_pillows_resize_of_its_box(pictures, channels):
    step = RandomResizedCrop(64)
    for picture in pictures:
        planes = np.ascontiguousarray(picture.transpose(2, 0, 1)[:channels])
        for seed in range(12):
            top, left, height, width = step.draw(150, 200, generator(seed))
            image = Image.fromarray(planes.transpose(1, 2, 0).squeeze())
            pillow = F.resized_crop(image, top, left, height, width, [64, 64], antialias=True)
            mine = step(planes, generator(seed))
            mean, largest = gap(mine.transpose(1, 2, 0).squeeze(), pillow)
            assert mean < 0.05
            assert largest <= 1


@pytest.mark.parametrize("smallest", [0.08, 0.3])
@pytest.mark.parametrize("shape", [(375, 500), (60, 300), (300, 60)])
def test_boxes_are_distributed_as_torchvisions(shape, smallest):
    step, random = RandomResizedCrop(32, smallest), generator(0)
    mine = np.array([step.draw(*shape, random) for _ in range(700)])
    image = Image.new("L", shape[::-1])
    with torch_seed(0):
        pillow = [tv.RandomResizedCrop.get_params(image, [smallest, 1.0], [3 / 4, 4 / 3]) for _ in range(700)]
    pillow = np.array(pillow)
    for column in range(4):
        assert stats.ks_2samp(mine[:, column], pillow[:, column]).pvalue > 1e-4
    shares = mine[:, 2] * mine[:, 3] / np.prod(shape)
    assert stats.ks_2samp(shares, pillow[:, 2] * pillow[:, 3] / np.prod(shape)).pvalue > 1e-4
    if shape == (375, 500):  # the others fall back to a box that may be smaller
        assert smallest <= shares.min() + 0.01 < smallest + 0.03
        assert (mine[:, 0] + mine[:, 2]).max() == 375
        assert (mine[:, 1] + mine[:, 3]).max() == 500


def spy(monkeypatch, *names):
    """Record (name, strength) of every change of colour."""
    calls = []
    for name in names:
        monkeypatch.setattr(
            colour, f"adjust_{name}", lambda image, strength, name=name: calls.append((name, strength)) or image
        )
    return calls


def test_jitter_draws_orders_strengths_and_its_probability(monkeypatch):
    calls = spy(monkeypatch, "brightness", "contrast", "saturation", "hue")
    step, random, planes = ColourJitter(0.8, 0.8, 0.8, 0.2), generator(1), noise(3, 4, 4)
    for _ in range(2400):
        step(planes, random)
    applied = len(calls) // 4
    low, high = stats.binom.interval(0.9999, 2400, 0.8)
    assert low <= applied <= high
    orders = ["-".join(name for name, _ in calls[start : start + 4]) for start in range(0, len(calls), 4)]
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4
    for name in ("brightness", "contrast", "saturation", "hue"):
        strengths = [strength for called, strength in calls if called == name]
        assert len(strengths) == applied
        uniform = stats.uniform(-0.2, 0.4) if name == "hue" else stats.uniform(0.2, 1.6)
        assert stats.kstest(strengths, uniform.cdf).pvalue > 1e-4


def test_grey_images_get_no_change_of_colour(monkeypatch):
    calls = spy(monkeypatch, "brightness", "contrast", "saturation", "hue")
    step = ColourJitter(0.8, 0.8, 0.8, 0.2, probability=1.0)
    step(noise(1, 4, 4), generator(0))
    assert sorted(name for name, _ in calls) == ["brightness", "contrast"]
    calls.clear()
    ColourJitter(0.4, 0.4, probability=1.0)(noise(3, 4, 4), generator(0))
    assert sorted(name for name, _ in calls) == ["brightness", "contrast"]
    planes = noise(1, 4, 4)
    assert RandomGrey(1.0)(planes, generator(0)) is planes


def test_grey_is_torchvisions_and_comes_in_a_fifth_of_the_views(pictures):
    for picture in pictures:
        mine = RandomGrey(1.0)(np.ascontiguousarray(picture.transpose(2, 0, 1)), generator(0)).transpose(1, 2, 0)
        mean, largest = gap(mine, F.rgb_to_grayscale(Image.fromarray(picture), 3))
        assert mean < 0.05
        assert largest <= 1
    planes, random = noise(3, 4, 4), generator(2)
    count = sum(RandomGrey()(planes, random) is not planes for _ in range(3000))
    low, high = stats.binom.interval(0.9999, 3000, 0.2)
    assert low <= count <= high


def test_blur_draws_sigma_and_takes_a_tenth_of_the_side(monkeypatch):
    calls = []
    monkeypatch.setattr(simclr_views, "blur", lambda planes, sigma, radius: calls.append((sigma, radius)) or planes)
    step, random, planes = RandomGaussianBlur(), generator(3), noise(1, 224, 1)
    for _ in range(2000):
        step(planes, random)
    low, high = stats.binom.interval(0.9999, 2000, 0.5)
    assert low <= len(calls) <= high
    assert stats.kstest([sigma for sigma, _ in calls], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4
    assert {radius for _, radius in calls} == {11}  # 23 pixels at 224
    calls.clear()
    for side in (1, 19, 20, 32, 96):
        RandomGaussianBlur(1.0)(noise(1, side, side), random)
    assert [radius for _, radius in calls] == [0, 0, 1, 1, 4]


def test_flip_and_rotation_draw_evenly(monkeypatch):
    planes, random = noise(3, 5, 7), generator(4)
    flips = 0
    for _ in range(1000):
        output = RandomFlip()(planes, random)
        flips += output is not planes
        np.testing.assert_array_equal(output if output is planes else output[:, :, ::-1], planes)
    low, high = stats.binom.interval(0.9999, 1000, 0.5)
    assert low <= flips <= high
    angles = []
    matrix = cv2.getRotationMatrix2D
    monkeypatch.setattr(cv2, "getRotationMatrix2D", lambda c, angle, s: angles.append(angle) or matrix(c, angle, s))
    for _ in range(1000):
        RandomRotation(10)(planes[:1], random)
    assert stats.kstest(angles, stats.uniform(-10, 20).cdf).pvalue > 1e-4


@pytest.mark.parametrize("step", [s for name in SIMCLR for s in POLICIES[name](32, True).finish])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_step_is_a_function_of_planes_and_generator(step, channels):
    planes = noise(channels, 40, 32)
    before = planes.copy()
    outputs = [step(planes, generator(seed)) for seed in range(20)]
    step = pickle.loads(pickle.dumps(step))
    for seed in reversed(range(20)):
        output = step(planes, generator(seed))
        np.testing.assert_array_equal(output, outputs[seed])
        assert (output.dtype, len(output), output.flags.c_contiguous) == (np.uint8, channels, True)
    np.testing.assert_array_equal(planes, before)


def settings(policy):
    return {type(step).__name__: vars(step) for step in POLICIES[policy](224, True).finish}


def test_policies_follow_the_paper():
    paper = settings("simclr")
    order = ["RandomResizedCrop", "RandomFlip", "ColourJitter", "RandomGrey", "RandomGaussianBlur"]
    assert list(paper) == order
    assert paper["RandomResizedCrop"]["smallest"] == 0.08
    assert [ranges for _, *ranges in paper["ColourJitter"]["_changes"][3]] == [
        pytest.approx([0.2, 1.8]),
        pytest.approx([0.2, 1.8]),
        pytest.approx([0.2, 1.8]),
        [-0.2, 0.2],
    ]
    half = settings("simclr_cifar")
    assert list(half) == order[:-1]
    assert [(high - low) / 2 for _, low, high in half["ColourJitter"]["_changes"][3]] == pytest.approx(
        [0.4, 0.4, 0.4, 0.1]
    )
    for policy, same in (("simclr", "inception_crop"), ("simclr_cifar", "resize_center")):
        image = noise(90, 130, 3)
        evaluation = create_transform(policy, 64, train=False)
        np.testing.assert_array_equal(evaluation(image, 1), create_transform(same, 64, train=False)(image, 2))


def test_radiographs_stay_grey_upright_and_mostly_visible():
    image = np.repeat(noise(80, 100, 1), 3, axis=2)
    transform = create_transform("simclr_chest_xray", 64, train=True)
    for seed in range(40):
        view = transform(image, seed)
        assert (view == view[:1]).all()
    # Bright on the right: a flip would turn the slope.
    ramp = np.broadcast_to(np.linspace(60, 180, 200).astype(np.uint8)[None, :, None], (200, 200, 1))
    spans = []
    for seed in range(150):
        view = transform(ramp, seed)[0, 20:44].astype(int)
        spans.append(view[:, 44:54].mean() - view[:, 10:20].mean())
    assert min(spans) > 0
    evaluation = create_transform("simclr_chest_xray", 64, train=False)(image, 0)
    np.testing.assert_array_equal(evaluation, create_transform("chest_xray", 64, train=False)(image, 0))
    assert "our own choice" in inspect.getdoc(POLICIES["simclr_chest_xray"])


@pytest.mark.parametrize("policy", SIMCLR)
def test_outputs_have_torchvisions_statistics(policy):
    """Means over views of the same images within 4 standard errors, every distribution the same to KS's eye."""
    size = 32 if policy == "simclr_cifar" else 64
    images = photos(6, 96, 128)
    if policy == "simclr_chest_xray":
        images = [image[..., 1:2] for image in images]
    with torch_seed(5):
        theirs_found = sample(theirs(torchvision_views(policy, size), images), images, 30)
    ours_found = sample(ours(policy, size, images), images, 30)
    for name in theirs_found:
        errors, pvalue = difference(theirs_found[name], ours_found[name])
        assert abs(errors) < 4, (name, errors)
        assert pvalue > 1e-4, (name, pvalue)


def test_statistics_see_what_differs():
    """The comparison above notices a weaker jitter, a missing blur and more grey."""
    images = photos(6, 96, 128)

    def found(steps):
        def view(number):
            planes = np.ascontiguousarray(images[number].transpose(2, 0, 1))
            for step in steps:
                planes = step(planes, random)
            return planes

        random = generator(6)
        return sample(view, images, 30)

    crop, flip, jitter, grey, blurred = POLICIES["simclr"](64, True).finish
    right = found([crop, flip, jitter, grey, blurred])
    for steps, name in (
        ([crop, flip, ColourJitter(0.2, 0.2, 0.2, 0.05), grey, blurred], "hue turned, cosine"),
        ([crop, flip, jitter, grey], "log10 Laplacian energy"),
        ([crop, flip, jitter, RandomGrey(0.4), blurred], "share of grey"),
    ):
        wrong = found(steps)
        errors, pvalue = difference(right[name], wrong[name])
        assert abs(errors) > 4 or pvalue < 1e-4, (name, errors, pvalue)


def test_describe_on_known_views():
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 200
    green = np.ascontiguousarray(red[..., [1, 0, 2]].transpose(2, 0, 1))
    found = describe(green, red)
    assert found["mean G"] == 200
    assert found["saturation"] == 1
    assert found["hue turned, cosine"] == pytest.approx(-0.5)
    assert found["hue turned, sine"] == pytest.approx(np.sqrt(3) / 2)
    assert found["share of grey"] == 0
    assert describe(np.full((3, 20, 20), 9, np.uint8), red)["share of grey"] == 1
