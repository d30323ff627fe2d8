"""The base of every data set: its settings, its images and its names, on top of selection and stream."""

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from datamodules import io
from datamodules.arguments import check_arguments
from datamodules.assignment import FoldBy
from datamodules.files import check_files
from datamodules.image_text.captions import SLOT, check_templates, fill, readable_names
from datamodules.image_text.label_texts import label_texts
from datamodules.label_space import choose_labels
from datamodules.prepared import confirm_images
from datamodules.selection import SelectingDataModule
from datamodules.source_dials import SourceDials
from datamodules.table import ImageNames, Table
from datamodules.transforms import create_transform


@lru_cache(maxsize=1)
def shared_cache(max_bytes: int) -> io.ImageCache:
    """The process's image cache: the runs of a study decode an image once."""
    return io.ImageCache(max_bytes)


class BaseDataModule(SelectingDataModule):
    """What all data sets share: settings, images from files, names.

    A subclass states facts and implements `load_table` (and `read_images` if not files).

    Args:
        root: Folder of the data set; default `$FARSHOT_DATA/<name>`.
        batch_size: Global batch: devices and accumulation divide it.
        max_batch_per_device: Largest batch that fits on a device; a larger share is accumulated.
        num_workers: Loader processes. The stream is the same for any number.
        image_size: Side of the square images that the model sees, pixels.
        transform: Policy by name: bit, bit_square, inception_crop, inception_crop_randaugment, entezari2023,
            resize_center, chest_xray or chest_xray_cherti2022.
        shots: Training images per class (multi-label: positives per label), a number or "full".
        num_images: Train on this many images at natural prevalence.
        fraction: Train on this share of the training images, 0–1.
        few_shot_seed: Seed of the draw for shots, num_images and fraction.
        on_small: What a class with fewer images than `shots` is: an error, or a warning and all there are.
        one_per_group: Few-shot draws take at most one image a patient.
        num_classes_kept: Keep this many classes of a multi-class set, drawn by few_shot_seed.
        label_noise: Make this share of the training labels wrong, 0–1.
        noise_confusion: CSV with the probability of each wrong class (column) given the true one (row); default: all
            other classes alike.
        curation: Train on this share of the images, those with the highest scores.
        curation_scores: CSV or Parquet file with columns path and score.
        prepared: Folder of `python cli.py prepare`: images come from there, everything else from the set's own table.
        val_fraction: Share of the training groups held out for validation where no official validation exists.
        test_fraction: Share of the groups in the test set where no official test set exists (fixed hash).
        split_seed: Seed of the validation split and the folds.
        folds: Cross-validation: fold number `fold` of `folds` is the test set. An official test set stays untouched.
        fold: Which fold is the test set, 0 … folds − 1.
        fold_by: What a fold holds together: group (patients), site (each site a fold) or date (chronological).
        inner_folds: Cross-validation within the training draw: part `inner_fold` of so many is the validation set, the
            others are trained on. Parts are stratified and keep patients together; the test set stays what it is.
        inner_fold: Which part is the validation set, 0 … inner_folds − 1.
        balance: Draw training images so that every class has the same share (weights from the table).
        labels: Restrict a multi-label set to these labels, in this order.
        outputs: Arrange the labels as these outputs of a trained model, by canonical name; an output that the set does
            not annotate is unknown. For evaluation without training.
        leaks: Patients in several splits, and test images that the source of the weights has seen: stop, or record them
            and go on with marked result rows.
        missing_images: Rows whose image file is not there: an error, or drop them with a counted warning.
        seed: Seed of the stream; default the run's seed.
        augmented_views: 2 = training and validation batches hold a second augmented view of every image, for SimCLR.
        captions: Templates that make captions of class names, such as "a photo of a {}.", for training with captions;
            an image's template is drawn by its place in the stream.
        caption_names: CSV with columns class and name: what captions call a class; default: its own name.
        cache_gb: Keep decoded images in memory up to this many GB per process (0: none).
    """

    name: str
    """Data set's name: its default folder, the key of its hashed splits, its name in results."""
    channels: ClassVar[Literal[1, 3]] = 3
    window: tuple[float, float] | None = None
    """Intensities that become black and white in images deeper than 8 bits; None where a set has none such."""

    def __init__(
        self,
        root: str | None = None,
        *,
        batch_size: int = 32,
        max_batch_per_device: int | None = None,
        num_workers: int = 0,
        image_size: int = 224,
        transform: str = "inception_crop",
        shots: int | Literal["full"] | None = None,
        num_images: int | None = None,
        fraction: float | None = None,
        few_shot_seed: int = 0,
        on_small: Literal["error", "warn"] = "error",
        one_per_group: bool = True,
        num_classes_kept: int | None = None,
        label_noise: float = 0.0,
        noise_confusion: str | None = None,
        curation: float | None = None,
        curation_scores: str | None = None,
        prepared: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        folds: int | None = None,
        fold: int = 0,
        fold_by: FoldBy = "group",
        inner_folds: int | None = None,
        inner_fold: int | None = None,
        balance: bool = False,
        labels: list[str] | None = None,
        outputs: list[str] | None = None,
        leaks: Literal["stop", "record"] = "stop",
        missing_images: Literal["error", "drop"] = "error",
        seed: int | None = None,
        augmented_views: Literal[2] | None = None,
        captions: list[str] | None = None,
        caption_names: str | None = None,
        cache_gb: float = 0.0,
    ) -> None:
        super().__init__()
        self.root = Path(root if root is not None else Path(os.environ.get("FARSHOT_DATA", "data")) / self.name)
        self.batch_size, self.max_batch_per_device, self.num_workers = (
            batch_size,
            max_batch_per_device,
            num_workers,
        )
        self.image_size, self.transform = image_size, transform
        self.shots, self.num_images, self.fraction, self.few_shot_seed = (
            shots,
            num_images,
            fraction,
            few_shot_seed,
        )
        self.on_small, self.one_per_group = on_small, one_per_group
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.folds, self.fold, self.fold_by = folds, fold, fold_by
        self.inner_folds, self.inner_fold = inner_folds, inner_fold
        self.balance, self.labels, self.outputs, self.seed = balance, labels, outputs, seed
        self.leaks, self.missing_images = leaks, missing_images
        self.num_classes_kept, self.label_noise, self.noise_confusion = num_classes_kept, label_noise, noise_confusion
        self.curation, self.curation_scores, self.prepared = curation, curation_scores, prepared
        self.dials = SourceDials(
            num_classes_kept, label_noise, noise_confusion, curation, curation_scores, seed=few_shot_seed
        )
        self.augmented_views, self.captions, self.caption_names = augmented_views, captions, caption_names
        self.cache = shared_cache(int(cache_gb * 1e9))
        check_arguments(vars(self))
        if captions is not None:
            check_templates(captions)
        create_transform(transform, image_size, train=False)
        if hasattr(self, "class_names"):  # fixed by the class; otherwise the subclass finds them and calls this
            self.restrict_labels()

    # What a data set says of itself ------------------------------------------------------------------------------

    @property
    def label_policy(self) -> str | None:
        """How labels were read where there is a choice, for result rows."""
        return None

    @cached_property
    def readable_names(self) -> list[str]:
        """What captions call the classes, in the order of `class_names`.

        Raises:
            DataError: `caption_names` lacks a class, names an unknown one, or is needed: class names are codes.
        """
        file = Path(self.caption_names) if self.caption_names else None
        return readable_names(self.class_names, file, further=self.space.own)

    @property
    def class_texts(self) -> list[list[str]] | None:
        """Every caption template filled with each class, in the order of `class_names`; None without templates."""
        if self.captions is None:
            return None
        return [[template.replace(SLOT, name) for template in self.captions] for name in self.readable_names]

    def texts(self, rows: Sequence[int], seeds: Sequence[int]) -> list[str] | None:
        """Captions from the labels of `rows` by the templates `captions`; None without templates."""
        if self.captions is None:
            return None
        labels = self.read_table().labels[list(rows)]
        return fill(self.captions, label_texts(labels, self.readable_names, complete=self.all_labels_used), seeds)

    @property
    def all_labels_used(self) -> bool:
        """Whether the labels in use are all that the set annotates: an image with none of them shows nothing."""
        return self.outputs is None and 1 < len(self.space.chosen) == len(self.space.own)

    def setup(self, stage: str | None = None) -> None:
        """As `SelectingDataModule.setup`; what captions call the classes is found out here and not by a worker."""
        super().setup(stage)
        if self.captions is not None:
            _ = self.readable_names

    def read_images(self, rows: Sequence[int], at_least: int | None = None) -> Sequence[np.ndarray]:
        """Read images by table row, uint8 (H, W, C); from files under `root` by default.

        `at_least`: pixels that both sides keep where an image may be decoded smaller; see `io.decode_image`.
        """
        paths = self.raw_table.paths
        return [self.read_file(self.root / paths[row], at_least) for row in rows]

    def confirm_prepared(self) -> None:
        """Compare the prepared folder with originals that are still there, where the release is the user's own name."""
        if self.prepared is not None and self.unnamed_releases:
            confirm_images(self.prepared_images, self.prepared_rows, self.raw_table.paths, self.read_images)

    def read_file(self, path: Path, at_least: int | None = None) -> np.ndarray:
        """Decode one image file with this data set's number of channels, through the cache."""
        mode: Literal["grey", "rgb"] = "grey" if self.channels == 1 else "rgb"
        key = f"{mode}:{self.window}:{at_least}:{path}"
        return self.cache.get(key, lambda _: io.read_image(path, mode=mode, window=self.window, at_least=at_least))

    @property
    def release(self) -> str:
        """Name of the release that images and patients belong to; variants of one release share it."""
        return self.name

    @property
    def unnamed_releases(self) -> frozenset[str]:
        """Releases here whose name is the user's own choice: another set may bear it, too."""
        return frozenset()

    def image_names(self, rows: np.ndarray) -> ImageNames:
        """What each of `rows` (int64) is called: data set, image and group; a run records its training images so."""
        table = self.raw_table
        return ImageNames(
            np.full(len(rows), self.release, dtype=object),
            np.asarray(table.paths[rows], dtype=object),
            np.asarray(table.groups[rows], dtype=object),
        )

    content_hashed: ClassVar[bool] = True
    """Whether an image's content tells more than its name; rendered images are what their names say."""

    def image_files(self, rows: np.ndarray) -> list[tuple[Path, str] | None]:
        """File of each of `rows` (int64), and how it is decoded in words; None for images that are no files."""
        decoding = f"{self.channels} channels, window {self.window}"
        return [(self.root / path, decoding) for path in self.raw_table.paths[rows]]

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` (int64) whose image is not in its directory's listing."""
        return np.asarray(rows[check_files(self.root, table.paths[rows])])

    # The names in use --------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of model outputs: classes, labels, or 1 for a binary task."""
        return len(self.class_names)

    def restrict_labels(self) -> None:
        """Apply `labels` or `outputs` to the names; a subclass that finds its `class_names` late calls it itself."""
        self.space = choose_labels(
            self.class_names,
            self.task,
            dataset=self.name,
            labels=self.labels,
            outputs=self.outputs,
            classes=self.dials.classes(self.class_names, self.task),
        )
        self.class_names, self.task = self.space.names, self.space.task

    @property
    def own_class_names(self) -> list[str]:
        """Names that the set annotates, restricted by `labels`, whatever `outputs` they are arranged as."""
        return self.space.annotated
