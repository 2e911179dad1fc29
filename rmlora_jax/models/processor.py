"""What preprocessor_config.json asks for: read or refused, and done as transformers does it.

`Resize` gives the pixels of transformers' image processors that compute with pillow: by pillow
itself for one image, and the same, bit for bit, by matrix products for small squares on a device.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from rmlora_jax.models.config import LARGEST, refuse

MOST_PIXELS = 2**14  # of a side
NEAREST = int(Image.Resampling.NEAREST)
BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)


class Resize(NamedTuple):
    """How an image becomes the square that a model takes.

    Attributes:
      side: of the square, in pixels.
      size: height and width to which an image is resized; one number: that of its shorter side;
        None: it is not resized.
      resample: pillow's number of the filter.
      crop: whether the middle is then taken; what an image lacks is black.
    """

    side: int
    size: int | tuple[int, int] | None
    resample: int = BILINEAR
    crop: bool = False

    def to_side(self, side: int) -> "Resize":
        """The same for a square of another side.

        >>> Resize(224, 256, crop=True).to_side(112)
        Resize(side=112, size=128, resample=2, crop=True)
        """
        sizes = [max(1, round(n * side / self.side)) for n in np.atleast_1d(self.size or ())]
        size = tuple(sizes) if isinstance(self.size, tuple) else sizes[0] if sizes else None
        return self._replace(side=side, size=size)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before the middle is taken."""
        if not isinstance(self.size, int):
            return self.size or (height, width)
        other = int(self.size * max(height, width) / min(height, width))  # cut off, not rounded
        return (other, self.size) if width <= height else (self.size, other)

    @property
    def takes_any(self) -> bool:
        """Whether a square is made of images of every shape."""
        return self.crop or isinstance(self.size, tuple)

    def check(self, height: int, width: int) -> None:
        """Raises a ValueError for an image of which no square of this side is made."""
        made = (self.side, self.side) if self.crop else self.resized(height, width)
        if made != (self.side, self.side):
            raise ValueError(
                f"preprocessor_config.json makes it {made[0]} x {made[1]} pixels, and the model "
                f"takes {self.side} x {self.side}"
            )

    def image(self, image: Image.Image) -> Image.Image:
        """The square of an image in gray or RGB. Raises a ValueError as ``check`` does."""
        self.check(image.height, image.width)
        height, width = self.resized(image.height, image.width)
        image = image.resize((width, height), self.resample)
        top, left = (height - self.side) // 2, (width - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))

    def batch(self, images: jax.Array) -> jax.Array:
        """uint8 (B, H, H, C) to float32 (B, side, side, C), the whole numbers that pillow gives.

        Squares to squares alone, since pillow chooses for the others whether rows or columns are
        resized first, and rounds between the two.
        """
        length = images.shape[1]
        self.check(*images.shape[1:3])
        made, width = self.resized(*images.shape[1:3])
        assert length == images.shape[2] and made == width
        x = images.astype(jnp.int32)
        if made != length:
            weights = taps(length, made, self.resample)
            x = _whole("pw,bhwc->bhpc", weights, x)
            x = _whole("oh,bhwc->bowc", weights, x)
        first = (made - self.side) // 2
        cut = (-first, self.side - made + first, 0)
        return jax.lax.pad(x, 0, [(0, 0, 0), cut, cut, (0, 0, 0)]).astype(jnp.float32)

    @property
    def keeps_squares(self) -> bool:
        """Whether a square stays one before the middle is taken."""
        return not isinstance(self.size, tuple) or self.size[0] == self.size[1]


# Pillow's filters: reach, and weight at a distance in pixels.
def _triangle(x):
    return np.maximum(1 - abs(x), 0)


def _cubic(x, a=-0.5):
    x = abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return np.where(x < 1, near, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0))


