"""CheXpert in the layouts of its releases, with values that the real tables have."""

import csv

from tests.data.images import write_image

LABELS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
DETAILS = ["Sex", "Age", "Frontal/Lateral", "AP/PA"]
REPORTS = [  # what is not mentioned is blank
    {"No Finding": "1.0", "Support Devices": "1.0", "Pneumothorax": "0.0"},
    {"Pneumonia": "1.0", "Lung Opacity": "1.0"},
    {"Pleural Effusion": "1.0", "Edema": "-1.0", "Pneumonia": "0.0"},
    {"No Finding": "1.0"},
    {"Pneumonia": "-1.0", "Pleural Effusion": "0.0", "Cardiomegaly": "1.0"},
]
DIRECTIONS = {7: "LL", 11: "RL"}  # patients whose frontal image bears a lateral's code
BATCHES = ["CheXpert-v1.0 batch 1 (validate & csv)"] + [
    f"CheXpert-v1.0 batch {number} (train {number - 1})" for number in (2, 3, 4)
]


def create(
    root,
    *,
    patients=40,
    prefix="CheXpert-v1.0-small",
    folder="CheXpert-v1.0-small",
    valid="valid",
    batches=False,
    test=None,
    change=None,
):
    """Write the tables and images.

    `prefix` starts the tables' paths, `folder` holds everything below `root` ("" = root itself), and `valid` the images
    of valid.csv. `batches`: the full release as it is unpacked. `test` names the later release's table.
    `change` may alter the rows of train.csv.
    """
    home = root / (BATCHES[0] if batches else folder)
    first = 1
    for part, count in (("train", patients), ("valid", patients // 2), ("test", patients // 2 if test else 0)):
        rows = []
        for patient in range(first, first + count):
            place = root / BATCHES[1 + patient % 3] if batches and part == "train" else home / part
            place = home / valid if part == "valid" else place
            rows += _patient(place, "/".join(filter(None, (prefix, part))), patient)
        first += count
        if part == "train" and change:
            rows = change(rows) or rows
        if rows:
            _write_table(home / (test if part == "test" else f"{part}.csv"), rows)
    return root


def _patient(place, prefix, patient):
    """Write one patient's images: a frontal one, and a lateral one of every other; returns the rows."""
    rows = []
    report = REPORTS[patient % len(REPORTS)]
    for number, side in enumerate(["Frontal", "Lateral"][: 1 + patient % 2], start=1):
        file = f"patient{patient:05d}/study1/view{number}_{side.lower()}.jpg"
        write_image(place / file, patient, size=(32, 32), channels=1)
        rows.append(
            {
                "Path": f"{prefix}/{file}".lstrip("/"),
                "Sex": "Unknown" if patient == 9 else ["Male", "Female"][patient % 2],
                "Age": str(0 if patient == 5 else 20 + patient),
                "Frontal/Lateral": side,
                "AP/PA": DIRECTIONS.get(patient, ["AP", "PA"][patient // 2 % 2]) if side == "Frontal" else "",
                **dict.fromkeys(LABELS, ""),
                **report,
            }
        )
    return rows


def _write_table(path, rows):
    """Write rows under the columns that the file of that name has; radiologists leave no label of test blank."""
    columns = ["Path", *DETAILS, *LABELS]
    if path.name == "test_labels.csv":
        columns = ["Path", *LABELS[1:]]
    if path.name == "groundtruth.csv":
        columns = ["Study", *LABELS]
        rows = [{**row, "Study": row["Path"].rpartition("/")[0]} for row in rows if "view1" in row["Path"]]
    if path.name in ("test_labels.csv", "groundtruth.csv"):
        rows = [{name: row[name] if row[name] not in ("", "-1.0") else "0" for name in columns} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
