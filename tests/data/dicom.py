"""Tiny DX radiographs in valid DICOM files, with the tags and pixels that a test asks for."""

import csv
import warnings

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

DIGITAL_XRAY = UID("1.2.840.10008.5.1.4.1.1.1.1")  # Digital X-Ray Image Storage - For Presentation
PATIENT = {
    "PatientID": "P1",
    "PatientSex": "F",
    "PatientAge": "058Y",
    "ViewPosition": "PA",
    "StudyDate": "20140915",
    "Manufacturer": "Maker",
    "ManufacturerModelName": "DX 1",
}


def write_dicom(path, stored, *, bits=12, photometric="MONOCHROME2", compress=None, encoded=None, **tags):
    """Write one file and return its path.

    Args:
        path: The file; folders are made.
        stored: Stored values, integers of 8 or 16 bits, (H, W), (H, W, 3) or (frames, H, W) with NumberOfFrames.
        bits: BitsStored.
        photometric: PhotometricInterpretation.
        compress: Transfer syntax to encode with, lossless; None writes plain pixels.
        encoded: Bytes of the image in that transfer syntax, where pydicom has no encoder for it.
        **tags: DICOM keywords over those of `PATIENT`; None leaves one out.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = DIGITAL_XRAY, generate_uid()
    ds.Modality, ds.BodyPartExamined = "DX", "CHEST"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tests write tags that the standard does not allow and files have
        for keyword, value in {**PATIENT, **tags}.items():
            if value is not None:
                setattr(ds, keyword, value)
    colour = photometric[:4] not in ("MONO", "PALE")
    ds.Rows, ds.Columns = stored.shape[-3:-1] if colour else stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * stored.dtype.itemsize, bits, bits - 1
    ds.PixelRepresentation = int(np.issubdtype(stored.dtype, np.signedinteger))
    pixels = stored.tobytes()
    ds.PixelData = pixels + b"\0" * (len(pixels) % 2)
    if encoded is not None:
        ds.file_meta.TransferSyntaxUID = compress
        ds.PixelData = encapsulate([encoded])
        ds["PixelData"].is_undefined_length = True
    elif compress is not None:
        ds.compress(compress, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
    return path


def table_item(values, *, first=0, depth=16, packed=False):
    """One item of a VOI or modality LUT sequence; `packed` writes its entries as bytes of `depth` bits."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(values) % 2**16, first, depth])
    if packed:
        item.add_new("LUTData", "OW", np.asarray(values, dtype="<u1" if depth == 8 else "<u2").tobytes())
    else:
        item.add_new("LUTData", "US", [int(value) for value in values])
    return item


def jpeg_lossless(stored, bits):
    """Encode (H, W) unsigned values as lossless JPEG, process 14 with the left neighbour as the prediction.

    Written from ITU-T T.81, annex H; every category of differences has a Huffman code of 5 bits, its own number.
    """
    image = stored.astype(np.int64)
    predicted = np.empty_like(image)
    predicted[:, 1:] = image[:, :-1]
    predicted[1:, 0] = image[:-1, 0]
    predicted[0, 0] = 2 ** (bits - 1)
    text = ""
    for difference in (image - predicted).ravel().tolist():
        size = abs(difference).bit_length()
        text += f"{size:05b}"
        if size:
            text += f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}"
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    height, width = image.shape
    frame = bytes([bits]) + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([1, 1, 0x11, 0])
    table = bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])
    scan = bytes([1, 1, 0, 1, 0, 0])
    segments = ((0xC3, frame), (0xC4, table), (0xDA, scan))
    head = b"".join(bytes([0xFF, mark]) + (len(body) + 2).to_bytes(2, "big") + body for mark, body in segments)
    return b"\xff\xd8" + head + data + b"\xff\xd9"


def create(root, *, patients=24, images_each=2, change=None):
    """Two class folders of radiographs and `labels.csv`; patient 0 has neither sex, age nor view.

    `change(patient, tags)` may edit the tags of a file before it is written.
    """
    rows = []
    for number in range(patients * images_each):
        patient = number // images_each
        tags = {
            "PatientID": f"P{patient:03d}",
            "PatientSex": "FM"[patient % 2] if patient else None,
            "PatientAge": f"{20 + patient:03d}Y" if patient else None,
            "ViewPosition": ("PA" if number % 2 else "AP") if patient else None,
            "StudyDate": f"201409{1 + patient % 28:02d}",
        }
        if change is not None:
            change(patient, tags)
        stored = np.random.default_rng(number).integers(0, 4096, (24, 20)).astype(np.uint16)
        name = f"{'sick' if patient % 3 == 0 else 'normal'}/{number:03d}.dcm"
        write_dicom(root / name, stored, **tags)
        rows.append({"file": name, "Pneumonia": int(patient % 3 == 0), "sex": "male", "case": f"case {patient // 2}"})
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root
