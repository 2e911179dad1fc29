"""Files of images as they are: deep gray, orientation, transparency, CMYK. Right, or refused."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from rmlora_jax.data import load_images, subsets
from rmlora_jax.data.folder import is_image
from rmlora_jax.data.vision import open_image, pixels
from rmlora_jax.errors import UserError
from rmlora_jax.hub.info import Info
from rmlora_jax.inference.inputs import find_images, images_of, read_image

DEEP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
RIGHT = np.rint(DEEP / 257).astype(np.uint8)  # the PNG specification: value * 255 / 65535


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(data, bits, *, order="<", photometric=1, kind=1):
    """A gray TIFF of 16 x 16, uncompressed; ``kind``: 1 unsigned, 2 signed, 3 floating."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 16,
            279: len(data), 339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()
    )
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    return start + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + data


def png(array, colour):
    """A PNG of 16 bits a channel, which pillow reads and does not write."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
             (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def packed(values):
    """12 bits a value, the first bits first."""
    bits = (values.ravel()[:, None] >> np.arange(11, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).ravel()).tobytes()


FILES = {
    "PNG": encoded(Image.fromarray(DEEP), "PNG"),
    "PGM": encoded(Image.fromarray(DEEP), "PPM"),
    "PGM in words": b"P2 16 16 65535\n" + " ".join(map(str, DEEP.ravel())).encode(),
    "PGM to 4095": b"P5 16 16 4095\n" + (DEEP >> 4).astype(">u2").tobytes(),
    "TIFF": tiff(DEEP.astype("<u2").tobytes(), 16),
    "TIFF, big end first": tiff(DEEP.astype(">u2").tobytes(), 16, order=">"),
    "TIFF, LZW": encoded(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
    "TIFF, 0 is white": tiff((65535 - DEEP).astype("<u2").tobytes(), 16, photometric=0),
    "TIFF of 12 bits": tiff(packed(DEEP >> 4), 12),
}


@pytest.mark.parametrize("name", FILES)
def test_deep_gray(name):
    for channels in (1, 3):
        found = pixels(open_image(FILES[name]), channels)
        assert found.shape == (16, 16, channels) and found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.repeat(RIGHT[..., None], channels, -1))
    small = np.asarray(Image.fromarray(RIGHT).resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels(open_image(FILES[name]), 1, 8)[..., 0], small)
    # So does --predict, from a file and from an image that pillow has opened.
    with Image.open(io.BytesIO(FILES[name])) as opened:
        found, _ = read_image(opened, Info("image_classification"), 16)
    np.testing.assert_array_equal(found[..., 1], RIGHT)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (tiff(np.linspace(0, 1, 256, dtype="<f4").tobytes(), 32, kind=3), "F"),
        (tiff(DEEP.astype("<u4").tobytes(), 32), "I"),
        (tiff(DEEP.astype("<i4").tobytes(), 32, kind=2), "I"),
        (tiff((DEEP >> 1).astype("<i2").tobytes(), 16, kind=2), "I"),
        (tiff(RIGHT.astype(np.int8).tobytes(), 8, kind=2), "L"),
        (b"Pf\n16 16\n-1.0\n" + bytes(1024), "F"),
    ],
)
def test_gray_without_a_known_range_is_refused_by_name(data, kind, tmp_path):
    assert open_image(data).mode == kind
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.tif").write_bytes(data)
    with pytest.raises(UserError, match=re.escape(
        "cannot be read as an image: its values are signed, floating or of 32 bits"
    )):
        load_images("folder", data_dir=tmp_path, validation=1).train[0]
    with pytest.raises(ValueError, match="save it with 8 or 16 unsigned bits"):
        read_image(Image.open(io.BytesIO(data)), Info("image_classification"), 16)


def test_deep_colour():
    colours = np.stack([DEEP, DEEP.T, DEEP[::-1]], -1)
    clear = np.concatenate([colours, np.zeros_like(DEEP)[..., None]], -1)
    for data in (png(colours, 2), png(clear, 6)):
        found = pixels(open_image(data)).astype(int)
        assert np.abs(found - colours / 257).max() <= 1
    gray = np.stack([DEEP, np.zeros_like(DEEP)], -1)
    assert np.abs(pixels(open_image(png(gray, 4)))[..., 2] - DEEP / 257).max() <= 1


UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_photos_are_turned_upright(kind, tmp_path):
    from transformers.image_utils import load_image

    stored = np.random.RandomState(0).randint(0, 256, (12, 20, 3)).astype(np.uint8)
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    plain = pixels(open_image(encoded(Image.fromarray(stored), kind, **options)))
    for turn, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[274] = turn
        path = tmp_path / f"{turn}.{kind.lower()}"
        path.write_bytes(encoded(Image.fromarray(stored), kind, exif=exif, **options))
        found = pixels(open_image(path.read_bytes()))
        np.testing.assert_array_equal(found, upright(plain))
        np.testing.assert_array_equal(found, np.asarray(load_image(str(path))))
        with Image.open(path) as opened:
            given, _ = read_image(opened, Info("image_classification", stored_size=8), 16)
        np.testing.assert_array_equal(given, pixels(Image.fromarray(found), 3, 8))
    # Deep gray is turned, too.
    deep = encoded(Image.fromarray(DEEP), "TIFF", tiffinfo={274: 6})
    np.testing.assert_array_equal(pixels(open_image(deep), 1)[..., 0], np.rot90(RIGHT, -1))


def test_a_large_photo_that_is_decoded_smaller_is_turned_too():
    smooth = Image.fromarray(np.random.RandomState(0).randint(0, 256, (3, 4, 3), np.uint8))
    smooth = smooth.resize((400, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    found = pixels(open_image(encoded(smooth, "JPEG", exif=exif)), 3, 32).astype(int)
    right = np.rot90(pixels(open_image(encoded(smooth, "JPEG")), 3, 32), -1)
    assert np.abs(found - right).max() <= 1  # resizing sums rows and columns in another order


def test_damaged_exif_leaves_the_pixels():
    image = Image.fromarray(RIGHT)
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no", b"Exif\0\0MM\0*\0\0\0\x08\0\x05"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pixels(open_image(encoded(image, "PNG", exif=exif)), 1)
        np.testing.assert_array_equal(found[..., 0], RIGHT)


def test_transparency_is_left_out():
    """The pixels behind it are those of transformers' load_image, and no warning comes."""
    colours = np.random.RandomState(0).randint(0, 256, (256, 3), np.uint8)
    index = np.arange(256, dtype=np.uint8).reshape(16, 16)
    palette = Image.fromarray(index)
    palette.putpalette(colours.tobytes())
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(256))}):
        found = pixels(open_image(encoded(palette, "PNG", **options)))
        np.testing.assert_array_equal(found, colours[index])
    found = pixels(open_image(encoded(palette, "GIF", transparency=3)))
    np.testing.assert_array_equal(found, colours[index])
    rgb = Image.fromarray(colours[index])
    one = encoded(rgb, "PNG", transparency=tuple(colours[7].tolist()))
    np.testing.assert_array_equal(pixels(open_image(one)), colours[index])
    clear = rgb.copy()
    clear.putalpha(Image.fromarray(index))
    gray = Image.fromarray(RIGHT)
    gray.putalpha(Image.fromarray(index.T.copy()))
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(open_image(encoded(clear, kind))), colours[index])
        np.testing.assert_array_equal(pixels(open_image(encoded(gray, kind)))[..., 1], RIGHT)


