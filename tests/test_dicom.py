"""DICOM: pixels come out as the standard says, tags become metadata, patients never cross splits."""

import math
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason='DICOM needs the extra: pip install "farshot[dicom]"')

from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.pixels import get_decoder
from pydicom.uid import MPEG2MPML, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from datamodules import ImageTable, dicom, io
from datamodules.errors import DataError, UnreadableImageError
from tests.data.dicom import create, jpeg_lossless, table_item, write_dicom
from tests.datamodule_contract import DataModuleContract, no_image

RESCALE = {"RescaleSlope": 0.5, "RescaleIntercept": -300}


def gradient(bits=12, dtype=np.uint16, low=0):
    """All values of a ramp with some noise, (40, 50)."""
    ramp = np.linspace(low, low + 2**bits - 1, 2000) + np.random.default_rng(0).normal(0, 20, 2000)
    return ramp.clip(low, low + 2**bits - 1).astype(dtype).reshape(40, 50)


def read(path, stored, **arguments):
    return dicom.read_dicom(write_dicom(path / "image.dcm", stored, **arguments))[:, :, 0]


def slow_window(x, center, width, function):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 for one value and the output range 0–255, as the standard writes it."""
    if function == "SIGMOID":
        return 255 / (1 + math.exp(min(-4 * (x - center) / width, 700)))
    if function == "LINEAR_EXACT":
        if x <= center - width / 2:
            return 0
        return 255 if x > center + width / 2 else ((x - center) / width + 0.5) * 255
    if x <= center - 0.5 - (width - 1) / 2:
        return 0
    return 255 if x > center - 0.5 + (width - 1) / 2 else ((x - (center - 0.5)) / (width - 1) + 0.5) * 255


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("rescale", [{}, RESCALE, {"RescaleSlope": -1, "RescaleIntercept": 4095}])
@pytest.mark.parametrize(("center", "width"), [(700, 900), ([1000, 5], [1, 7])])
def test_window_is_the_standards_formula(tmp_path, function, rescale, center, width):
    stored = gradient()
    image = read(tmp_path, stored, WindowCenter=center, WindowWidth=width, VOILUTFunction=function, **rescale)
    first = [value[0] if isinstance(value, list) else value for value in (center, width)]
    values = stored.astype(float) * rescale.get("RescaleSlope", 1) + rescale.get("RescaleIntercept", 0)
    expected = [slow_window(value, *first, function) for value in values.ravel().tolist()]
    np.testing.assert_allclose(image.ravel(), expected, atol=0.501)


def test_own_window_is_in_rescaled_units_and_overrides_the_files(tmp_path):
    stored = gradient()
    path = write_dicom(tmp_path / "a.dcm", stored, WindowCenter=100, WindowWidth=50, **RESCALE)
    image = dicom.read_dicom(path, window=(-200, 1000))
    np.testing.assert_array_equal(image[:, :, 0], io.window_to_uint8(stored * 0.5 - 300, -200, 1000))
    with pytest.raises(DataError, match=r"(?s)window \(5, 5\) is empty.*a\.dcm"):
        dicom.read_dicom(path, window=(5, 5))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("entries", "depth", "first"), [(4096, 8, 0), (4096, 12, 0), (1000, 16, 300), (200, 8, -150), (65536, 16, 0)]
)
def test_voi_table(tmp_path, packed, entries, depth, first):
    table = ((np.arange(entries) / (entries - 1)) ** 2 * (2**depth - 1)).round().astype(int)
    item = table_item(table, first=first, depth=depth, packed=packed)
    stored = gradient()
    # The window is there as well: the table wins.
    image = read(tmp_path, stored, VOILUTSequence=[item], WindowCenter=9, WindowWidth=5, **RESCALE)
    index = [min(max(round(value) - first, 0), entries - 1) for value in (stored * 0.5 - 300).ravel().tolist()]
    np.testing.assert_allclose(image.ravel(), [table[i] * 255 / (2**depth - 1) for i in index], atol=0.501)


def test_modality_table(tmp_path):
    stored = gradient()
    table = np.sqrt(np.arange(4096) / 4095) * 1023
    item = table_item(table.astype(int), depth=16)
    item.ModalityLUTType = "OD"
    image = read(tmp_path, stored, ModalityLUTSequence=[item], WindowCenter=512, WindowWidth=1024)
    expected = [slow_window(int(table[value]), 512, 1024, None) for value in stored.ravel()]
    np.testing.assert_allclose(image.ravel(), expected, atol=0.501)


@pytest.mark.parametrize(
    ("bits", "dtype", "low"), [(8, np.uint8, 0), (10, np.uint16, 0), (12, np.uint16, 0), (12, np.int16, -2048)]
)
def test_without_a_voi_the_stored_range_counts_and_monochrome1_is_inverted(tmp_path, bits, dtype, low):
    stored = gradient(bits, dtype, low) // 2  # the image's own minimum or maximum plays no part
    image = read(tmp_path, stored, bits=bits)
    np.testing.assert_allclose(image, (stored.astype(float) - low) * 255 / (2**bits - 1), atol=0.501)
    np.testing.assert_array_equal(read(tmp_path, stored, bits=bits, photometric="MONOCHROME1"), 255 - image)


def test_bits_above_those_stored_are_ignored(tmp_path):
    stored = gradient()
    np.testing.assert_array_equal(read(tmp_path, stored | 0xA000), read(tmp_path, stored))


@pytest.mark.filterwarnings("error")
def test_bytes_after_the_pixels_are_ignored_without_a_warning(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", gradient())
    before, ds = dicom.read_dicom(path), dcmread(path)
    ds.PixelData += b"1234"
    ds.save_as(path)
    np.testing.assert_array_equal(dicom.read_dicom(path), before)


def test_deep_image_that_would_vanish_is_an_error(tmp_path):
    dark = gradient(12)
    with pytest.raises(DataError, match=r"(?s)of 65536 stored values: fewer than 16 .*image\.dcm.*set the window"):
        read(tmp_path, dark // 4, bits=16)
    with pytest.raises(DataError, match="of 65536 stored"):
        read(tmp_path, np.where(dark < 40, 65535, dark // 4).astype(np.uint16), bits=16, PixelPaddingValue=65535)
    assert read(tmp_path, dark // 4, bits=16, WindowCenter=512, WindowWidth=1024).std() > 50
    assert (read(tmp_path, np.full_like(dark, 9), bits=16) == 0).all()


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colour_becomes_luma(tmp_path, photometric):
    rgb = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    expected = rgb @ [0.299, 0.587, 0.114]
    stored = np.asarray(Image.fromarray(rgb).convert("YCbCr")) if photometric != "RGB" else rgb
    image = read(tmp_path, stored, bits=8, photometric=photometric)
    np.testing.assert_allclose(image, expected, atol=0.501 if photometric == "RGB" else 2)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (12, np.uint16), (16, np.uint16)])
def test_lossless_compression_changes_nothing(tmp_path, syntax, bits, dtype):
    stored = gradient(bits, dtype)
    encoded = jpeg_lossless(stored, bits) if syntax == JPEGLosslessSV1 else None
    image = read(tmp_path, stored, bits=bits, compress=syntax, encoded=encoded)
    np.testing.assert_array_equal(image, read(tmp_path, stored, bits=bits))


def test_jpeg_and_jpeg_ls(tmp_path):
    stored, buffer = gradient(8, np.uint8), BytesIO()
    Image.fromarray(stored).save(buffer, "JPEG", quality=98)
    image = read(tmp_path, stored, bits=8, compress=JPEGBaseline8Bit, encoded=buffer.getvalue())
    assert np.abs(image.astype(int) - stored).mean() < 1.5
    plain, packed = (get_testdata_file(name) for name in ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"))
    np.testing.assert_array_equal(dicom.read_dicom(packed), dicom.read_dicom(plain))


def test_errors_name_the_file(tmp_path, monkeypatch):
    stored = gradient()
    cubic = {"VOILUTFunction": "CUBIC", "WindowCenter": 4, "WindowWidth": 9}
    cases = [
        (DataError, "has 3 frames", {"stored": np.stack([stored] * 3), "NumberOfFrames": 3}),
        (DataError, "PALETTE COLOR pixels of 12 bits", {"stored": stored, "photometric": "PALETTE COLOR"}),
        (DataError, "LINEAR with the window width 0", {"stored": stored, "WindowCenter": 4, "WindowWidth": 0}),
        (DataError, "SIGMOID with", {"stored": stored, **cubic, "VOILUTFunction": "SIGMOID", "WindowWidth": 0}),
        (DataError, "VOI function CUBIC", {"stored": stored, **cubic}),
        (DataError, "MPEG2 .* is not supported", {"stored": stored, "compress": MPEG2MPML, "encoded": b"film"}),
        (UnreadableImageError, "damaged", {"stored": stored, "compress": JPEG2000Lossless, "encoded": b"no image"}),
        (UnreadableImageError, "damaged: the VOI LUT has 3 of", {"stored": stored, "VOILUTSequence": [short_table()]}),
    ]  # fmt: skip
    for kind, problem, arguments in cases:
        with pytest.raises(kind, match=rf"(?s){problem}.*image\.dcm") as error:
            read(tmp_path, **arguments)
        assert str(error.value).count("\n") < 15
    path = write_dicom(tmp_path / "a.dcm", stored, compress=JPEGLSLossless, encoded=b"nothing")
    monkeypatch.setattr(type(get_decoder(JPEGLSLossless)), "is_available", False)
    with pytest.raises(DataError, match=r'(?s)No decoder for JPEG-LS.*a\.dcm.*pip install "farshot\[dicom\]"'):
        dicom.read_dicom(path)


def short_table():
    item = table_item([1, 2, 3])
    item.LUTDescriptor = [4096, 0, 16]
    return item


def test_missing_library(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", gradient())
    for name in [name for name in sys.modules if name.split(".")[0] == "pydicom"]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: io.read_image(path, mode="grey"), lambda: dicom.read_tags([path])):
        with pytest.raises(DataError, match=r'(?s)a\.dcm.*pip install "farshot\[dicom\]"'):
            call()


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize("share", [0, 0.04, 0.5, 0.99])
def test_part_of_a_file_is_an_error(tmp_path, syntax, share):
    path = write_dicom(tmp_path / "a.dcm", gradient(), compress=syntax)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UnreadableImageError, match=r"a\.dcm"):
        dicom.read_dicom(path)
    if share <= 0.04:
        with pytest.raises(UnreadableImageError, match=r"a\.dcm"):
            dicom.read_tags([path])


def test_read_image_and_list_images_know_dicom(tmp_path):
    stored = gradient()
    path = write_dicom(tmp_path / "b.DCM", stored, WindowCenter=2048, WindowWidth=4096)
    grey = io.read_image(path, mode="grey")
    assert (grey.shape, grey.dtype) == ((40, 50, 1), np.uint8)
    np.testing.assert_allclose(grey[:, :, 0], stored / 4095 * 255, atol=0.501)
    np.testing.assert_array_equal(io.read_image(path, mode="rgb"), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(io.read_image(path, mode="unchanged"), grey)
    windowed = io.read_image(str(path), mode="grey", window=(0, 1000))
    np.testing.assert_array_equal(windowed[:, :, 0], io.window_to_uint8(stored, 0, 1000))
    bare = write_dicom(tmp_path / "IM0001", stored)
    write_dicom(tmp_path / "c.dicom", stored)
    assert io.list_images(tmp_path) == ["b.DCM", "c.dicom"]
    with pytest.raises(UnreadableImageError, match=r"name DICOM files \.dcm"):
        io.read_image(bare, mode="grey")
    (tmp_path / "text.dcm").write_text("not an image" * 50)
    for name, problem in (("text.dcm", "is not DICOM"), ("lost.dcm", "cannot be read: No such file")):
        with pytest.raises(UnreadableImageError, match=problem):
            io.read_image(tmp_path / name, mode="grey")
        with pytest.raises(UnreadableImageError, match=problem):
            dicom.read_tags([tmp_path / name])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("tags", "role", "expected"),
    [
        ({}, "sex", "F"), ({"PatientSex": "m "}, "sex", "M"), ({"PatientSex": "O"}, "sex", ""),
        ({"PatientSex": None}, "sex", ""), ({"PatientSex": ""}, "sex", ""),
        ({}, "age", 58), ({"PatientAge": "011M"}, "age", 11 / 12), ({"PatientAge": "002D"}, "age", 2 / 365.25),
        ({"PatientAge": "003W"}, "age", 21 / 365.25), ({"PatientAge": "104Y"}, "age", 104),
        ({"PatientAge": None, "PatientBirthDate": "19840915"}, "age", 30),
        ({"PatientAge": "", "PatientBirthDate": "21440915", "StudyDate": "21800915"}, "age", 36),
        ({"PatientAge": None, "PatientBirthDate": "20200101"}, "age", np.nan),
        ({"PatientAge": None, "PatientBirthDate": "19841"}, "age", np.nan),
        ({"PatientAge": None}, "age", np.nan),
        ({}, "view", "PA"), ({"ViewPosition": "ll"}, "view", "LL"), ({"ViewPosition": None}, "view", ""),
        ({}, "scanner", "Maker DX 1"), ({"Manufacturer": None}, "scanner", "DX 1"),
        ({"Manufacturer": "Größe", "SpecificCharacterSet": "ISO_IR 192"}, "scanner", "Größe DX 1"),
        ({}, "date", "20140915"), ({"StudyDate": None}, "date", ""), ({"StudyDate": ""}, "date", ""),
        ({"StudyDate": "2014.09.15"}, "date", "20140915"), ({"PatientAge": "58"}, "age", 58),
        ({"PatientID": " 0012 "}, "patient", "0012"), ({"PatientID": None}, "patient", ""),
    ],
)  # fmt: skip
def test_tags(tmp_path, tags, role, expected):
    values = dicom.read_tags([write_dicom(tmp_path / "a.dcm", gradient(8, np.uint8), bits=8, **tags)])
    assert set(values) == {"sex", "age", "view", "scanner", "date", "patient"}
    assert values["age"].dtype == np.float32
    if role == "age":
        np.testing.assert_allclose(values[role], [expected], atol=0.003)  # leap years move a birthday by a day
    else:
        assert values[role].tolist() == [expected]


def test_long_headers_and_many_files_keep_their_order(tmp_path):
    long = {"AdditionalPatientHistory": "x" * 3 * dicom.HEAD_BYTES}  # stands before ViewPosition
    paths = [
        write_dicom(tmp_path / f"{number}.dcm", gradient(), PatientID=f"P{number}", **(long if number == 7 else {}))
        for number in range(11)
    ]
    tags = dicom.read_tags(paths * 60)
    assert tags["patient"].tolist() == [f"P{number}" for number in range(11)] * 60
    assert set(tags["view"]) == {"PA"}
    assert {len(values) for values in dicom.read_tags([]).values()} == {0}


class TestDicomFolder(DataModuleContract):
    channels = 1

    def create(self):
        create(self.root)

    def build(self, **arguments):
        return ImageTable(root=str(self.root), mode="grey", **{"val_fraction": 0.2, **arguments})

    def test_groups_and_metadata_come_from_the_tags(self):
        with no_image():
            data = self.make()
            table = data.read_table()
        assert data.class_names == ["normal", "sick"]
        numbers = np.array([int(Path(path).stem) for path in table.paths])
        assert list(table.groups) == [f"P{number // 2:03d}" for number in numbers]
        assert set(table.metadata) == {"sex", "age", "view", "scanner", "date"}
        expected = [20 + number // 2 if number > 1 else np.nan for number in numbers]
        np.testing.assert_array_equal(table.metadata["age"], expected)
        assert table.metadata["view"][numbers == 0] == ""

    def test_pixels(self):
        data = self.make()
        path = data.read_table().paths[3]
        expected = io.read_image(self.root / path, mode="grey")
        np.testing.assert_array_equal(data.read_images([3])[0], expected)
        colour = ImageTable(root=str(self.root), image_size=16)
        np.testing.assert_array_equal(colour.read_images([3])[0], np.repeat(expected, 3, axis=2))

    def test_file_without_a_patient_or_among_others(self):
        create(self.root, change=lambda patient, tags: tags.update(PatientID="" if patient == 3 else "P"))
        with pytest.raises(DataError, match=r"(?s)no PatientID \(2 such files\).*006\.dcm"):
            self.make().read_table()
        Image.new("L", (9, 9)).save(self.root / "sick" / "photo.png")
        with pytest.raises(DataError, match=r"(?s)mixes DICOM .*48 of 49.*photo\.png"):
            self.make().read_table()


class TestDicomCsv(DataModuleContract):
    channels = 1

    def create(self):
        create(self.root)

    def build(self, **arguments):
        columns = {"path": "file", "label": ["Pneumonia"], "sex": "sex", **arguments.pop("columns", {})}
        return ImageTable(root=str(self.root), table="labels.csv", mode="grey", columns=columns, **arguments)

    def test_columns_win_over_tags(self):
        table = self.make().read_table()
        assert set(table.metadata["sex"]) == {"M"}
        assert set(table.metadata) == {"sex", "age", "view", "scanner", "date"}
        assert list(table.groups[:4]) == ["P000", "P000", "P001", "P001"]
        mapped = self.make(columns={"group": "case"}).read_table()
        assert list(mapped.groups[:5]) == ["case 0"] * 4 + ["case 1"]
        assert mapped.metadata["view"][5] == "PA"

    def test_no_header_is_read_where_columns_say_everything(self, monkeypatch):
        monkeypatch.setattr(dicom, "read_tags", None)
        roles = dict.fromkeys(("age", "view", "scanner", "date"), "sex")
        assert len(self.make(columns={"group": "case", **roles}).read_table()) == 48
