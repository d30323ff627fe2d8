"""SimCLR's views against torchvision v1's: time on one core, and whether both sides' outputs are alike.

    python benchmarks/simclr_views.py [--rounds N] [--images N] [--views N] [--folder DIR]

Decoded photos of 500x375 become views of 224 px (`simclr`, `simclr_chest_xray`) and images of 32 px views of 32
(`simclr_cifar`). One thread each, rounds interleaved, so that a ratio compares neighbours in time. Without
`--folder`, images are scikit-learn's two photos and noise with the spectrum and colours of photos.

Statistics: the mean over `--views` views of every image, theirs and ours, the difference in standard errors (two
independent samples, so beyond 4 is a difference), and the p-value of a Kolmogorov-Smirnov test on all views.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision import transforms as tv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules import ImageFolder
from datamodules.io import list_images, read_image
from datamodules.transforms import POLICIES, create_transform

View = Callable[[int], NDArray[np.uint8]]
"""Number of an image → a view of it, (C, image_size, image_size)."""


def photos(count: int, height: int, width: int) -> list[NDArray[np.uint8]]:
    """Two real photos, then noise: 1/f spectrum, strong in grey and weak in colour, one dominant colour each.

    Returns:
        uint8, (height, width, 3).
    """
    real = [cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = np.inf
    pictures = []
    for _ in range(count - len(real)):
        fields = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency, (height, width))
        fields *= np.array([50, 20, 10])[:, None, None] / fields.std(axis=(1, 2), keepdims=True)
        grey, warm, green = fields + np.array([rng.uniform(90, 160), *rng.uniform(-35, 35, 2)])[:, None, None]
        pictures.append(np.stack([grey + warm, grey + green, grey - warm], axis=-1).clip(0, 255).astype(np.uint8))
    return [*real, *pictures][:count]


class PillowBlur:
    """Pillow's Gaussian blur, a sum of box filters, which some implementations of SimCLR use."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur by 0.1 to 2 pixels."""
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def torchvision_views(policy: str, image_size: int, pillow_blur: bool = False) -> tv.Compose:
    """Torchvision v1's transforms on Pillow images for one of our policies."""
    blur = PillowBlur() if pillow_blur else tv.GaussianBlur(2 * (image_size // 20) + 1, (0.1, 2.0))
    maybe_blur = tv.RandomApply([blur], 0.5)

    def colours(strength: float) -> list[object]:
        jitter = tv.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        return [tv.RandomApply([jitter], 0.8), tv.RandomGrayscale(0.2)]

    steps = {
        "simclr": [tv.RandomHorizontalFlip(), *colours(1.0), maybe_blur],
        "simclr_cifar": [tv.RandomHorizontalFlip(), *colours(0.5)],
        "simclr_chest_xray": [
            tv.RandomRotation(10, tv.InterpolationMode.BILINEAR),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4)], 0.8),
            maybe_blur,
        ],
    }[policy]
    scale = (0.3 if policy == "simclr_chest_xray" else 0.08, 1.0)
    return tv.Compose([tv.RandomResizedCrop(image_size, scale, antialias=True), *steps, tv.PILToTensor()])


def theirs(recipe: Callable[[Image.Image], torch.Tensor], images: Sequence[NDArray[np.uint8]]) -> View:
    """Views by torchvision."""
    pillow = [Image.fromarray(image.squeeze()) for image in images]
    return lambda number: recipe(pillow[number % len(pillow)]).numpy()


def ours(policy: str, image_size: int, images: Sequence[NDArray[np.uint8]]) -> View:
    """Views by our policy; call n has seed n."""
    transform = create_transform(policy, image_size, train=True)
    seeds = iter(range(2**63))
    return lambda number: transform(images[number % len(images)], next(seeds))


def hue(planes: NDArray[np.uint8]) -> complex:
    """The mean colour of (3, H, W) on the colour circle; its angle is the hue."""
    red, green, blue = planes.reshape(3, -1).mean(axis=1)
    return complex(red - (green + blue) / 2, np.sqrt(3) / 2 * (green - blue))


