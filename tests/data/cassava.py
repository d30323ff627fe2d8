"""Cassava as Kaggle's archive has it."""

import json

from tests.data.images import write_image

NAMES = [
    "Cassava Bacterial Blight (CBB)", "Cassava Brown Streak Disease (CBSD)", "Cassava Green Mottle (CGM)",
    "Cassava Mosaic Disease (CMD)", "Healthy",
]  # fmt: skip


def create(root, *, images=80):
    """Write the table, the class names, the labelled images and one of Kaggle's test images."""
    rows = []
    for image in range(images):
        name = f"{1000015157 + 977 * image}.jpg"
        label = image % 5 if image < 50 else 3  # mosaic disease is most frequent
        write_image(root / "train_images" / name, image)
        rows.append(f"{name},{label}")
    write_image(root / "test_images" / "2216849948.jpg", 0)
    (root / "train.csv").write_text("image_id,label\n" + "\n".join(rows) + "\n")
    (root / "label_num_to_disease_map.json").write_text(json.dumps({str(n): name for n, name in enumerate(NAMES)}))
    return root
