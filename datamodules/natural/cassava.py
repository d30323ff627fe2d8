"""Cassava leaf diseases: Kaggle's 2020 release."""

import json

import numpy as np

from datamodules import readers
from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from datamodules.rows import reject_rows
from datamodules.table import Origin, Table, split_column, strings

OBTAIN = (
    "join https://www.kaggle.com/c/cassava-leaf-disease-classification, fetch and unpack its archive (kaggle "
    "competitions download -c cassava-leaf-disease-classification), and set data.init_args.root to that folder"
)
NAMES = "label_num_to_disease_map.json"


class Cassava(BaseDataModule):
    """Cassava leaves: 21,397 photos by farmers in Uganda, four diseases or healthy.

    Source: https://www.kaggle.com/c/cassava-leaf-disease-classification (2020), annotated at the National Crops
    Resources Research Institute and Makerere University; Mwebaze et al. 2019 (arXiv 1908.02900) describe the smaller
    release before it. About 6 GB with Kaggle's TFRecords, which are not read; JPEG, 800×600. Layout: `root/train.csv`
    (image_id, label), `root/train_images/`, and `root/label_num_to_disease_map.json`, which is checked where it is
    there.
    Classes by Kaggle's numbers, unbalanced: 1,087 / 2,189 / 2,386 / 13,158 / 2,577 images. Labels are noisy. Split: the
    labels of Kaggle's test set were never released, so the test set is a fixed hash of the image; validation is carved
    from the rest. One group an image: plants and fields are not identified. Licence: Kaggle's competition rules.
    The 2019 release (iCassava, TFDS: 9,430 images in `train/`, `validation/`, `test/` and folders cbb, cbsd, cgm, cmd,
    healthy) is a folder tree: read it with `ImageFolder`.
    """

    name = "cassava"
    task = "multiclass"
    class_names = [  # noqa: RUF012
        "Cassava Bacterial Blight (CBB)",
        "Cassava Brown Streak Disease (CBSD)",
        "Cassava Green Mottle (CGM)",
        "Cassava Mosaic Disease (CMD)",
        "Healthy",
    ]

    def load_table(self) -> Table:
        """Rows of `train.csv`."""
        path = self.root / "train.csv"
        if not path.is_file():
            raise DataError(f"no train.csv of {self.name} in {self.root}", where="data.init_args.root", hint=OBTAIN)
        self._check_names()
        frame = readers.read_frame(path, ["image_id", "label"])
        images = frame["image_id"].str.strip()
        reject_rows(images == "", images, "a row without an image:", path)
        reject_rows(images.duplicated(), images, "image listed twice:", path)
        return Table(
            paths=strings("train_images/" + images),
            labels=readers.class_labels(frame["label"].tolist(), Cassava.class_names, str(path)),
            groups=strings(images),
            split=split_column(np.full(len(frame), "")),
            origins=(Origin(path),),
        )

    def _check_names(self) -> None:
        path = self.root / NAMES
        if not path.is_file():
            return
        expected = {str(number): name for number, name in enumerate(Cassava.class_names)}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"cannot read the class names: {error}", where=str(path), hint=OBTAIN) from error
        if found != expected:
            raise DataError(
                "other classes than those of the 2020 release",
                where=str(path),
                valid=json.dumps(expected),
                hint="read another release with ImageTable or ImageFolder",
            )
