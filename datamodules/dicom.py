"""DICOM radiographs as uint8 arrays and their tags as metadata; needs the extra `farshot[dicom]`."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError, UnreadableImageError
from datamodules.hashing import arrow_text
from datamodules.io import DICOM_EXTENSIONS, RESTORE, Image, window_to_uint8

INSTALL = 'pip install "farshot[dicom]"'
LUMA = np.array([0.299, 0.587, 0.114])  # of RGB; ITU-R BT.601, as for every other colour image
MIN_LEVELS = 16  # a radiograph with fewer grey levels than this has lost its content
HEAD_BYTES = 16_384  # holds the tags before the pixels of nearly every radiograph; the rest is read on demand
READERS = 16  # threads that wait for the disk; with more parsing in them they would fight over the interpreter
TAGS = (
    "SpecificCharacterSet", "StudyDate", "Manufacturer", "ManufacturerModelName", "PatientID", "PatientBirthDate",
    "PatientSex", "PatientAge", "ViewPosition", "Rows",
)  # fmt: skip
ROLES = {"group": "patient", "sex": "sex", "age": "age", "view": "view", "scanner": "scanner", "date": "date"}
"""Role of a table's column and the entry of `read_tags` that fills it."""


def read_dicom(path: str | Path, *, window: tuple[float, float] | None = None) -> Image:
    """Read and decode one DICOM image as it is meant to be seen: black air, white bone.

    Stored values are rescaled (modality table, or slope and intercept) and mapped to 0–255 by the file's VOI: its first
    lookup table, else its first window (LINEAR, LINEAR_EXACT or SIGMOID; DICOM PS3.3 C.11.2.1). A file with neither
    uses the full range of its BitsStored: unlike an image's own minimum and maximum, that range does not depend on a
    lead marker or the collimation, so images of one scanner stay comparable. MONOCHROME1 is inverted at last;
    PresentationLUTShape says the same a second time and is not looked at. PixelPaddingValue is mapped like other
    values. Colour becomes luma, without rescale and VOI, which are defined for grey images only.

    Args:
        path: A DICOM file with one frame, plain or compressed.
        window: Intensities (low, high) after the rescale that become black and white (white and black in
            MONOCHROME1); overrides the file's VOI.

    Returns:
        uint8, (H, W, 1).

    Raises:
        UnreadableImageError: The file is missing, truncated, damaged or not DICOM.
        DataError: pydicom or a decoder is not installed, there are several frames, the kind of pixels is not
            supported, or the values of a deep image without a VOI fill so little of their range that it would be
            lost.
    """
    with _reported(path):
        from pydicom import dcmread

        ds = dcmread(path)
        stored = _decode(ds, str(path))
        bits = int(ds.BitsStored)
        if stored.ndim == 3:
            return window_to_uint8(stored @ LUMA, 0, 2**bits - 1)[:, :, None]
        lowest = -(2 ** (bits - 1)) if ds.PixelRepresentation else 0
        if window is None and not _has_voi(ds):
            _require_contrast(stored, bits, ds.get("PixelPaddingValue"), str(path))
        # There are few stored values and many pixels: each value is mapped once.
        levels = _grey_levels(ds, np.arange(lowest, lowest + 2**bits, dtype=np.int32), window, str(path))
        return levels[stored.astype(np.int32) - lowest if lowest else stored][:, :, None]


