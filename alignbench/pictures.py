"""Pictures from outside: one rule for every image that is trained on, compared or evaluated.

PNG, JPEG and WebP, whatever the file is called; of an animation the first frame. The rotation that EXIF asks for is
applied; transparent pixels are composited on white; of 16 bits the higher eight are kept; grey and palette become RGB.
Colour profiles are not applied. CMYK and other modes, and more than ``MOST_PIXELS``, are refused.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from alignbench.errors import DataError
from alignbench.outside import foreign, opened, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 2**26  # 8,192 x 8,192
DEEP = ("I;16", "I;16L", "I;16B")  # grey of 16 bits; of colours Pillow keeps the higher eight itself
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")


def size(file: Path) -> tuple[int, int]:
    """Width and height of an image file in pixels, by its header alone.

    Raises:
        DataError: the file is no such image, or too large.
    """
    with opened(file) as stream, _reading(str(file)):
        image = Image.open(stream, formats=FORMATS)
        _check_size(image, str(file))
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # PNG's own reads the pixels
        return (image.height, image.width) if turned else image.size


def read(file: Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        DataError: the file is no such image, is damaged, or too large.
    """
    return decode(read_bytes(file), str(file))


def decode(content: bytes, where: str) -> Image.Image:
    """An encoded image as RGB; see ``read``."""
    with _reading(where):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(image, where)
        return as_rgb(image, where)


def as_rgb(image: Image.Image, where: str) -> Image.Image:
    """A picture of any mode as RGB, by the rule of this module.

    Raises:
        DataError: its pixels cannot be decoded, or its mode is none of those.
    """
    with _reading(where):
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in DEEP and "transparency" not in image.info:
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode not in PLAIN:
            raise DataError(f"{where}: an image of mode {image.mode}; save it as RGB or grey of 8 or 16 bits")
        if not image.has_transparency_data:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def from_array(value: Any, where: str) -> Image.Image:
    """An array of whole numbers from 0 to 255, ``[height, width, 3]``, as RGB.

    Raises:
        DataError: it is something else.
    """
    with foreign(where, "expected an array [height, width, 3] of whole numbers from 0 to 255"):
        pixels = np.asarray(value)
        if pixels.dtype.kind not in "iu" or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"got {pixels.dtype} {list(pixels.shape)}")
        if pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"got values from {pixels.min()} to {pixels.max()}")
        return Image.fromarray(pixels.astype(np.uint8))


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """One sentence for whatever Pillow raises."""
    expected = "not an image that can be read: expected PNG, JPEG or WebP"
    with foreign(where, expected):
        try:
            yield
        except UnidentifiedImageError as error:  # its message names an object in memory
            raise DataError(f"{where}: {expected}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{where}: too many pixels; up to {MOST_PIXELS:,} are read: make it smaller") from error


def _check_size(image: Image.Image, where: str) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise DataError(
            f"{where}: {image.width} x {image.height} pixels; up to {MOST_PIXELS:,} are read: make it smaller"
        )