def describe(view: NDArray[np.uint8], original: NDArray[np.uint8]) -> dict[str, float]:
    """Statistics of a view; hue against that of `original`, (H, W, C), and not a number where the view is grey.

    The Laplacian's energy is that of the centre: Pillow leaves jagged borders where it rotates, we smooth ones.
    """
    found: dict[str, float] = {}
    for name, plane in zip("RGB" if len(view) == 3 else ["grey"], view, strict=True):
        found |= {f"mean {name}": float(plane.mean()), f"SD {name}": float(plane.std())}
    luma = view[0]
    if len(view) == 3:
        interleaved = np.ascontiguousarray(view.transpose(1, 2, 0))
        luma = cv2.cvtColor(interleaved, cv2.COLOR_RGB2GRAY)
        is_grey = bool((view == view[:1]).all())
        turn = np.nan if is_grey else np.angle(hue(view) / hue(original.transpose(2, 0, 1)))
        found |= {
            "saturation": cv2.mean(cv2.cvtColor(interleaved, cv2.COLOR_RGB2HSV))[1] / 255,
            "share of grey": float(is_grey),
            "hue turned, cosine": float(np.cos(turn)),
            "hue turned, sine": float(np.sin(turn)),
        }
    else:
        found["share of black"] = float((luma == 0).mean())
    margin = len(luma) // 5
    energy = cv2.Laplacian(luma[margin:-margin, margin:-margin], cv2.CV_32F).var()
    return found | {"log10 Laplacian energy": float(np.log10(energy + 0.1))}


def sample(view: View, images: Sequence[NDArray[np.uint8]], views: int) -> dict[str, NDArray[np.float64]]:
    """Every statistic of `views` views an image, (images, views) each."""
    rows = [[describe(view(number), image) for _ in range(views)] for number, image in enumerate(images)]
    return {name: np.array([[one[name] for one in row] for row in rows]) for name in rows[0][0]}


def difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Standard errors between the means of two statistics, (images, views) each, and the p-value of a KS test.

    The images are the same on both sides, so that only the spread within an image counts.
    """
    error = sum(np.nanvar(x, axis=1, ddof=1) / np.isfinite(x).sum(axis=1) for x in (a, b))
    gap = (np.nanmean(b, axis=1) - np.nanmean(a, axis=1)).sum()
    test = stats.ks_2samp(a[np.isfinite(a)], b[np.isfinite(b)], method="asymp")
    return float(gap / np.sqrt(np.sum(error))) if gap else 0.0, float(test.pvalue)


def print_statistics(policy: str, size: int, images: Sequence[NDArray[np.uint8]], views: int) -> None:
    """Both sides next to each other."""
    torch.manual_seed(0)
    a = sample(theirs(torchvision_views(policy, size), images), images, views)
    b = sample(ours(policy, size, images), images, views)
    print(f"\n{policy}, {len(images)} images, {views} views each".ljust(61) + "theirs    ours   st. errors    KS p")
    for name in a:
        errors, p = difference(a[name], b[name])
        print(f"  {name:54}{np.nanmean(a[name]):9.3f}{np.nanmean(b[name]):9.3f}{errors:10.1f}{p:11.3f}")


def seconds(view: View, count: int) -> float:
    """Seconds of processor time a view, one pass over `count` images."""
    start = time.process_time()
    for number in range(count):
        view(number)
    return (time.process_time() - start) / count


def print_ratio(title: str, a: View, b: View, count: int, rounds: int) -> None:
    """Run two sides in turn and print their ratio."""
    seconds(a, 8), seconds(b, 8)
    pairs = []
    for turn in range(rounds):
        order = (a, b) if turn % 2 == 0 else (b, a)
        spent = {view: seconds(view, count) for view in order}
        pairs.append((spent[a], spent[b]))
    ratios = [x / y for x, y in pairs]
    other, mine = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
    print(
        f"{title:44} theirs {other:7,.0f}, ours {mine:6,.0f} us a view; ratio min {min(ratios):.2f}, "
        f"median {statistics.median(ratios):.2f}, max {max(ratios):.2f}"
    )


def print_steps(image: NDArray[np.uint8], size: int, calls: int = 300) -> None:
    """Mean microseconds of every step of `simclr`, torchvision's and ours, over their own random draws."""
    random = np.random.Generator(np.random.Philox(key=0))
    planes, pillow = np.ascontiguousarray(image.transpose(2, 0, 1)), Image.fromarray(image)
    print("\nstep of simclr".ljust(32) + "theirs    ours, us a view (probability included)")
    their_steps = torchvision_views("simclr", size).transforms[:-1]
    for mine, other in zip(POLICIES["simclr"](size, True).finish, their_steps, strict=True):
        spent = []
        for step in (lambda: other(pillow), lambda: mine(planes, random)):  # noqa: B023
            start = time.process_time()
            for _ in range(calls):
                step()
            spent.append((time.process_time() - start) / calls * 1e6)
        print(f"  {type(mine).__name__:28}{spent[0]:7.0f}{spent[1]:8.0f}")
        planes = np.ascontiguousarray(planes[:, :size, :size])
        pillow = pillow.crop((0, 0, size, size))


