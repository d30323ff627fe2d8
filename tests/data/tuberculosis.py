"""The Shenzhen and Montgomery sets in their layouts, with the kinds of PNG and the readings that the real ones have."""

import numpy as np
from PIL import Image

from tests.data.images import write_image

LAYOUTS = {
    "nlm": ("ChinaSet_AllFiles/CXR_png", "MontgomerySet/CXR_png"),
    "renamed": ("Shenzhen/images/images", "Montgomery/images"),
    "flat": (".", "."),
}
SHENZHEN = ("male 45yrs\nnormal", "Female , 5 month\nSTB", "femal24yrs \t\nPTB", "male 42\nnormal", "female 64days\n")
MONTGOMERY = "Patient's Sex: {} \nPatient's Age: {:03d}Y\n\nnormal\n"


def stems(shenzhen, montgomery):
    """Stems of both sites; the last third of each shows tuberculosis."""
    return [
        f"{site}_{number:04d}_{int(number > count * 2 / 3)}"
        for site, count in (("CHNCXR", shenzhen), ("MCUCXR", montgomery))
        for number in range(1, count + 1)
    ]


def create(root, *, shenzhen=60, montgomery=30, layout="nlm", readings=True, masks=True):
    """Write the images (Shenzhen with an inverted palette, every tenth RGB; Montgomery grey), readings and masks."""
    for stem in stems(shenzhen, montgomery):
        site, number = stem.split("_")[0], int(stem.split("_")[1])
        folder = root / LAYOUTS[layout][site == "MCUCXR"]
        if site == "MCUCXR" or number % 10 == 0:
            write_image(folder / f"{stem}.png", number, size=(32, 32), channels=1 if site == "MCUCXR" else 3)
        else:
            write_palette(folder / f"{stem}.png", number)
        if masks and site == "MCUCXR" and layout != "flat":
            for side in ("leftMask", "rightMask"):
                write_image(
                    folder.parent / "ManualMask" / side / f"{stem}.png", 0, size=(32, 32), channels=1, value=255
                )
        if readings:
            text = MONTGOMERY.format("FMO"[number % 3], number)
            text = SHENZHEN[number % len(SHENZHEN)] if site == "CHNCXR" else text
            path = (folder if layout == "flat" else folder.parent) / "ClinicalReadings" / f"{stem}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def write_palette(path, seed):
    """Write a ramp of grey as a palette PNG whose index runs the other way: read as an index it would be inverted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = (np.arange(32 * 32).reshape(32, 32) // 4 + seed) % 256
    image = Image.fromarray((255 - grey).astype(np.uint8), mode="L").convert("P")
    image.putpalette([255 - index for index in range(256) for _ in range(3)])
    image.save(path)
