"""Predictions for files are those of the test, also where photos are decoded at a fraction of their size."""

import numpy as np
import pandas as pd
import yaml

from datamodules import ImageFolder
from tests.data.images import write_image


def create(root):
    for split in ("train", "val", "test"):
        for number, name in enumerate(("ant", "bee")):
            for image in range(6):
                write_image(root / split / name / f"{image:03d}.jpg", 100 * number + image, size=(200, 150))
    return root


def test_whole_images_are_decoded_at_a_fraction(tmp_path):
    data = ImageFolder(root=str(create(tmp_path / "photos")), image_size=32, transform="resize_center")
    (full,), (small,) = data.images([3]), data.images([3], 32)
    assert (full.shape, small.shape) == ((150, 200, 3), (38, 50, 3))
    data.transform = "inception_crop"  # its evaluation shows the same at another size; its training crops need all
    assert data.train_dataloader().dataset.read_images.keywords == {"at_least": None}
    assert data.test_dataloader().dataset.read_images.keywords == {"at_least": 37}


def test_predict_agrees_with_test(tmp_path, run_cli):
    create(tmp_path / "photos")
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False},
        "model": {"class_path": "Classification", "init_args": {"backbone": "test_resnet"}},
        "data": {
            "class_path": "ImageFolder",
            "init_args": {"root": str(tmp_path / "photos"), "image_size": 32, "transform": "resize_center"},
        },
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", tmp_path / "p.yaml", "--runs_dir", tmp_path / "runs", "--run", "a", "--evaluate", "true"]
    assert run_cli("fit", *words)[0] == 0
    run = tmp_path / "runs" / "p" / "a"
    images, output = tmp_path / "photos" / "test", tmp_path / "p.csv"
    assert run_cli("predict", "--run", run, "--input", images, "--output", output)[0] == 0
    stored = pd.read_parquet(run / "predictions.parquet").query("split == 'test'").sort_values("id")
    logits = stored[["logit/ant", "logit/bee"]].to_numpy()
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(pd.read_csv(output).sort_values("id")[["ant", "bee"]], chances, atol=2e-6)
