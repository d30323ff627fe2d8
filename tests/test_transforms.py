"""Transforms: seeds decide everything, geometry keeps its promises, and no resize aliases or blocks."""

import multiprocessing
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules import transforms
from datamodules.errors import DataError
from datamodules.transforms import POLICIES, create_transform

RANDOM_POLICIES = sorted(set(POLICIES) - {"resize_center"})
INCEPTION_CROPS = {"inception_crop", "inception_crop_randaugment", "entezari2023"}
SIMCLR = {"simclr", "simclr_cifar", "simclr_chest_xray"}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def blob(row, column, size=200):
    """One bright spot on black, as (size, size, 1)."""
    rows, columns = np.mgrid[:size, :size]
    spot = 255 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * (size / 20) ** 2))
    return spot.astype(np.uint8)[..., None]


def centre(planes):
    # Brightness lifts the background, which is most of the plane.
    weights = np.maximum(planes[0] - np.median(planes[0]) - 20, 0)
    rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]]
    return (weights * rows).sum() / weights.sum(), (weights * columns).sum() / weights.sum()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("train", [True, False])
def test_every_policy_gives_contiguous_squares_of_any_image(policy, train):
    for size in (1, 32, 128, 160, 161, 224):
        transform = create_transform(policy, size, train=train)
        for shape in ((1, 1), (7, 5), (32, 32), (1, 40), (40, 2), (size, size), (97, 250)):
            for channels in (1, 3):
                image = noise(*shape, channels)
                before = image.copy()
                output = transform(image, 3)
                assert output.shape == (channels, size, size)
                assert output.dtype == np.uint8
                assert output.flags.c_contiguous
                assert not np.shares_memory(output, image)
                np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("policy", RANDOM_POLICIES)
def test_the_seed_decides_and_nothing_else(policy):
    image = noise(70, 90)
    first, second = (create_transform(policy, 48, train=True) for _ in range(2))
    forwards = [first(image, seed) for seed in range(30)]
    np.random.seed(1)
    backwards = [second(image, seed) for seed in reversed(range(30))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    # A crop at whole pixels can coincide with another's.
    assert len({output.tobytes() for output in forwards}) >= 28
    np.testing.assert_array_equal(first(image, np.int64(7)), forwards[7])
    assert first(image, 2**64 - 1).shape == (3, 48, 48)
    evaluation = create_transform(policy, 48, train=False)
    np.testing.assert_array_equal(evaluation(image, 0), evaluation(image, 1))


def apply_in_worker(arguments):
    transform, image, seed = arguments
    return transform(image, seed)


def test_workers_and_copies_agree_with_the_main_process():
    transform = create_transform("inception_crop", 16, train=True)
    image = noise(40, 40)
    expected = [transform(image, seed) for seed in range(8)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        got = pool.map(apply_in_worker, [(transform, image, seed) for seed in range(8)], chunksize=1)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(transform))(image, 5), expected[5])


def test_steps_draw_independently():
    # A horizontal ramp from 50 to 200: its direction shows the flip, its span the size of the crop.
    ramp = np.broadcast_to(np.linspace(50, 200, 300).astype(np.uint8)[None, :, None], (300, 300, 1))
    transform = create_transform("inception_crop", 32, train=True)
    slopes = np.array([int(plane[-1]) - int(plane[0]) for plane in (transform(ramp, s)[0, 0] for s in range(600))])
    flipped, size = slopes < 0, np.abs(slopes)
    assert 0.42 < flipped.mean() < 0.58
    assert abs(np.corrcoef(flipped, size)[0, 1]) < 0.15
    # Flips are spread over small and large crops alike.
    for part in (size < np.median(size), size >= np.median(size)):
        assert 0.35 < flipped[part].mean() < 0.65


def test_numpy_randomness_is_seeded_too():
    import albumentations as A

    class AddNoise(A.ImageOnlyTransform):
        def apply(self, img, **_):
            return img + self.random_generator.integers(0, 9, img.shape, np.uint8)

    transform = transforms.Transform(lambda image: image, [AddNoise(p=1.0)])
    image = noise(20, 20) // 2
    first = transform(image, 4)
    assert (transform(image, 5) != first).any()
    np.testing.assert_array_equal(transform(image, 4), first)


