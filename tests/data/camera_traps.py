"""CCT-20 in its official layout: five COCO files and one folder of images."""

import json

from tests.data.images import write_image

CATEGORIES = {
    1: "opossum", 3: "raccoon", 5: "squirrel", 6: "bobcat", 7: "skunk", 8: "dog", 9: "coyote", 10: "rabbit", 11: "bird",
    16: "cat", 21: "badger", 33: "car", 34: "deer", 51: "fox", 99: "rodent", 30: "empty",
}  # fmt: skip
CIS, TRANS = (33, 38, 61), {"trans_val": (125,), "trans_test": (0, 7, 130)}
IMAGES = {"train": 4, "cis_val": 1, "cis_test": 2, "trans_val": 1, "trans_test": 2}
"""Images of each class; all parts but train have an empty frame, train and trans_test one with two categories."""


def create(root, *, change=None):
    """Write all parts; `change(part, content)` edits a part before it is written."""
    (root / "eccv_18_annotation_files").mkdir()
    for part, images in IMAGES.items():
        content = {"info": {}, "images": [], "annotations": []}
        content["categories"] = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        frames = [[number] * (1 + image % 2) for number in CATEGORIES if number != 30 for image in range(images)]
        frames += [[30]] if part != "train" else []
        frames += [[6, 10]] if part in ("train", "trans_test") else []
        locations = TRANS.get(part, CIS)
        for row, categories in enumerate(frames):
            name = f"{part.replace('_', '')}-23d2-11e8-a6a3-{row:012d}"
            write_image(root / "eccv_18_all_images_sm" / f"{name}.jpg", row)
            content["images"].append(
                {
                    "id": name, "file_name": f"{name}.jpg", "location": locations[row % len(locations)],
                    "date_captured": f"2012-03-{row % 28 + 1:02d} 18:20:11" if row else "0000:00:00",
                    "seq_id": f"s{row // 3}", "seq_num_frames": 3, "frame_num": row % 3 + 1, "width": 24, "height": 20,
                }
            )  # fmt: skip
            for number in categories:  # one annotation a box; empty frames have none
                box = {} if number == 30 else {"bbox": [1.0, 2.0, 3.0, 4.0]}
                content["annotations"].append(
                    {"id": f"{name}-{len(content['annotations'])}", "image_id": name, "category_id": number} | box
                )
        if change:
            change(part, content)
        (root / "eccv_18_annotation_files" / f"{part}_annotations.json").write_text(json.dumps(content))
    return root
