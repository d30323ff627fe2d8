"""Reading images: every kind of file comes out as asked, and a damaged one is an error that says why."""

import os
import struct
import subprocess
import sys
import threading
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules import io
from datamodules.errors import DataError, UnreadableImageError


def photo(height=60, width=80):
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(rows / 9 + k) * np.cos(columns / (7 + k)) for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 5, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


def encode(image, form, **options):
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def as_pillow(image, mode):
    return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("source", ["RGB", "L"])
def test_lossless_formats_return_the_stored_pixels(form, source):
    stored = photo().convert(source)
    data = encode(stored, form)
    np.testing.assert_array_equal(io.decode_image(data, mode="rgb"), as_pillow(stored, "RGB"))
    unchanged = io.decode_image(data, mode="unchanged")
    np.testing.assert_array_equal(unchanged, as_pillow(stored, source))
    grey = io.decode_image(data, mode="grey")
    assert grey.shape == (60, 80, 1)
    assert np.abs(grey.astype(int) - as_pillow(stored, "L")).max() <= 1


@pytest.mark.parametrize("source", ["RGBA", "LA", "P", "1"])
def test_png_kinds_lose_alpha_and_palette_only(source):
    stored = photo().convert(source)
    data = encode(stored, "PNG")
    for mode, pillow in (("rgb", "RGB"), ("grey", "L")):
        image = io.decode_image(data, mode=mode)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert np.abs(image.astype(int) - as_pillow(stored.convert("RGB"), pillow)).max() <= 1


def test_transparent_grey_radiograph_keeps_its_grey_values():
    grey = photo().convert("L")
    rgba = grey.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.full((60, 80), 40, np.uint8)))
    np.testing.assert_array_equal(io.decode_image(encode(rgba, "PNG"), mode="grey"), np.asarray(grey)[..., None])


def test_jpegs_match_pillow():
    for options in ({}, {"progressive": True}):
        data = encode(photo(), "JPEG", quality=90, **options)
        expected = np.asarray(Image.open(BytesIO(data))).astype(int)
        assert np.abs(io.decode_image(data, mode="rgb") - expected).mean() < 0.5
    data = encode(photo().convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(io.decode_image(data, mode="rgb") - expected).mean() < 3


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    data = encode(photo(), "JPEG", quality=95, exif=exif)
    turned = np.asarray(photo().transpose(Image.Transpose.ROTATE_270)).astype(int)
    for mode in ("rgb", "grey"):
        image = io.decode_image(data, mode=mode)
        assert image.shape[:2] == (80, 60)
    assert np.abs(io.decode_image(data, mode="rgb") - turned).mean() < 12


def test_deep_images_need_a_window(tmp_path):
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(deep).save(path)
    for mode in ("rgb", "grey", "unchanged"):
        with pytest.raises(DataError, match=r"(?s)uint16.*window.*deep\.png"):
            io.read_image(path, mode=mode)
    image = io.read_image(path, mode="grey", window=(1000, 40000))
    np.testing.assert_array_equal(image[..., 0], io.window_to_uint8(deep, 1000, 40000))
    assert io.read_image(path, mode="rgb", window=(1000, 40000)).shape == (64, 64, 3)


def test_window_ends_and_middle():
    values = np.array([0, 100, 149, 150, 151, 200, 65535], np.uint16)
    np.testing.assert_array_equal(io.window_to_uint8(values, 100, 200), [0, 0, 125, 128, 130, 255, 255])
    with pytest.raises(DataError, match="empty"):
        io.window_to_uint8(values, 5, 5)


def test_what_opencv_declines_goes_to_pillow(monkeypatch):
    monkeypatch.setattr(io, "_decode_with_opencv", lambda *_: None)
    stored = photo()
    np.testing.assert_array_equal(io.decode_image(encode(stored, "PNG"), mode="rgb"), np.asarray(stored))
    assert io.decode_image(encode(stored.convert("L"), "PNG"), mode="unchanged").shape == (60, 80, 1)
    deep = encode(Image.fromarray(np.full((4, 5), 300, np.uint16)), "PNG")
    with pytest.raises(DataError, match="window"):
        io.decode_image(deep, mode="grey")
    assert io.decode_image(deep, mode="rgb", window=(0, 600)).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "version https://git-lfs"),
        (b"<html>404 Not Found</html>", "not an image"),
        (b"\xff\xd8\xff\xd9", "An image|not an image"),
    ],
)
def test_files_that_are_no_images_say_why(tmp_path, data, reason):
    path = tmp_path / "no_image.jpg"
    path.write_bytes(data)
    with pytest.raises(UnreadableImageError, match=rf"(?s)({reason}).*no_image\.jpg"):
        io.read_image(path, mode="rgb")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"(?s)No such file.*lost\.png"):
        io.read_image(tmp_path / "lost.png", mode="rgb")
    with pytest.raises(UnreadableImageError, match="directory"):
        io.read_image(tmp_path, mode="rgb")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})])
