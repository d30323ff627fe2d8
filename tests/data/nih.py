"""NIH ChestX-ray14 in its official layouts, with values that the real files have."""

import csv

import cv2
import numpy as np

from tests.data.images import write_image

HEADER = [
    "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
    "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]",
]  # fmt: skip
FINDINGS = ["No Finding", "Pneumonia", "Edema|Effusion", "Infiltration|Pneumonia", "No Finding", "Hernia"]


def create(root, *, patients=30, images_each=2, layout="images", change=None):
    """Write the table, the two lists and the images; layout is `images` or `images_001` (twelve folders)."""
    rows = []
    for patient in range(1, patients + 1):
        for image in range(images_each):
            name = f"{patient:08d}_{image:03d}.png"
            folder = root / "images" if layout == "images" else root / f"images_{patient % 12 + 1:03d}" / "images"
            write_image(folder / name, patient, size=(32, 32), channels=1)
            if patient == 1:  # the release holds a few RGBA files
                grey = cv2.imread(str(folder / name), cv2.IMREAD_GRAYSCALE)
                cv2.imwrite(str(folder / name), np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
            view = "PA" if image == 0 else "AP"
            findings = FINDINGS[patient % len(FINDINGS)]
            rows.append(
                [
                    name,
                    findings,
                    image,
                    patient,
                    20 + patient,
                    "MF"[patient % 2],
                    view,
                    2500,
                    2048,
                    0.14,
                    0.14,
                ]
            )
    rows = change(rows) or rows if change else rows
    with (root / "Data_Entry_2017_v2020.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(rows)
    names = {f"{row[3]:>08}_{row[2]:03d}.png" for row in rows}
    test = sorted(name for name in names if int(name[:8]) > patients * 0.75)
    (root / "test_list.txt").write_text("\n".join(test) + "\n")
    (root / "train_val_list.txt").write_text("\n".join(sorted(names - set(test))))
    return root
