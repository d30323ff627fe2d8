"""Caltech-101: photos of 101 kinds of objects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from datamodules.natural.torchvision_set import TorchvisionSet
from datamodules.table import Table, strings

BACKGROUND = "BACKGROUND_Google"
OBJECT_IMAGES, BACKGROUND_IMAGES = 8_677, 467
"""Numbers of images in the release, 9,144 together."""


class Caltech101(TorchvisionSet):
    """Caltech-101: 8,677 photos of 101 kinds of objects, 31 to 800 each, about 300×200.

    Source: https://data.caltech.edu/records/mzrjq-6wc02 (Li, Andreetto, Ranzato & Perona 2022; Fei-Fei, Fergus & Perona
    2004, CVPR workshop on generative-model based vision). 137 MB of JPEG, some grey, read as RGB. Layout:
    `<class>/image_0001.jpg` in `root/caltech101/101_ObjectCategories/`, as torchvision unpacks it, or below
    `root/101_ObjectCategories/`, `root/caltech-101/101_ObjectCategories/` or `root`. Licence: CC BY 4.0.
    Classes: the folders, sorted as torchvision does (capitals first). The paper counts 101 categories and 467 images of
    background besides, which torchvision leaves out and VTAB (TFDS) takes for class 102: `background` chooses,
    and result rows say which.
    Split: there is no official one; the test set is a fixed hash of the group, validation is carved from the rest. VTAB
    draws 30 images a class for training and tests on the other 6,084. Entezari et al. 2023 did so too, to judge by
    their published accuracies, which are multiples of 1 / 6,084; their lists are not public.
    Groups: Faces_easy are the photos of Faces cut to the head, so images of one number share a group. Other images are
    each their own; who is on the Faces, and which photos of a class come from one source, is not released.

    Args:
        background: Take the background images as a class, the last one, named BACKGROUND_Google.
        **kwargs: Arguments of sets that torchvision downloads.
    """

    name = "caltech101"
    reader = "Caltech101"
    homes = (
        "caltech101/101_ObjectCategories",
        "caltech101/caltech-101/101_ObjectCategories",
        "101_ObjectCategories",
        "caltech-101/101_ObjectCategories",
        "",
    )
    archives = ("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",)
    class_names = (
        "Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai "
        "brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier "
        "cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly "
        "electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone "
        "grand_piano hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop "
        "llama lobster lotus mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon "
        "pizza platypus pyramid revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy "
        "soccer_ball stapler starfish stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch "
        "water_lilly wheelchair wild_cat windsor_chair wrench yin_yang"
    ).split()

    def __init__(self, *, background: bool = False, **kwargs: Any) -> None:
        self.background = background
        if background:
            self.class_names = [*Caltech101.class_names, BACKGROUND]
        super().__init__(**kwargs)

    @property
    def label_policy(self) -> str:
        """Whether the background is a class."""
        return f"{'with' if self.background else 'without'} background"

    @property
    def required(self) -> Sequence[str]:
        """Every class's folder."""
        return self.space.own

    def load_table(self) -> Table:
        """Images by class and number."""
        size = OBJECT_IMAGES + (BACKGROUND_IMAGES if self.background else 0)
        table = self.read_class_folders(size, ignored=[BACKGROUND])
        return replace(table, groups=strings(pd.Series(table.groups).str.replace("Faces_easy/", "Faces/")))