def test_truncation_is_an_error(capfd, options, fraction):
    data = encode(photo(300, 400), options[0], **options[1])
    with pytest.raises(UnreadableImageError):
        io.decode_image(data[: int(len(data) * fraction)], mode="rgb")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_opencv_never_sees_a_file_without_its_end(monkeypatch, form):
    # OpenCV before 5 fills the missing part of a JPEG with grey, or with an earlier image (opencv#26488).
    monkeypatch.setattr(io, "_decode_with_opencv", lambda *_: np.full((300, 400, 3), 128, np.uint8))
    data = encode(photo(300, 400), form)
    assert (io.decode_image(data, mode="rgb") == 128).all()
    with pytest.raises(UnreadableImageError, match="truncated"):
        io.decode_image(data[: len(data) // 2], mode="rgb")


@pytest.mark.parametrize("mode", ["rgb", "grey"])
def test_a_jpeg_with_a_proper_end_but_half_its_data_is_an_error(capfd, mode):
    exif = Image.Exif()
    exif[0x0112] = 8
    for options in ({}, {"exif": exif}):
        data = encode(photo(300, 400), "JPEG", quality=90, **options)
        for kept in (len(data) // 2, len(data) - 300):
            for at_least in (None, 70):
                with pytest.raises(UnreadableImageError, match="ends early"):
                    io.decode_image(data[:kept] + data[-2:], mode=mode, at_least=at_least)
    assert capfd.readouterr().err == ""


def test_grey_edges_alone_are_no_damage():
    flat = Image.fromarray(np.full((40, 40, 3), 128, np.uint8))
    assert (io.decode_image(encode(flat, "JPEG"), mode="rgb") == 128).all()


def test_harmless_flaws_are_read_without_noise(capfd):
    jpeg = encode(photo(), "JPEG", quality=95)
    clean = io.decode_image(jpeg, mode="rgb")
    stray_bytes = jpeg[:-2] + b"\x12\x34\x56" * 10 + jpeg[-2:]
    np.testing.assert_array_equal(io.decode_image(stray_bytes, mode="rgb"), clean)
    after_the_end = jpeg + bytes(100)
    assert np.abs(io.decode_image(after_the_end, mode="rgb").astype(int) - clean).mean() < 0.5
    bad_profile = encode(photo(), "PNG", icc_profile=b"junk" * 5)
    np.testing.assert_array_equal(io.decode_image(bad_profile, mode="rgb"), np.asarray(photo()))
    assert capfd.readouterr().err == ""


def test_a_damaged_png_is_an_error_without_noise(capfd):
    data = bytearray(encode(photo(), "PNG"))
    data[len(data) // 2] ^= 0x55
    with pytest.raises(UnreadableImageError, match="damaged"):
        io.decode_image(bytes(data), mode="rgb")
    # A stream that is broken under a correct checksum.
    pixels = zlib.compress(bytes(1000))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    short = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with pytest.raises(UnreadableImageError):
        io.decode_image(short, mode="rgb")
    assert capfd.readouterr().err == ""


def test_only_decoder_messages_are_kept_from_stderr(capfd):
    class Decoder:
        error = cv2.error

        @staticmethod
        def imdecode(data, flags):
            os.write(2, b"from a thread\nlibpng warning: iCCP: too short\nCorrupt JPEG data: premature end\n")
            return data

    image, noise = io._quietly(Decoder, np.zeros(3, np.uint8), 0)
    assert len(image) == 3
    assert b"premature end" in noise
    assert capfd.readouterr().err == "from a thread\n"
    assert io._quietly(cv2, np.frombuffer(encode(photo(), "PNG"), np.uint8), 1)[1] == b""


def test_stderr_of_other_threads_and_of_forks_survives(capfd):
    noisy = encode(photo(), "JPEG")[:-2] + b"\x12\x34\x56\xff\xd9"
    running = True

    def decode():
        while running:
            io.decode_image(noisy, mode="rgb")

    thread = threading.Thread(target=decode)
    thread.start()
    for number in range(200):
        os.write(2, b"line %d\n" % number)
    child = os.fork()
    if child == 0:
        io.decode_image(noisy, mode="rgb")
        os.write(2, b"from the child\n")
        os._exit(0)
    os.waitpid(child, 0)
    running = False
    thread.join()
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == sorted([f"line {n}" for n in range(200)] + ["from the child"])


def test_import_is_light():
    script = (
        "import sys, datamodules.io, datamodules.transforms;"
        "print(sorted({'cv2', 'PIL', 'albumentations', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_list_images_walks_once_in_order(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "a/x/1.JPEG", "a.webp", ".hidden.png", ".git/3.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    expected = ["a.webp", "a/x/1.JPEG", "b/10.jpg", "b/2.PNG", "linked/x/1.JPEG"]
    assert io.list_images(tmp_path) == expected
    with pytest.raises(DataError, match=r"(?s)No such file.*nowhere"):
        io.list_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="Not a directory"):
        io.list_images(tmp_path / "a.webp")


def test_cache_decodes_once_and_stops_at_its_cap():
    decoded = []

    def decode(path):
        decoded.append(path)
        return np.full((10, 10, 1), ord(path), np.uint8)

    cache = io.ImageCache(max_bytes=250)
    for _ in range(2):
        for path in "abc":
            assert (cache.get(path, decode) == ord(path)).all()
    assert decoded == ["a", "b", "c", "c"]
    assert (len(cache), cache.nbytes) == (2, 200)
    with pytest.raises(ValueError, match="read-only"):
        cache.get("a", decode)[0] = 1


@pytest.mark.parametrize("mode", ["grey", "rgb"])
@pytest.mark.parametrize(
    ("at_least", "expected"), [(None, (600, 800)), (301, (600, 800)), (300, (300, 400)), (70, (75, 100))]
)
def test_a_jpeg_may_be_decoded_smaller(mode, at_least, expected):
    data = encode(photo(600, 800), "JPEG", quality=95)
    image = io.decode_image(data, mode=mode, at_least=at_least)
    assert image.shape == (*expected, 1 if mode == "grey" else 3)
    whole = io.decode_image(data, mode=mode)
    averaged = cv2.resize(whole, expected[::-1], interpolation=cv2.INTER_AREA).reshape(image.shape)
    error = np.mean((image.astype(float) - averaged) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 38


def test_a_smaller_jpeg_is_anti_aliased():
    noise = np.random.default_rng(0).normal(128, 40, (1024, 1024)).clip(0, 255).astype(np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", quality=100)
    small = io.decode_image(data, mode="grey", at_least=256)
    averaged = cv2.resize(noise, (256, 256), interpolation=cv2.INTER_AREA)
    assert small.shape == (256, 256, 1)
    assert small.std() < 2 * averaged.std()


def test_other_formats_and_odd_files_are_decoded_whole():
    assert io.decode_image(encode(photo(600, 800), "PNG"), mode="rgb", at_least=10).shape == (600, 800, 3)
    assert io.jpeg_reduction(b"\xff\xd8\xff\xe0\x00\x04ab", 10) == 1
    assert io.jpeg_reduction(b"", 10) == 1
    progressive = encode(photo(600, 800), "JPEG", progressive=True, exif=b"Exif\0\0" + b"\0" * 500)
    assert io.jpeg_reduction(progressive, 150) == 4
