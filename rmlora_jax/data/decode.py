"""Compressed images to uint8 arrays on the host, with pillow."""

import io

import numpy as np
from PIL import Image

# What a file may be, whatever its name says. Pillow knows more formats, and hands one of them (EPS)
# to another program, which runs what is in it.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# A file of a few bytes can claim any number of pixels. So many are allowed whatever its size, and
# beyond them so many a byte, which even an empty page in black and white does not reach.
FREE_PIXELS = 1 << 22
MOST_PIXELS_A_BYTE = 10_000

_MODES = {1: "L", 3: "RGB"}


def decode(encoded: bytes, channels: int = 3, size: int | None = None) -> np.ndarray:
    """A PNG, JPEG or other image file as uint8 (H, W, channels).

    Args:
      encoded: the file's bytes. Palettes, alpha, CMYK and gray become ``channels`` channels.
      channels: 1 or 3.
      size: if given, the result is (size, size, channels): the shorter side is resized to ``size``
        (bilinear, antialiased) and the middle taken. JPEGs are then decoded at the smallest of
        1/1, 1/2, 1/4 and 1/8 of their size that is still large enough, which is several times
        faster.

    >>> file = io.BytesIO()
    >>> Image.new("L", (6, 4), 7).save(file, "PNG")
    >>> decode(file.getvalue()).shape, decode(file.getvalue(), 1, size=2).ravel().tolist()
    ((4, 6, 3), [7, 7, 7, 7])
    """
    return pixels(open_image(encoded), channels, size)


def open_image(encoded: bytes) -> Image.Image:
    """The file's header, read; its pixels are decoded when they are first needed.

    Raises:
      Exception: of any kind, for a file that is damaged, or that claims more pixels than it can
        have.
    """
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = image.size
    if width * height > max(FREE_PIXELS, MOST_PIXELS_A_BYTE * len(encoded)):
        raise ValueError(f"it claims {width} x {height} pixels in {len(encoded)} bytes")
    return image


def pixels(image: Image.Image, channels: int = 3, size: int | None = None) -> np.ndarray:
    """`decode` of an image of pillow, whose file, if it is still to be read, is changed by it."""
    mode = _MODES[channels]
    if size is not None:
        image.draft(mode, (size, size))
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None:
        image = _square(image, size)
    array = np.asarray(image)
    return array[..., None] if channels == 1 else array


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, C) to (size, size, C): shorter side to ``size``, then the middle (bilinear)."""
    pil = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(_square(pil, size)).reshape(size, size, image.shape[-1])


def _square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
