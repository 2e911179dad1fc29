"""On-device image operations against pillow and plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rmlora_jax.data.vision import augment, interpolation, resize

RAW = {"mean": 0.0, "std": 1 / 255}  # the identity: pixels 0..255


def pictures(n, height, width, channels=3, seed=0):
    shape = (n, height, width, channels)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def pillow_resize(image, out, box=None):
    """Float images, so that pillow does not round; one channel at a time."""
    channels = [
        np.asarray(
            Image.fromarray(image[..., c].astype(np.float32)).resize(
                (out, out), Image.Resampling.BILINEAR, box=box
            )
        )
        for c in range(image.shape[-1])
    ]
    return np.stack(channels, -1)


def by_hand(image, out):
    """Bilinear enlargement from its definition, pixel by pixel."""
    h, w, _ = image.shape
    result = np.zeros((out, out, image.shape[-1]))
    for i in range(out):
        for j in range(out):
            y = min(max((i + 0.5) * h / out - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / out - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = y - y0, x - x0
            result[i, j] = (
                (1 - fy) * (1 - fx) * image[y0, x0].astype(float)
                + (1 - fy) * fx * image[y0, x1]
                + fy * (1 - fx) * image[y1, x0]
                + fy * fx * image[y1, x1]
            )
    return result


@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_enlarging_equals_the_definition(size):
    x = pictures(2, *size)
    got = jax.jit(resize, static_argnums=1)(x, 21)
    np.testing.assert_allclose(got, [by_hand(i, 21) for i in x], atol=1e-3)


@pytest.mark.parametrize(("height", "width", "out"), [(32, 32, 64), (40, 40, 24), (33, 50, 16)])
def test_resize_equals_pillow(height, width, out):
    x = pictures(2, height, width)
    want = [pillow_resize(i, out) for i in x]
    np.testing.assert_allclose(resize(x, out), want, atol=2e-3)


def test_fractional_box_equals_pillow():
    x = pictures(1, 24, 30)[0]
    top, left, h, w = 3.3, 7.9, 15.1, 11.6
    rows, columns = interpolation(top, h, 24, 20), interpolation(left, w, 30, 20)
    got = np.einsum("oh,pw,hwc->opc", rows, columns, x)
    want = pillow_resize(x, 20, box=(left, top, left + w, top + h))
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_evaluation_resizes_whole_images_and_normalises():
    x = pictures(2, 8, 8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    got = augment(x, image_size=16, train=False, mean=mean, std=std)
    want = np.stack([by_hand(i, 16) for i in x]) / 255
    np.testing.assert_allclose(got, (want - np.array(mean)) / np.array(std), atol=1e-5)


def test_evaluation_takes_the_middle_without_resampling():
    x = pictures(2, 32, 32)
    got = augment(x, image_size=28, train=False, center=28 / 32, **RAW)
    np.testing.assert_allclose(got, x[:, 2:30, 2:30], atol=1e-3)


def test_gray_becomes_three_channels_and_dtype_is_honoured():
    x = pictures(1, 8, 8, channels=1)
    got = augment(x, image_size=8, train=False, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16 and got.shape == (1, 8, 8, 3)
    want = (x[..., 0] / 255 - 0.5) / 0.5
    for c in range(3):
        np.testing.assert_allclose(got[..., c].astype(np.float32), want, atol=4e-3)


def numpy_shifts(image, reach, fill):
    """Every window that the pad crop may give, mirrored and not, as {bytes: shift}."""
    side = len(image)
    how = {"mode": "reflect"} if fill == "reflect" else {"mode": "constant"}
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), **how)
    windows = {}
    for y in range(2 * reach + 1):
        for x in range(2 * reach + 1):
            window = padded[y : y + side, x : x + side]
            windows[window.tobytes()] = (y - reach, x - reach, False)
            windows[np.ascontiguousarray(window[:, ::-1]).tobytes()] = (y - reach, x - reach, True)
    return windows


@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_pad_crop_is_a_shifted_window(fill):
    side, n = 16, 400
    image = pictures(1, side, side)[0]
    x = np.broadcast_to(image, (n, *image.shape))
    got = augment(
        x, jax.random.key(3), jnp.arange(n), image_size=side, train=True, fill=fill, **RAW
    )
    windows = numpy_shifts(image, 2, fill)
    seen = [windows[np.rint(np.asarray(g)).astype(np.uint8).tobytes()] for g in got]
    ys, xs, mirrored = (np.array(v) for v in zip(*seen, strict=True))
    assert set(ys) == set(xs) == {-2, -1, 0, 1, 2}
    assert 0.4 < mirrored.mean() < 0.6
    assert abs(np.corrcoef(ys, xs)[0, 1]) < 0.2 and abs(np.corrcoef(ys, mirrored)[0, 1]) < 0.2


def test_without_flip_and_crop_training_equals_evaluation():
    x = pictures(5, 12, 12)
    same = functools.partial(augment, x, jax.random.key(0), jnp.arange(5), image_size=12)
    got = same(train=True, crop=None, flip=False)
    np.testing.assert_array_equal(got, same(train=False))


def test_no_flip_keeps_left_left():
    ramp = np.tile(np.arange(16, dtype=np.uint8) * 16, (64, 16, 1))[..., None].repeat(3, -1)
    common = {"image_size": 16, "train": True, **RAW}
    for crop in ("pad", "resized", None):
        got = augment(ramp, jax.random.key(0), jnp.arange(64), crop=crop, flip=False, **common)
        assert (got[:, :, -4] > got[:, :, 3]).all(), crop
        got = augment(ramp, jax.random.key(0), jnp.arange(64), crop=crop, **common)
        share = np.asarray(got[:, 8, -4, 0] < got[:, 8, 3, 0]).mean()
        assert 0.3 < share < 0.7, crop


def test_resized_crop_takes_boxes_of_the_asked_area_and_aspect():
    # An image that holds its own coordinates shows the box at the corners of the result.
    side, n, out = 128, 300, 64
    yx = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)
    image = np.concatenate([yx, np.zeros((side, side, 1))], -1).astype(np.uint8)
    got = augment(
        np.broadcast_to(image, (n, *image.shape)),
        jax.random.key(1),
        jnp.arange(n),
        image_size=out,
        train=True,
        crop="resized",
        flip=False,
        scale=(0.2, 0.5),
        **RAW,
    )
    # Between two inner rows the coordinate grows by height / out exactly.
    a, b = 8, out - 9
    h = (got[:, b, 20, 0] - got[:, a, 20, 0]) * out / (b - a)
    w = (got[:, 20, b, 1] - got[:, 20, a, 1]) * out / (b - a)
    area = np.asarray(h * w) / side**2
    assert 0.19 < area.min() < 0.22 and 0.48 < area.max() < 0.51
    aspect = np.asarray(w / h)
    assert 0.74 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.35
    top = np.asarray(got[:, a, 20, 0] + 0.5 - (a + 0.5) * h / out)
    assert (top > -0.1).all() and (top + h < side + 0.1).all() and top.std() > 10


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_numbers_do_not_depend_on_how_a_batch_is_split(crop):
    x, key = pictures(8, 16, 16), jax.random.key(7)
    f = jax.jit(
        lambda x, positions: augment(x, key, positions, image_size=24, train=True, crop=crop)
    )
    whole = f(x, jnp.arange(8))
    parts = [f(x[i : i + 2], jnp.arange(i, i + 2)) for i in range(0, 8, 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-6)
    assert not np.allclose(whole[0], f(x[:1], jnp.array([1]))[0])  # positions matter
    other = augment(x, jax.random.key(8), jnp.arange(8), image_size=24, train=True, crop=crop)
    assert not np.allclose(whole, other)


def test_errors_say_what_is_allowed():
    x = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    with pytest.raises(ValueError, match="'pad', 'resized' or None"):
        augment(x, image_size=8, train=False, crop="random")
    with pytest.raises(ValueError, match="'reflect' or 'zero'"):
        augment(x, image_size=8, train=False, fill="edge")
    with pytest.raises(ValueError, match="key and positions"):
        augment(x, image_size=8, train=True)
    with pytest.raises(ValueError, match=r"uint8 \(B, H, W, 1 or 3\), got float32"):
        augment(x.astype(jnp.float32), image_size=8, train=False)
