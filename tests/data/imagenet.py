"""ImageNet in its layouts: WordNet folders, the flat val with the devkit's labels, Kaggle's archive, ImageNet-21k."""

import io
import shutil
import tarfile

import numpy as np
from scipy.io import savemat

from datamodules.natural.imagenet import synsets_1k
from tests.data.images import write_image

SYNSETS_21K = ["n00004475", "n00005787", "n01440764", "n01443537", "n02012849", "n99999999"]
"""The last one is in no release."""


def val_names(images=1):
    """Stems of the validation images by class; the release is not sorted by class."""
    stems = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 1000 * images + 1)]
    order = np.random.default_rng(0).permutation(len(stems))
    return {synset: sorted(stems[row] for row in order[label::1000]) for label, synset in enumerate(synsets_1k())}


def create(root, *, images=3, val_images=1, val="folders", labels="devkit", below=""):
    """Write train and val below `root/below`; `val` is folders or flat, `labels` devkit, archive, kaggle or none."""
    pixels = [root / f"{number}.JPEG" for number in range(4)]
    for number, path in enumerate(pixels):
        write_image(path, number)
    train, released = root / below / "train", root / below / "val"
    for label, synset in enumerate(synsets_1k()):
        (train / synset).mkdir(parents=True)
        for image in range(images):
            (train / synset / f"{synset}_{image}.JPEG").hardlink_to(pixels[(label + image) % len(pixels)])
    for label, (synset, stems) in enumerate(val_names(val_images).items()):
        folder = released / synset if val == "folders" else released
        folder.mkdir(parents=True, exist_ok=True)
        for stem in stems:
            (folder / f"{stem}.JPEG").hardlink_to(pixels[label % len(pixels)])
    for path in pixels:
        path.unlink()
    if val == "flat":
        write_labels(root, labels, val_images)
    return root


def write_labels(root, labels, images=1):
    """Write the labels of the flat val: the devkit's class numbers are neither sorted nor the label's order."""
    class_of = {stem: synset for synset, stems in val_names(images).items() for stem in stems}
    if labels == "kaggle":
        rows = [f"{stem},{class_of[stem]} 1 2 3 4 {class_of[stem]} 5 6 7 8 " for stem in reversed(sorted(class_of))]
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    if labels in ("devkit", "archive"):
        synsets = synsets_1k()
        numbers = dict(zip(synsets, (np.random.default_rng(1).permutation(1000) + 1).tolist(), strict=True))
        rows = [(number, synset, "words", 0) for synset, number in sorted(numbers.items(), key=lambda item: item[1])]
        rows += [(1001, "n00001740", "entity", 9)]  # the release also lists the classes above the 1,000
        table = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
        kit = root / "ILSVRC2012_devkit_t12"
        (kit / "data").mkdir(parents=True)
        savemat(kit / "data" / "meta.mat", {"synsets": table[:, None]})
        truth = "\n".join(str(numbers[class_of[stem]]) for stem in sorted(class_of))
        (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(truth + "\n")
        if labels == "archive":
            with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
                tar.add(kit, kit.name)
                extra = tarfile.TarInfo("../outside.txt")
                extra.size = 4
                tar.addfile(extra, io.BytesIO(b"evil"))
            shutil.rmtree(kit)


def create_21k(root, *, synsets=SYNSETS_21K, images=20, folder="", val=None):
    """Write class folders below `root/folder`, and a few images of each class below `root/val`."""
    for label, synset in enumerate(synsets):
        for image in range(images):
            write_image(root / folder / synset / f"{synset}_{image}.JPEG", 100 * label + image)
        for image in range(2 if val else 0):
            write_image(root / val / synset / f"{synset}_val_{image}.JPEG", image)
    return root