def read_tags(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Read the metadata of DICOM files from their headers, never the pixels; about 1,300 files a second.

    Returns:
        Columns of N: sex ("F", "M" or ""), age (years, float32: PatientAge, else StudyDate − PatientBirthDate, else
        NaN), view (ViewPosition in upper case), scanner (manufacturer and model), date (StudyDate, YYYYMMDD) and
        patient (PatientID); text except for the age, "" = missing.

    Raises:
        DataError: A header that cannot be read, or pydicom is not installed.
    """
    rows: list[list[str]] = []
    with ThreadPoolExecutor(READERS) as pool:
        # A block at a time, so that only its heads are in memory.
        for start in range(0, len(paths), 512):
            block = paths[start : start + 512]
            rows += map(_read_header, block, pool.map(_read_head, block))
    study, maker, model, patient, birth, sex, age, view = (
        pd.Series(column, dtype=object) for column in (zip(*rows, strict=True) if rows else [()] * 8)
    )
    study, birth, sex = _date(study), _date(birth), sex.str.upper()
    return {
        "sex": sex.where(sex.isin(["F", "M"]), "").to_numpy(dtype=object),
        "age": _years(age, study, birth),
        "view": view.str.upper().to_numpy(dtype=object),
        "scanner": (maker + " " + model).str.strip().to_numpy(dtype=object),
        "date": study.to_numpy(dtype=object),
        "patient": patient.to_numpy(dtype=object),
    }


def columns(root: Path, paths: Any, mapped: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Columns of a table (group, sex, age, view, scanner, date) that the tags of its DICOM files fill.

    Args:
        root: Folder of the data set.
        paths: Images relative to `root`, strings (N,).
        mapped: Roles that the data set has from elsewhere; the headers are not read where nothing is left.

    Returns:
        Role → column of N; empty where the images are not DICOM.

    Raises:
        DataError: DICOM files among others, an unreadable header, or a file without PatientID where that is the group.
    """
    files = np.concatenate([_is_dicom(part) for part in arrow_text(paths, "path")])
    wanted = {role: tag for role, tag in ROLES.items() if role not in mapped}
    if not files.any() or not wanted:
        return {}
    if not files.all():
        raise DataError(
            f"a data set mixes DICOM and other images ({files.sum()} of {len(files)} are DICOM)",
            where=str(root / paths[int(np.argmin(files))]),
            hint="make them two data sets: only DICOM files say whose image they are",
        )
    tags = read_tags([root / path for path in paths])
    nameless = np.flatnonzero(tags["patient"] == "")
    if "group" in wanted and len(nameless):
        raise DataError(
            f"a DICOM file has no PatientID ({len(nameless)} such files), so its patient could cross the splits",
            where=str(root / paths[nameless[0]]),
            hint="list the images in a table with a column of patients, and map it as `columns.group`",
        )
    return {role: tags[tag] for role, tag in wanted.items()}


def _is_dicom(paths: Any) -> np.ndarray:
    """Tell by the extensions of an Arrow array of paths, bool (N,)."""
    import pyarrow.compute as pc

    endings = pc.utf8_lower(pc.utf8_slice_codeunits(paths, -max(map(len, DICOM_EXTENSIONS))))
    found = [pc.ends_with(endings, extension).to_numpy(zero_copy_only=False) for extension in sorted(DICOM_EXTENSIONS)]
    return np.asarray(np.logical_or.reduce(found))


@contextmanager
def _reported(path: str | Path) -> Iterator[None]:
    """Turn what pydicom and its decoders raise into errors that name the file; their warnings are dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bytes behind the pixels, odd tags: one for every file
            try:
                from pydicom.errors import InvalidDicomError
            except ImportError as error:
                raise DataError("DICOM files need the package pydicom", where=str(path), hint=INSTALL) from error
            yield
    except DataError:
        raise
    except OSError as error:
        problem = f"A DICOM file cannot be read: {error.strerror or error}."
        raise UnreadableImageError(problem, where=str(path), hint=RESTORE) from error
    except InvalidDicomError as error:
        problem = "A file is not DICOM: it lacks the mark DICM after the first 128 bytes."
        raise UnreadableImageError(problem, where=str(path), hint=RESTORE) from error
    except Exception as error:  # pydicom raises AttributeError, ValueError, RuntimeError, struct.error, ...
        problem = f"A DICOM file is truncated or damaged: {' '.join(str(error).split())[:300]}"
        raise UnreadableImageError(problem, where=str(path), hint=RESTORE) from error


def _decode(ds: Any, where: str) -> np.ndarray:
    """Stored values of the only frame: integers (H, W), or RGB (H, W, 3)."""
    from pydicom.pixels import get_decoder, pixel_array

    frames = int(ds.get("NumberOfFrames") or 1)
    if frames != 1:
        raise DataError(f"A DICOM file has {frames} frames.", where=where, valid="one frame: a radiograph")
    if "PixelData" not in ds:
        raise UnreadableImageError("A DICOM file has no pixels, or lacks their end.", where=where, hint=RESTORE)
    if ds.BitsStored > 16 or ds.PhotometricInterpretation == "PALETTE COLOR":
        raise DataError(
            f"A DICOM file has {ds.PhotometricInterpretation} pixels of {ds.BitsStored} bits.",
            where=where,
            valid="grey, RGB or YBR pixels of 1 to 16 bits",
        )
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError as error:
            raise DataError(f"The compression {syntax.name} is not supported.", where=where) from error
        if not available:
            raise DataError(f"No decoder for {syntax.name} is installed.", where=where, hint=INSTALL)
    return np.asarray(pixel_array(ds))


def _has_voi(ds: Any) -> bool:
    return bool(ds.get("VOILUTSequence")) or None not in (ds.get("WindowCenter"), ds.get("WindowWidth"))


def _grey_levels(ds: Any, stored: np.ndarray, window: tuple[float, float] | None, where: str) -> Image:
    """Grey level of every stored value, uint8 (2^bits,)."""
    from pydicom.pixels import apply_modality_lut

    values = apply_modality_lut(stored, ds)
    if window is not None:
        levels = _window(values, *window, where)
    elif ds.get("VOILUTSequence"):
        levels = _lookup(ds, ds.VOILUTSequence[0], values)
    elif _has_voi(ds):
        levels = _windowed(ds, values, where)
    else:
        levels = _window(values, float(values.min()), float(values.max()), where)
    return 255 - levels if ds.PhotometricInterpretation == "MONOCHROME1" else levels


def _lookup(ds: Any, item: Any, values: np.ndarray) -> Image:
    """Map values by a VOI lookup table, whose outputs 0 to 2^depth − 1 become 0 to 255.

    pydicom 3.0.2's `apply_voi` wraps the index around in a table of 8-bit entries and truncates rescaled values.
    """
    entries, first, depth = (int(value) for value in item.LUTDescriptor)
    entries = entries or 2**16  # 65,536 does not fit into the descriptor, which writes 0 for it
    table = item.LUTData
    if isinstance(table, bytes):
        order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
        table = np.frombuffer(table, f"{order}u{1 if len(table) < 2 * entries else 2}")
    table = np.asarray(table).reshape(-1)[:entries]
    if len(table) < entries:
        raise ValueError(f"the VOI LUT has {len(table)} of {entries} entries")
    index = np.rint(values).astype(np.int64) - first
    levels: Image = window_to_uint8(table, 0, 2**depth - 1)[index.clip(0, entries - 1)]
    return levels


def _windowed(ds: Any, values: np.ndarray, where: str) -> Image:
    """Map values by the first window of the file.

    pydicom 3.0.2's `apply_windowing` shows images with a negative rescale slope inverted.
    """
    center, width = (float(np.ravel(ds[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID" and width > 0:
        power = (-4 * (values - center) / width).clip(-700, 700)  # exp stays finite
        levels: Image = np.rint(255 / (1 + np.exp(power))).astype(np.uint8)
        return levels
    if function == "LINEAR_EXACT":
        return _window(values, center - width / 2, center + width / 2, where)
    if function == "LINEAR" and width >= 1:
        half = max((width - 1) / 2, 1e-3)  # a width of 1 is a threshold
        return _window(values, center - 0.5 - half, center - 0.5 + half, where)
    raise DataError(
        f"A DICOM file has the VOI function {function} with the window width {width:g}.",
        where=where,
        valid="LINEAR with a width of 1 or more, LINEAR_EXACT or SIGMOID with one above 0",
        hint="set the window: the intensities (low, high) that become black and white",
    )


def _window(values: np.ndarray, low: float, high: float, where: str) -> Image:
    if not high > low:
        raise DataError(f"The window ({low:g}, {high:g}) is empty.", where=where, valid="low < high")
    return window_to_uint8(values, low, high)


def _require_contrast(stored: np.ndarray, bits: int, padding: Any, where: str) -> None:
    """Reject a deep image without a VOI that would come out with a handful of grey levels."""
    image = stored if padding is None else stored[stored != padding]
    used = int(image.max()) - int(image.min()) if image.size else 0
    if bits > 8 and 0 < used < 2**bits * MIN_LEVELS / 256:  # a blank image has nothing to lose
        raise DataError(
            f"A DICOM file has no VOI, and its pixels use {used + 1} of {2**bits} stored values:"
            f" fewer than {MIN_LEVELS} of 256 grey levels would be left.",
            where=where,
            hint="set the window: the intensities (low, high) that become black and white",
        )


def _read_head(path: Path) -> bytes | OSError:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        return error


def _read_header(path: Path, head: bytes | OSError) -> list[str]:
    """Texts of `TAGS` between the character set and the rows; `head` is the file's beginning."""
    with _reported(path):
        from pydicom import dcmread

        if isinstance(head, OSError):
            raise head
        try:
            ds = dcmread(BytesIO(head), stop_before_pixels=True, specific_tags=list(TAGS))
            whole = "Rows" in ds
        except Exception:  # a long header was cut within an element
            whole = False
        if not whole:
            ds = dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        if "Rows" not in ds:  # it stands behind all the others
            raise UnreadableImageError("A DICOM header ends early or has no image.", where=str(path), hint=RESTORE)
        return [_text(ds.get(tag)) for tag in TAGS[1:-1]]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return (value if isinstance(value, str) else " ".join(map(str, value))).strip()


def _date(cells: "pd.Series[str]") -> "pd.Series[str]":
    """Dates as YYYYMMDD, "" where there is none; files before DICOM 3.0 wrote 2014.09.15."""
    digits = cells.str.replace(".", "", regex=False)
    return digits.where(digits.str.fullmatch(r"\d{8}").astype(bool), "")


def _years(ages: "pd.Series[str]", study: "pd.Series[str]", birth: "pd.Series[str]") -> np.ndarray:
    """Ages in years, float32 (N,): from 058Y, 011M, 003W or 002D, else from the dates, else NaN."""
    parts = ages.str.extract(r"^(\d{1,3})([YMWD]?)$")
    unit = parts[1].map({"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25, "": 1.0})
    written = pd.to_numeric(parts[0]) * unit
    born, seen = (pd.to_datetime(dates, format="%Y%m%d", errors="coerce") for dates in (birth, study))
    days = (seen - born).dt.days
    return written.fillna((days / 365.25).where(days >= 0)).to_numpy(dtype=np.float32)
