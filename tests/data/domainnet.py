"""DomainNet in its official layout: images by domain and class, and a list of each domain's train and test part."""

from tests.data.images import write_image

CLASSES = ["aircraft_carrier", "airplane", "alarm_clock", "The_Eiffel_Tower", "t-shirt"]
"""Numbered in this order, which is not that of the alphabet."""


def create(root, *, domains=("real", "clipart"), images=8):
    """Write `images` images a class, every fourth one a test image, and one that no list names."""
    for domain in domains:
        lists = {"train": [], "test": []}
        for label, name in enumerate(CLASSES):
            for image in range(images + 1):
                path = f"{domain}/{name}/{domain}_{label + 1:03d}_{image + 1:06d}.{'jpg' if image % 2 else 'png'}"
                write_image(root / path, 1000 * label + image)
                if image < images:
                    lists["test" if image % 4 == 3 else "train"].append(f"{path} {label}")
        for part, lines in lists.items():
            (root / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")
    return root