def test_cmyk():
    flat = np.random.RandomState(0).randint(0, 256, (6, 4)).astype(int)
    ink = np.repeat(np.repeat(flat.reshape(2, 3, 4), 16, 0), 16, 1).astype(np.uint8)
    right = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    image = Image.frombytes("CMYK", (48, 32), ink.tobytes())
    assert np.abs(pixels(open_image(encoded(image, "TIFF"))) - right).max() <= 1
    adobe = encoded(image, "JPEG", quality=100)
    assert b"Adobe" in adobe  # such files hold 255 - ink
    assert np.abs(pixels(open_image(adobe)) - right).max() <= 1


def test_cached_pixels_are_those_of_this_decoder(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(FILES["PNG"])
    source = load_images("folder", data_dir=tmp_path, validation=1).train
    before = subsets.fingerprint(source, 8)
    assert before == subsets.fingerprint(source, 8)
    monkeypatch.setattr(subsets, "DECODER", "1")
    assert before != subsets.fingerprint(source, 8)


def test_names_at_the_command_line(tmp_path, monkeypatch):
    names = [" a.png", "b.png ", "~c.png", "é.png", "e\u0301.png", "d,e.png", "<f>.png"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(FILES["PNG"])
    for name in names:
        assert images_of([name]) == [name]
    assert sorted(images_of([str(tmp_path)])) == sorted(str(tmp_path / name) for name in names)
    assert images_of([" a.png,b.png , ~c.png"]) == [" a.png", "b.png ", "~c.png"]
    assert images_of(["~c*.png"]) == ["~c.png"]
    for name in ("a", "b "):
        (tmp_path / "~photos" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "~photos" / name / f"{i}.png ").write_bytes(FILES["PNG"])
    assert load_images("folder", data_dir="~photos", validation=1).class_names == ("a", "b ")
    assert is_image("b.png ") and not is_image("b.png x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "g.png").write_bytes(FILES["PNG"])
    assert find_images("~/g.png") == [str(tmp_path / "home" / "g.png")]
    assert images_of(["~/*.png"]) == [str(tmp_path / "home" / "g.png")]
    with pytest.raises(UserError, match=r"there is no file or folder .~nobody\.png"):
        find_images("~nobody.png")
