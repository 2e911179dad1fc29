"""Images as arrays: decoded by pillow on the host, cropped and resized on the accelerator.

`augment` is called inside jit. Every image draws from its own key, ``fold_in(key, position in the
global batch)``: the same numbers however the batch is split over devices, processes and
micro-batches. Resizing is two matrix products with interpolation matrices, one for rows and one for
columns, which is what an accelerator does best; its values are pillow's (bilinear, antialiased when
shrinking).
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from rmlora_jax.models.processor import Resize

# Formats that are read, whatever the file is called. Pillow knows more, and hands one of them (EPS)
# to another program, which runs the code inside.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# A file of a few bytes can claim any number of pixels. FREE_PIXELS are read whatever the file's
# size, more only up to MOST_PIXELS_A_BYTE for each of its bytes, which even an empty page in black
# and white stays below.
FREE_PIXELS = 1 << 22
MOST_PIXELS_A_BYTE = 10_000

DECODER = "2"  # raised whenever a file gives other pixels than before; caches are named by it

_MODES = {1: "L", 3: "RGB"}
_MAX = 255.0
_ORIENTATION, _BITS, _PHOTOMETRIC, _FORMAT = 274, 258, 262, 339  # tags of EXIF and of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the last two
_DEEP = {("I", "PPM"), ("I", "PNG")}  # pillow scales these to 16 bits
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def open_image(encoded: bytes) -> Image.Image:
    """The file's header, read; its pixels are decoded when they are first needed.

    Raises:
      Exception: of any kind, for a damaged file or one that claims more pixels than it can hold.
    """
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = image.size
    if width * height > max(FREE_PIXELS, MOST_PIXELS_A_BYTE * len(encoded)):
        raise ValueError(f"it claims {width} x {height} pixels in {len(encoded)} bytes")
    return image


def pixels(
    image: Image.Image, channels: int = 3, size: int | Resize | None = None
) -> np.ndarray:
    """An image that `open_image` opened as uint8 (H, W, channels), upright.

    It is turned as its EXIF orientation says, and alpha is left out: transformers' ``load_image``
    gives the same pixels, except for gray of more than 8 bits, which it clips; see `in_8_bits`.

    Args:
      image: palettes, alpha, CMYK and gray become ``channels`` channels. How its file is decoded is
        changed, where that has not happened yet.
      channels: 1 or 3.
      size: if given, the result is (size, size, channels): the shorter side is resized to ``size``
        (bilinear, antialiased) and the middle taken. JPEGs are then decoded at the smallest of
        1/1, 1/2, 1/4 and 1/8 of their size that is still large enough, which is several times
        faster. A `Resize` says itself what becomes of an image, which is decoded as it is.

    Raises:
      Exception: of any kind, for a damaged file or values without a known range.
    """
    mode = _MODES[channels]
    if isinstance(size, int):
        image.draft(mode, (size, size))
    image = _upright(in_8_bits(image))
    image.info.pop("transparency", None)  # pillow would look for a colour to keep for it
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None:
        image = _sized(image, size)
    array = np.asarray(image)
    return array[..., None] if channels == 1 else array


def in_8_bits(image: Image.Image) -> Image.Image:
    """Gray of 9 to 16 bits as 8 bits; any other image of 8 bits as it is.

    A value becomes ``value * 255 / most``, rounded, as the PNG specification has it, where ``most``
    is the largest value of that many bits. Pillow itself cuts all values above 255.

    Raises:
      ValueError: gray of 32 bits, signed or floating: no black and white are agreed on for it.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    kind = tags.get(_FORMAT, (_UNSIGNED,))
    deep = image.mode in ("I", "F") and (image.mode, image.format) not in _DEEP
    if deep or set(kind if isinstance(kind, tuple) else (kind,)) != {_UNSIGNED}:
        raise ValueError(
            "its values are signed, floating or of 32 bits, and nothing says which are black and "
            "white; save it with 8 or 16 unsigned bits"
        )
    if not image.mode.startswith("I"):
        return image
    most = 2 ** tags.get(_BITS, (16,))[0] - 1
    values = np.asarray(image).astype(np.uint32)
    values *= 255  # in place: images are large
    values += most // 2
    values //= most
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 255 - values
    gray = Image.fromarray(values.astype(np.uint8))
    gray.info = image.info.copy()
    return gray


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is where EXIF cannot be read."""
    image.load()  # of some formats EXIF stands behind the pixels
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # pillow raises many kinds for damaged EXIF, and the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def resize_square(image: np.ndarray, size: int | Resize) -> np.ndarray:
    """uint8 (H, W, C) to (size, size, C): shorter side to ``size``, then the middle (bilinear)."""
    pil = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    made = np.asarray(_sized(pil, size))
    return made.reshape(*made.shape[:2], image.shape[-1])


def _sized(image: Image.Image, size: int | Resize) -> Image.Image:
    if isinstance(size, Resize):
        return size.image(image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def augment(
    images: jax.Array,
    key: jax.Array | None = None,
    positions: jax.Array | None = None,
    *,
    image_size: int,
    train: bool,
    crop: str | None = "pad",
    flip: bool = True,
    pad: float = 0.125,
    fill: str = "reflect",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    center: float = 1.0,
    how: Resize | None = None,
    mean: float | tuple[float, ...] = 0.5,
    std: float | tuple[float, ...] = 0.5,
    dtype=jnp.float32,
) -> jax.Array:
    """uint8 images as stored to what a model takes.

    Training: a random window (``crop``), mirrored with probability 1/2 (``flip``), is resized to
    ``image_size`` and normalised, ``(x / 255 - mean) / std``. Evaluation: the middle window, not
    mirrored. The window's side is ``center`` times the stored side.

    Args:
      images: uint8 (B, H, W, C), C 1 or 3; one channel is repeated to three.
      key: a jax.random key, the same on every device; needed only for training.
      positions: int (B,), each image's place in the global batch; needed only for training.
      image_size: side of the result in pixels.
      train: False for evaluation; ``crop`` and ``flip`` are then ignored.
      crop: "pad" moves the window by up to ``pad`` times the side in each direction, beyond the
        edge ``fill`` decides (He et al. 2016, section 4.2); "resized" takes a window whose area is
        a random part in ``scale`` of the image and whose aspect, width over height, is in
        ``ratio`` (Szegedy et al. 2015, section 6); None or "none" takes the middle window.
      flip: whether to mirror left and right. Not for digits or text.
      pad: fraction of the side, rounded to whole pixels.
      fill: "reflect" mirrors at the edge, without repeating it; "zero" is black.
      scale, ratio: of "resized".
      center: window's side over the stored side; below 1 where images are stored larger than used.
      how: what a window becomes, in place of a plain bilinear resize to ``image_size``; for square
        images, and not for ``crop="resized"``.
      mean, std: of the channels after scaling to 0..1.
      dtype: of the result; everything before the cast is float32.

    Returns:
      (B, image_size, image_size, 3) of ``dtype``.

    Raises:
      ValueError: on an unknown ``crop`` or ``fill``, images that are not uint8 (B, H, W, 1 or 3),
        or training without ``key`` and ``positions``.

    >>> images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    >>> batch = augment(images, jax.random.key(0), jnp.arange(2), image_size=16, train=True)
    >>> batch.shape, float(batch[0, 0, 0, 0])
    ((2, 16, 16, 3), -1.0)
    """
    images = jnp.asarray(images)
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 (B, H, W, 1 or 3), got {images.dtype} {images.shape}"
        )
    if crop not in ("pad", "resized", "none", None):
        raise ValueError(f"crop={crop!r}: must be 'pad', 'resized' or None")
    if fill not in ("reflect", "zero"):
        raise ValueError(f"fill={fill!r}: must be 'reflect' or 'zero'")

    height, width = images.shape[1:3]
    if not train:
        top, h = _middle_window(height, center)
        left, w = _middle_window(width, center)
        x = resize(images[:, top : top + h, left : left + w], how or image_size)
    elif key is None or positions is None:
        raise ValueError("train=True draws at random: pass key and positions")
    else:
        keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(positions)
        mirrored = jnp.zeros(len(images), bool)
        if flip:
            mirrored = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 0)))(keys)
        if crop == "resized":
            top, left, h, w = jax.vmap(
                lambda k: _random_box(k, height, width, scale, ratio)
            )(keys)
            rows = jax.vmap(lambda t, s: interpolation(t, s, height, image_size))(top, h)
            columns = jax.vmap(lambda t, s: interpolation(t, s, width, image_size))(left, w)
            columns = jnp.where(mirrored[:, None, None], columns[:, ::-1], columns)
            x = _separable(images, rows, columns)
        else:
            reach = pad if crop == "pad" else 0.0
            windows = _shifted(images, keys, mirrored, reach=reach, center=center, fill=fill)
            x = resize(windows, how or image_size)
    x = (x / _MAX - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    return jnp.broadcast_to(x, (*x.shape[:3], 3)).astype(dtype)


def interpolation(start, length, size: int, out: int) -> jax.Array:
    """The (out, size) float32 matrix that resizes the part [start, start + length) of a line.

    Row o holds the triangle filter around ``start + (o + 1/2) length / out``, as wide as a source
    pixel when enlarging and as a result pixel when shrinking, cut at the line's ends and
    normalised. ``start`` and ``length`` may be traced and fractional.

    >>> interpolation(0, 2, 2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    step = jnp.asarray(length, jnp.float32) / out
    centre = start + (jnp.arange(out, dtype=jnp.float32) + 0.5) * step
    middles = jnp.arange(size, dtype=jnp.float32) + 0.5
    distance = jnp.abs(middles[None, :] - centre[:, None]) / jnp.maximum(step, 1.0)
    weights = jnp.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(axis=1, keepdims=True)


def resize(images: jax.Array, image_size: int | Resize) -> jax.Array:
    """(B, H, W, C) to float32 (B, image_size, image_size, C), bilinear; the identity if equal."""
    if isinstance(image_size, Resize):
        return image_size.batch(images)
    height, width = images.shape[1:3]
    if (height, width) == (image_size, image_size):
        return images.astype(jnp.float32)
    rows = interpolation(0.0, height, height, image_size)
    columns = interpolation(0.0, width, width, image_size)
    return _separable(images, rows, columns)


def _separable(images, rows, columns) -> jax.Array:
    """rows (out, H) and columns (out, W), or one of each for every image."""
    r = "boh" if rows.ndim == 3 else "oh"
    c = "bpw" if columns.ndim == 3 else "pw"
    # The default precision would round pixels to 8 or 10 bits on accelerators.
    highest = jax.lax.Precision.HIGHEST
    x = images.astype(jnp.float32)
    x = jnp.einsum(f"{r},bhwc->bowc", rows, x, precision=highest)
    return jnp.einsum(f"{c},bowc->bopc", columns, x, precision=highest)


def _middle_window(size: int, center: float) -> tuple[int, int]:
    length = round(size * center)
    return (size - length) // 2, length


def _shifted(images, keys, mirrored, *, reach, center, fill) -> jax.Array:
    """Windows of a common size at random whole-pixel offsets from the middle."""
    height, width = images.shape[1:3]

    def line(key, axis, size):
        first, length = _middle_window(size, center)
        most = round(size * reach)
        shift = 0
        if most:
            shift = jax.random.randint(jax.random.fold_in(key, axis), (), -most, most + 1)
        return first + shift + jnp.arange(length)

    def one(image, key, mirror):
        rows, columns = line(key, 1, height), line(key, 2, width)
        columns = jnp.where(mirror, columns[::-1], columns)
        window = image[_reflect(rows, height)][:, _reflect(columns, width)]
        if fill == "zero":
            inside = (rows >= 0) & (rows < height)
            inside = inside[:, None] & (columns >= 0) & (columns < width)
            window = jnp.where(inside[..., None], window, 0)
        return window

    return jax.vmap(one)(images, keys, mirrored)


def _reflect(index, size: int) -> jax.Array:
    """Indices beyond the edge, mirrored at the edge pixel's centre: -1 -> 1, size -> size - 2."""
    if size == 1:
        return jnp.zeros_like(index)
    index = jnp.abs(index) % (2 * (size - 1))
    return jnp.minimum(index, 2 * (size - 1) - index)


def _random_box(key, height, width, scale, ratio):
    """top, left, height and width, fractional, of a random part of the image."""
    draw = jax.random.uniform(jax.random.fold_in(key, 1), (4,))
    area = height * width * (scale[0] + draw[0] * (scale[1] - scale[0]))
    low, high = jnp.log(jnp.asarray(ratio, jnp.float32))
    aspect = jnp.exp(low + draw[1] * (high - low))
    h = jnp.minimum(jnp.sqrt(area / aspect), height)
    w = jnp.minimum(jnp.sqrt(area * aspect), width)
    return draw[2] * (height - h), draw[3] * (width - w), h, w