@pytest.mark.parametrize("policy", ["bit", "inception_crop", "chest_xray_cherti2022"])
def test_flipping_policies_flip_half_of_the_time(policy):
    transform = create_transform(policy, 64, train=True)
    image = noise(64, 64)
    flips = 0
    for seed in range(200):
        transform(image, seed)
        flips += bool(transform._compose.transforms[-1].get_applied_params())
    assert 75 < flips < 125


def test_chest_xray_never_flips_and_moves_little():
    # The heart's side: a spot at the right, above the centre. Its position bounds shift, scale and rotation.
    transform = create_transform("chest_xray", 200, train=True)
    positions = np.array([centre(transform(blob(80, 150), seed)) for seed in range(150)])
    offset = positions - 99.5
    radius = np.hypot(50.5, -19.5)
    assert (offset[:, 1] > 0).all()
    # 10 degrees, 5 % of the radius and 5 % of the side on each axis are the most that it can move.
    farthest = np.hypot(*(positions - [80, 150]).T).max()
    assert 5 < farthest <= radius * np.deg2rad(10) + radius * 0.05 + np.hypot(10, 10) + 1


@pytest.mark.parametrize(("policy", "bound"), [("chest_xray", 10), ("chest_xray_cherti2022", 45)])
def test_rotation_stays_within_its_bound_and_uses_it(policy, bound):
    transform = create_transform(policy, 200, train=True)
    pair = np.maximum(blob(100, 100), blob(100, 130))
    angles = []
    for seed in range(150):
        plane = transform(pair, seed)[0].astype(float)
        rows, columns = np.nonzero(plane > np.median(plane) + 60)
        axis = np.linalg.eigh(np.cov(rows, columns))[1][:, 1]
        angles.append(np.degrees(np.arctan(axis[0] / axis[1])))
    assert 0.9 * bound < np.abs(angles).max() < bound + 1
    assert min(angles) < -0.8 * bound
    assert max(angles) > 0.8 * bound


def test_cherti_shift_and_scale():
    transform = create_transform("chest_xray_cherti2022", 200, train=True)
    scales, shifts = [], []
    for seed in range(300):
        transform(blob(100, 100), seed)
        params = transform._compose.transforms[0].get_applied_params()
        scales.append(params["scale"]["x"])
        assert params["scale"]["x"] == params["scale"]["y"]
        shifts.append(centre(transform(blob(99.5, 99.5), seed)))
    shifts = np.abs(np.array(shifts) - 99.5)
    assert 0.9 <= min(scales) < 0.91 < 1.09 < max(scales) <= 1.1
    assert (47 < shifts.max(axis=0)).all()
    assert (shifts.max(axis=0) < 51).all()


def test_chest_xray_pads_with_black_and_keeps_the_aspect():
    image = np.full((100, 200, 1), 200, np.uint8)
    cv2.circle(image, (100, 50), 40, 90, -1)
    output = create_transform("chest_xray", 100, train=False)(image, 0)[0]
    assert (output[:25] == 0).all()
    assert (output[75:] == 0).all()
    assert (output[25:75] > 0).all()
    rows, columns = np.nonzero((output > 85) & (output < 110))
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    tall = create_transform("chest_xray", 100, train=False)(image.transpose(1, 0, 2), 0)[0]
    np.testing.assert_array_equal(tall, output.T)


@pytest.mark.parametrize("policy", ["bit", "resize_center", "chest_xray_cherti2022"])
def test_evaluation_shows_the_whole_short_side(policy):
    image = np.full((100, 160, 1), 50, np.uint8)
    image[:, 30:130] = 200
    output = create_transform(policy, 50, train=False)(image, 0)
    assert (output == 200).all()
    inner = create_transform("inception_crop", 224, train=False)(noise(256, 300), 0)
    np.testing.assert_array_equal(inner, noise(256, 300)[16:240, 38:262].transpose(2, 0, 1))


@pytest.mark.parametrize(("size", "short_side"), [(128, 160), (32, 40), (160, 200), (480, 512), (224, 239)])
def test_bit_sizes(size, short_side):
    geometry, (crop, _), _, _ = POLICIES["bit"](size, True)
    assert geometry(noise(60, 90, 1)).shape == (short_side, round(short_side * 1.5), 1)
    assert (crop.height, crop.width) == (size, size)