FILTERS = {
    int(Image.Resampling.LANCZOS): (
        3,
        lambda x: np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0),
    ),
    BILINEAR: (1, _triangle),
    BICUBIC: (2, _cubic),
    int(Image.Resampling.BOX): (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0)),
    int(Image.Resampling.HAMMING): (
        1,
        lambda x: np.where(abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0),
    ),
}
BITS = 22  # of the fixed-point weights


def taps(size: int, out: int, resample: int) -> np.ndarray:
    """Pillow's weights for a line of ``size`` pixels made ``out``: int32 (out, size), times 2^22.

    >>> taps(2, 4, BILINEAR) / 2**22
    array([[1.  , 0.  ],
           [0.75, 0.25],
           [0.25, 0.75],
           [0.  , 1.  ]])
    """
    scale, places = size / out, np.arange(size)
    centre = ((np.arange(out) + 0.5) * scale)[:, None]
    if resample == NEAREST:
        drifting = np.cumsum([scale / 2, *[scale] * (out - 1)])  # the sums that pillow cuts off
        return (np.trunc(drifting)[:, None] == places).astype(np.int32) << BITS
    reach, weight = FILTERS[resample]
    stretch = max(scale, 1.0)
    first, last = (np.trunc(centre + sign * reach * stretch + 0.5) for sign in (-1, 1))
    near = (places >= first) & (places < last)
    weights = np.where(near, weight((places - centre + 0.5) * (1 / stretch)), 0)
    weights *= 2**BITS / weights.sum(1, keepdims=True)
    return np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def _whole(sums: str, weights: np.ndarray, x: jax.Array) -> jax.Array:
    """Weighted sums, rounded and cut to 0 .. 255. They are whole numbers below 2^31."""
    total = jnp.einsum(sums, weights, x, preferred_element_type=jnp.int32)
    return ((total + (1 << BITS - 1)) >> BITS).clip(0, 255)


class Processor(NamedTuple):
    """What preprocessor_config.json asks for; ``resize`` is None if that file is missing.

    x = (pixel - mean) / std for pixels in [0, 1], with a mean and a std for each channel.
    """

    resize: Resize | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