def print_two_views(images: Sequence[NDArray[np.uint8]], rounds: int) -> None:
    """Time of the loader with two views of every JPEG photo, against one."""
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(images):
            file = Path(folder) / f"class{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(file, quality=95)
        one, two = (
            ImageFolder(root=folder, transform="simclr", batch_size=len(images), val_fraction=0, augmented_views=views)
            for views in (None, 2)
        )
        keys = list(zip(range(len(images)), range(len(images)), range(len(images)), strict=True))
        datasets = [data.train_dataloader().dataset for data in (one, two)]
        ratios = []
        for turn in range(rounds + 1):  # the first warms up
            spent = {}
            for place in (0, 1) if turn % 2 else (1, 0):
                start = time.process_time()
                datasets[place].__getitems__(keys)  # type: ignore[attr-defined]
                spent[place] = time.process_time() - start
            ratios.append(spent[1] / spent[0])
    found = sorted(ratios[1:])
    print(
        f"loader, two views against one, JPEG photos: ratio min {found[0]:.2f}, "
        f"median {statistics.median(found):.2f}, max {found[-1]:.2f}"
    )


def main() -> None:
    """Compare speed, then outputs, for every policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--images", type=int, default=24, help="different images (default 24)")
    parser.add_argument("--views", type=int, default=100, help="views of an image for the statistics (default 100)")
    parser.add_argument("--folder", type=Path, help="your own photos instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if arguments.folder:
        names = list_images(arguments.folder)[: arguments.images]
        big = [read_image(str(arguments.folder / name), mode="rgb") for name in names]
    else:
        big = photos(arguments.images, 375, 500)
    small = [cv2.resize(photo, (32, 32), interpolation=cv2.INTER_AREA) for photo in big]
    grey = [photo[..., 1:2] for photo in big]
    cases = (("simclr", 224, big), ("simclr_cifar", 32, small), ("simclr_chest_xray", 224, grey))
    for policy, size, images in cases:
        count = arguments.images * (10 if size == 32 else 2)
        for pillow_blur in (False, True) if policy == "simclr" else (False,):
            title = f"{policy} {size} px" + (", theirs with Pillow's blur" if pillow_blur else "")
            recipe = torchvision_views(policy, size, pillow_blur)
            print_ratio(title, theirs(recipe, images), ours(policy, size, images), count, arguments.rounds)
    print_two_views(big, arguments.rounds)
    print_steps(big[0], 224)
    for policy, size, images in cases:
        print_statistics(policy, size, images, arguments.views)


if __name__ == "__main__":
    main()
