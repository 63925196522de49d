"""Pictures from outside: pixels by the documented rule, against files that are made here byte by byte."""

import io
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignbench import pictures
from alignbench.errors import DataError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of raw rows; ``colour``: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    each = len(rows) // height
    filtered = b"".join(b"\0" + rows[start : start + each] for start in range(0, len(rows), each))
    data = chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes) -> list[Any]:
    return np.asarray(pictures.decode(content, "x")).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        (png(2, 1, 16, 0, struct.pack(">2H", 0x12FF, 0xFF00)), [[[0x12] * 3, [0xFF] * 3]]),
        (png(1, 1, 16, 2, struct.pack(">3H", 0x12FF, 0x3400, 0x56AB)), [[[0x12, 0x34, 0x56]]]),
        (png(1, 1, 16, 6, struct.pack(">4H", 0x1234, 0x3400, 0x56AB, 0)), [[[255, 255, 255]]]),
        (png(2, 1, 8, 4, bytes([10, 255, 10, 0])), [[[10] * 3, [255] * 3]]),
        (png(2, 1, 8, 6, bytes([10, 20, 30, 255, 0, 0, 0, 51])), [[[10, 20, 30], [204] * 3]]),
        (png(8, 1, 1, 0, b"\x0f"), [[[0] * 3] * 4 + [[255] * 3] * 4]),
        (
            png(2, 1, 8, 3, bytes([0, 1]), chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6])) + chunk(b"tRNS", bytes([0]))),
            [[[255] * 3, [4, 5, 6]]],
        ),
        (png(2, 1, 8, 0, bytes([7, 8]), chunk(b"tRNS", struct.pack(">H", 7))), [[[255] * 3, [8] * 3]]),
        (
            png(2, 1, 8, 2, bytes([7, 8, 9, 1, 1, 1]), chunk(b"tRNS", struct.pack(">3H", 7, 8, 9))),
            [[[255] * 3, [1] * 3]],
        ),
    ],
    ids=[
        "grey16",
        "rgb16",
        "rgba16",
        "grey and alpha",
        "rgba",
        "bits",
        "palette with alpha",
        "a clear grey",
        "a clear colour",
    ],
)
def test_pixels_by_hand(content: bytes, pixels: list[Any]) -> None:
    assert decoded(content) == pixels


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_rotations(tmp_path: Path, orientation: int, late: bool) -> None:
    """Of a picture of 2 x 3 pixels; what each of the eight values means, as EXIF defines it."""
    pixels = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)
    flipped = pixels[:, ::-1]
    expected = {
        1: pixels, 2: flipped, 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 7: np.rot90(flipped, -1), 8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    mark = chunk(b"eXIf", exif(orientation))
    content = png(2, 3, 8, 2, pixels.tobytes(), **{"after" if late else "before": mark})
    (tmp_path / "f.png").write_bytes(content)
    assert np.array_equal(np.asarray(pictures.read(tmp_path / "f.png")), expected)
    if not late:
        assert pictures.size(tmp_path / "f.png") == (expected.shape[1], expected.shape[0])


def test_the_kind_is_in_the_content_and_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind, options in {"png": {}, "webp": {"lossless": True}}.items():
        content = encoded(red, kind, save_all=True, append_images=[blue], **options)
        (tmp_path / "f.jpg").write_bytes(content)
        assert np.asarray(pictures.read(tmp_path / "f.jpg"))[0, 0].tolist() == [255, 0, 0]


PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
BROKEN = {
    "nothing": b"",
    "text": b"no image",
    "half a PNG": encoded(PIXELS, "png")[:800],
    "half a JPEG": encoded(PIXELS, "jpeg")[:400],
    "half a WebP": encoded(PIXELS, "webp")[:200],
    "a broken chunk": png(1, 1, 8, 0, b"\0", before=chunk(b"tRNS", b"")[:-1] + b"x"),
    "GIF": encoded(PIXELS, "gif"),
    "BMP": encoded(PIXELS, "bmp"),
    "EPS": encoded(PIXELS, "eps"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture(tmp_path: Path, name: str) -> None:
    (tmp_path / "f.png").write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=r"f\.png: not an image that can be read: expected PNG, JPEG or WebP"):
        pictures.read(tmp_path / "f.png")


def test_other_colours_are_refused() -> None:
    with pytest.raises(DataError, match="x: an image of mode CMYK; save it as RGB or grey"):
        pictures.decode(encoded(PIXELS.convert("CMYK"), "jpeg"), "x")


@pytest.mark.parametrize("side", [8_193, 12_000, 60_000])
def test_a_picture_that_would_fill_the_memory(tmp_path: Path, side: int) -> None:
    (tmp_path / "f.png").write_bytes(png(side, side, 8, 0, bytes(side)))
    started = time.monotonic()
    for read in (pictures.size, pictures.read):
        with pytest.raises(DataError, match=r"f\.png: .*pixels; up to 67,108,864 are read: make it smaller"):
            read(tmp_path / "f.png")
    assert time.monotonic() - started < 1


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for read in (pictures.size, pictures.read):
        with pytest.raises(DataError, match="not a pipe, socket or device"):
            read(tmp_path / "pipe.png")
        with pytest.raises(DataError, match="Is a directory"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[[0.5, 0.5, 0.5]]], "got float64 [1, 1, 3]"),
        ([[[256, 0, 0]]], "got values from 0 to 256"),
        ([[[-1, 0, 0]]], "got values from -1 to 0"),
        ([[0, 0, 0]], "got int64 [1, 3]"),
        ([[[0], [0, 0]]], "inhomogeneous"),
        ([], "got float64 [0]"),
        ("red.png", "got <U7 []"),
        (None, "got object []"),
    ],
)
def test_arrays_that_are_no_picture(value: object, message: str) -> None:
    with pytest.raises(DataError, match="x: expected an array") as raised:
        pictures.from_array(value, "x")
    assert message in str(raised.value)
    assert np.asarray(pictures.from_array([[[0, 128, 255]]], "x")).tolist() == [[[0, 128, 255]]]