def test_bit_square_shows_the_whole_image():
    image = np.zeros((90, 180, 1), np.uint8)
    image[:, 90:] = 255  # the right half, however the image is squeezed
    seen = create_transform("bit_square", 128, train=False)(image, 0)
    assert seen[0, 0].tolist() == [0] * 64 + [255] * 64
    assert POLICIES["bit_square"](128, True).geometry(image).shape == (160, 160, 1)
    assert POLICIES["bit_square"](480, True).geometry(image).shape == (512, 512, 1)


def test_an_image_of_the_right_size_passes_unchanged():
    image = noise(64, 64)
    for policy in ("bit", "resize_center", "chest_xray", "chest_xray_cherti2022"):
        output = create_transform(policy, 64, train=False)(image, 0)
        np.testing.assert_array_equal(output, image.transpose(2, 0, 1))


def without_augmentation(policy, size, train):
    """The transform with every shift, rotation, flip and change of contrast taken out: its resizes alone."""
    steps = POLICIES[policy](size, train)
    crops = [[s for s in part if "Crop" in type(s).__name__] for part in (steps.augmentations, steps.finish)]
    return transforms.Transform(steps.geometry, *crops)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(512, 512), (500, 375), (230, 640)])
def test_downscaling_is_antialiased(policy, train, shape):
    image = noise(*shape)
    transform = without_augmentation(policy, 64, train)
    for seed in range(8):
        output = transform(image, seed)
        height, width = shape
        if policy in SIMCLR and train:
            box = (
                POLICIES[policy](64, train)
                .finish[0]
                .draw(height, width, np.random.Generator(np.random.Philox(key=seed)))
            )
            (height, width), target = box[2:], (64, 64)
        elif policy in INCEPTION_CROPS and train:
            top, left, bottom, right = np.array(transform._compose.transforms[0].get_applied_params()["crop_coords"])[
                [1, 0, 3, 2]
            ]
            height, width = bottom - top, right - left
            target = (64, 64)
        else:
            factor = 64 / (max if policy in {"chest_xray", "simclr_chest_xray"} else min)(shape)
            if policy == "bit" and train:
                factor *= 80 / 64
            elif policy in INCEPTION_CROPS | {"simclr"}:
                factor *= 73 / 64
            target = (round(width * factor), round(height * factor))
        pillow = Image.fromarray(image[:height, :width]).resize(target, Image.Resampling.BILINEAR)
        # The padding of chest_xray is no noise.
        spread = output[output > 0].std()
        assert spread <= 2 * np.asarray(pillow).std()


@pytest.mark.parametrize("policy", ["resize_center", "chest_xray", "inception_crop", "bit"])
def test_a_fine_checkerboard_turns_grey(policy):
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    output = create_transform(policy, 56, train=False)(board, 0)
    assert np.abs(output.astype(int) - 127).max() <= 16
    assert output.std() < 5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("train", [True, False])
def test_enlarging_is_smooth(policy, train):
    ramp = np.broadcast_to(np.linspace(0, 240, 16).astype(np.uint8)[None, :, None], (16, 16, 1))
    output = without_augmentation(policy, 160, train)(ramp, 1)[0].astype(int)
    # Nearest neighbours would leave plateaus of 10 pixels and jumps of 16.
    assert np.abs(np.diff(output, axis=1)).max() <= 3
    assert np.abs(np.diff(output, axis=0)).max() <= 1


def test_errors_name_the_nearest_policy_and_the_bad_image():
    with pytest.raises(DataError, match=r"(?s)'chestxray'.*valid: .*inception_crop.*did you mean 'chest_xray'"):
        create_transform("chestxray", 224, train=True)
    with pytest.raises(DataError, match="image size of 0"):
        create_transform("bit", 0, train=True)
    transform = create_transform("resize_center", 8, train=False)
    for bad in (noise(8, 8)[..., 0], noise(8, 8).astype(np.float32), noise(8, 8, 4), noise(0, 8)):
        with pytest.raises(DataError, match="shape"):
            transform(bad, 0)


def test_every_policy_is_described():
    for name, policy in POLICIES.items():
        assert policy.__name__ == name
        assert len(policy.__doc__.splitlines()[0]) > 30