_VIT: dict[str, Any] = {
    "resample": BILINEAR,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "default_to_square": True,
    "do_center_crop": False,
    "crop_size": None,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_CLIP = _VIT | {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": BICUBIC,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# transformers' classes that do no more than these fields say, with their defaults. The size that
# ViT's lacks is the model's.
KINDS = {
    "ViTImageProcessor": _VIT,
    "DeiTImageProcessor": _VIT
    | {"size": 256, "resample": BICUBIC, "do_center_crop": True, "crop_size": 224},
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
}
# Names, how results are returned, and a conversion that is always made here.
INERT = (
    *("image_processor_type", "feature_extractor_type", "processor_class", "data_format"),
    *("do_convert_rgb", "return_tensors", "device", "disable_grouping", "image_seq_length"),
)


def read_processor(raw: Mapping[str, Any] | None, config, image_size: int | None) -> Processor:
    """What a preprocessor_config.json asks for.

    Args:
      raw: its content; None where there is no such file.
      config: the model's, which has ``image_size`` and ``num_channels``.
      image_size: in place of both files' own; all sizes are then brought to it in proportion.

    Raises:
      ValueError: a field that is not supported, a value that is not allowed, or another size than
        the model's.
    """
    channels, given = config.num_channels, raw or {}
    name = given.get("image_processor_type") or given.get("feature_extractor_type")
    asked = _VIT | {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    if name is not None:
        kind = str(name).removesuffix("Fast").removesuffix("Pil")
        kind = kind.replace("FeatureExtractor", "ImageProcessor")
        if kind not in KINDS:
            refuse("image_processor_type", name, f"one of {', '.join(KINDS)}")
        asked = asked if KINDS[kind] is _VIT else KINDS[kind]
    for field, value in given.items():
        known = field in asked or field in INERT or field.startswith("_")
        if value and not known and field != "size":
            raise ValueError(f"field {field[:80]!r} = {repr(value)[:80]} is not supported; remove "
                             "it if it does not change the pixels")
    asked = {**asked, **given}
    for field in (field for field, value in _VIT.items() if isinstance(value, bool)):
        if not isinstance(asked[field], bool | None):
            refuse(field, asked[field], "true or false")
    return Processor(
        None if raw is None else _resize(asked, config.image_size, image_size),
        *_normalisation(asked, channels),
    )


def _resize(asked: Mapping[str, Any], own: int, image_size: int | None) -> Resize:
    size, side = None, own
    if asked["do_resize"]:
        size = _size("size", asked.get("size", own), asked["default_to_square"])
        side = size
    if asked["do_center_crop"]:
        side = _size("crop_size", asked["crop_size"], True)
    if isinstance(side, tuple):
        side, width = side
        if side != width:
            refuse("size", f"{side} x {width}", "a square, as the images of the model")
    numbers = {int(one): one.name for one in Image.Resampling if one in (NEAREST, *FILTERS)}
    # A name is refused, too: transformers computes bilinearly then, whatever the name says.
    if type(asked["resample"]) is not int or asked["resample"] not in numbers:
        known = ", ".join(f"{number} ({name})" for number, name in sorted(numbers.items()))
        refuse("resample", asked["resample"], f"the number of a filter: {known}")
    found = Resize(side, size, asked["resample"], bool(asked["do_center_crop"]))
    if image_size is None and side != own:
        refuse("crop_size" if found.crop else "size", side,
               f"{own}, which is image_size in config.json; correct one, or load the model with "
               f"image_size={side} (model.image_size of a run)")
    return found if image_size in (None, side) else found.to_side(image_size)


def _size(field: str, value: Any, square: bool) -> int | tuple[int, int]:
    """(height, width), or the shorter side."""
    given = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
    found: Any = given
    if isinstance(given, dict):
        keys = ("height", "width") if len(given) == 2 else ("shortest_edge",)
        found = [given.get(key) for key in keys]
        found = tuple(found) if len(found) == 2 else found[0]
    elif isinstance(given, list):
        found = tuple(given)
    elif square:
        found = given, given
    numbers = found if isinstance(found, tuple) else (found,)
    fine = all(type(n) is int and 1 <= n <= MOST_PIXELS for n in numbers)
    if not fine or (isinstance(found, tuple) and len(found) != 2) or (
        field == "crop_size" and not isinstance(found, tuple)
    ):
        refuse(field, value, "a number of pixels, or {height, width} or {shortest_edge} in pixels"
               if field == "size" else "a number of pixels, or {height, width}")
    return found


def _normalisation(asked: Mapping[str, Any], channels: int) -> tuple[tuple, tuple]:
    """Mean and standard deviation for pixels in [0, 1]."""
    mean, std = [0.0] * channels, [1.0] * channels
    if asked["do_normalize"]:
        mean, std = asked["image_mean"], asked["image_std"]
    # The processor normalises pixel * rescale_factor, where we normalise pixel / 255.
    factor = asked["rescale_factor"] if asked["do_rescale"] else 1.0
    if not (_are_numbers(mean, channels, -LARGEST) and _are_numbers(std, channels, 1 / LARGEST)):
        raise ValueError(
            f"image_mean and image_std need {channels} numbers each, those of image_std above 0"
        )
    if not _are_numbers([factor], 1, 1 / LARGEST):
        raise ValueError(f"rescale_factor is {repr(factor)[:80]}; it must be above 0")
    mean, std = tuple(mean), tuple(std)
    if abs(255 * factor - 1) > 1e-6:
        mean, std = (tuple(x / (255 * factor) for x in values) for values in (mean, std))
    return mean, std


def _are_numbers(values, count: int, least: float) -> bool:
    """Whether ``values`` is a list of ``count`` numbers between ``least`` and 2**24."""
    fine = isinstance(values, list) and len(values) == count
    return fine and all(type(x) in (int, float) and least <= x <= LARGEST for x in values)
