"""PadChest in its official layouts, with values that the real table has."""

import csv
import gzip

import cv2
import numpy as np

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
HEADER = [
    "", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM",
    "ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric", "Modality_DICOM", "Manufacturer_DICOM",
    "PhotometricInterpretation_DICOM", "PixelRepresentation_DICOM", "PixelAspectRatio_DICOM",
    "SpatialResolution_DICOM", "BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM",
    "Columns_DICOM", "XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM", "ExposureTime",
    "RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels", "Localizations",
    "LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS",
]  # fmt: skip
CELLS = [
    "['normal']",
    "['pneumonia']",
    "['infiltrates', ' pneumonia']",
    "['COPD signs', ' pleural effusion', '']",
    "['pleural effusion']",
    "['subcutaneous emphysema', 'cardiomegaly']",
    "['consolidation']",
    "['']",
    "['unchanged']",
    "nan",
]
VIEWS = ["PA", "AP_horizontal", "AP", "COSTAL", "PA", "PA", "EXCLUDE", "PA", "UNK", "PA", "PA"]
SEXES, BIRTHS = ["F", "M", "F", "M", "O", "F", "nan"], ["1930.0", "1987.0", "2012.0", "", "1954.0"]


def image_name(patient, image):
    return f"{patient:036d}_{image}-k6ga.png"


def create(root, *, patients=60, cells=CELLS, layout="images/", zipped=True, bits=16, change=None, broken=()):
    """Write the table and the images, two a patient.

    Args:
        root: Folder of the data set.
        patients: Number of patients; patient p has the report of `cells[p % len(cells)]`.
        cells: Cells of the column Labels.
        layout: Where images are: "", "images/", "{}/" or "images/{}/" (the braces stand for ImageDir).
        zipped: Write the table as `.csv.gz`.
        bits: 16 as in the release, 8 as in resized copies.
        change: Gets the rows (a dict each) before they are written.
        broken: Names in the table that have no image.
    """
    rows = []
    for patient in range(patients):
        for image in range(2):
            name, folder = image_name(patient, image), str(patient % 55)
            write_image(root / layout.format(folder) / name, patient * 2 + image, bits)
            row = dict.fromkeys(HEADER, "None") | {
                "ImageID": name,
                "ImageDir": folder,
                "StudyDate_DICOM": f"{2008 + patient % 10}0915",
                "StudyID": name.partition("_")[0],
                "PatientID": f"{patient * 7919:036d}",
                "PatientBirth": BIRTHS[patient % len(BIRTHS)],
                "PatientSex_DICOM": SEXES[patient % len(SEXES)],
                "Projection": "L" if image else VIEWS[patient % len(VIEWS)],
                "Manufacturer_DICOM": ["ImagingDynamicsCompanyLtd", "PhilipsMedicalSystems"][patient % 2],
                "Report": ' sin hallazg , "normal" .',
                "Labels": cells[patient % len(cells)],
            }
            rows.append(row)
    rows += [{**rows[-1], "ImageID": name} for name in broken]
    rows = change(rows) or rows if change else rows
    path = root / (f"{TABLE}.gz" if zipped else TABLE)
    with gzip.open(path, "wt", newline="") if zipped else path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER if not rows else list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "": number} if "" in row else row for number, row in enumerate(rows))
    return root


def write_image(path, seed, bits=16, size=(20, 24)):
    """Write a smooth random image; the 16-bit one is the 8-bit one over the range of 16 bits."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4)).astype(np.uint8)
    image = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image.astype(np.uint16) * 257 if bits == 16 else image)
