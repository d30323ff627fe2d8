"""Small data sets of one's own: a folder tree and a CSV of patients."""

import csv

from tests.data.images import write_image

CLASSES = ["ant", "bee", "cat"]


def create_tree(root, *, splits=("train", "val", "test"), images=8, suffix=".png"):
    """One folder a class below each split (or directly below root)."""
    for split in splits or [""]:
        for number, name in enumerate(CLASSES):
            for image in range(images):
                write_image(root / split / name / f"{image:03d}{suffix}", 100 * number + image)
    return root


def create_csv(root, *, patients=40, images_each=2, change=None, seed=0):
    """Two labels (one cell in ten unknown), several images a patient; `change(rows)` edits the rows before writing."""
    rows = []
    for patient in range(patients):
        for image in range(images_each):
            number = patient * images_each + image
            name = f"images/p{patient:03d}_{image}.png"
            write_image(root / name, seed + number, channels=1)
            cell = "" if number % 10 == 9 else str(int(patient % 3 == 0))
            site = f"site {patient % 2}"
            rows.append(
                {
                    "file": name,
                    "Pneumonia": cell,
                    "Effusion": str(int(patient % 2)),
                    "patient": f"p{patient}",
                    "site": site,
                }
            )
    rows = change(rows) or rows if change else rows
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root
