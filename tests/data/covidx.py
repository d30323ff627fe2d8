"""COVIDx CXR in the layout of its releases: lists without a header, names with blanks, grey and RGB files."""

from tests.data.images import write_image

SPLITS = ("train", "val", "test")
POSITIVE, NEGATIVE = ("stonybrook", "A{:06d}"), ("rsna", "{:08x}-0000-4000-8000-000000000000")
TEST_POSITIVE = ("ricord", "419639-{:06d}")


def create(root, *, patients=24, images_each=2, val=False, three_classes=False, change=None):
    """Write the lists and their images.

    Every second patient is positive, and in the test set of another collection than in training. The first two of the
    training patients bear the same number in two collections. `change` takes {split: lines} and may alter it.
    """
    lines = {split: [] for split in SPLITS if val or split != "val"}
    for split in lines:
        for number in range(patients if split == "train" else patients // 2):
            key = number + 1000 * SPLITS.index(split)
            positive = number % 2 == 1
            source, form = (TEST_POSITIVE if split == "test" else POSITIVE) if positive else NEGATIVE
            patient, name = form.format(key), "{patient}-{image}.png"
            if split == "train" and number < 2:
                source, patient, name = ("actmed", "cohen")[number], "101", f"case {number} ({{image}}).jpeg"
            kind = "positive" if positive else "negative"
            if three_classes:
                kind = "COVID-19" if positive else ("normal", "pneumonia")[number // 2 % 2]
            for image in range(images_each):
                file = name.format(patient=patient, image=image)
                lines[split].append(f"{patient} {file} {kind} {source}")
                write_image(root / split / file, key, size=(32, 32), channels=(1, 3)[number % 2])
    if change:
        change(lines)
    for split, rows in lines.items():
        (root / f"{split}.txt").write_text("\n".join(rows) + "\n")
    return root
