"""preprocessor_config.json: the pixels of transformers' own processors, or refused by name."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from fixtures.vit.cases import CASES, config_of, weights_of, write_folder
from marks import slow_but
from PIL import Image

from rmlora_jax import hub
from rmlora_jax.config import flatten, nested
from rmlora_jax.data import augment, open_images
from rmlora_jax.data.pipeline import stored_as
from rmlora_jax.data.vision import pixels, resize_square
from rmlora_jax.errors import UserError
from rmlora_jax.files import plain, write_json
from rmlora_jax.hub.export import preprocessor
from rmlora_jax.hub.info import Info
from rmlora_jax.inference.classifier import info_of
from rmlora_jax.inference.inputs import ImageReader
from rmlora_jax.models.processor import Resize
from rmlora_jax.parallel.mesh import all_devices
from rmlora_jax.tasks.images import open_feed
from rmlora_jax.tasks.task import request
from rmlora_jax.train.config import default_config, read_config, resolve
from rmlora_jax.train.workdir import as_begun, check_workdir

SIDE = config_of(CASES["plain"])["image_size"]
WEIGHTS = weights_of(CASES["plain"])
TYPES = {
    "ViT": "vit.image_processing_pil_vit",
    "DeiT": "deit.image_processing_pil_deit",
    "CLIP": "clip.image_processing_pil_clip",
    "Bit": "bit.image_processing_pil_bit",
}
SQUARE = {"height": SIDE, "width": SIDE}
MIDDLE = {"do_center_crop": True, "crop_size": SQUARE}
VIT = {"image_processor_type": "ViTImageProcessor", "size": SQUARE}


def photo(height, width, seed=0):
    """Structure at every scale, so that filters differ."""
    random = np.random.RandomState(seed)
    small = Image.fromarray(random.randint(0, 256, (7, 9, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), int)
    return (smooth + random.randint(-40, 40, smooth.shape)).clip(0, 255).astype(np.uint8)


def base_of(folder, asked, **options):
    config = config_of(CASES["plain"])
    return hub.load_vit(write_folder(folder, config, WEIGHTS, asked), **options)


def theirs(folder, image, kind="ViT"):
    """(side, side, 3) of transformers' processor that computes with pillow."""
    module = pytest.importorskip(f"transformers.models.{TYPES[kind]}")
    processor = getattr(module, f"{kind}ImageProcessorPil").from_pretrained(folder)
    (made,) = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    return made.transpose(1, 2, 0)


def made_of(base, image):
    """By pillow, as an image file is read, and numpy."""
    made = pixels(Image.fromarray(image), 3, base.image_resize) / np.float32(255)
    return (made - np.float32(base.image_mean)) / np.float32(base.image_std)


def predicted(base, image):
    """What `--predict` gives the model."""
    ((_, (made,)),) = ImageReader(base, info_of(base))([image], 1, None)[1]
    return np.asarray(made[0])


def evaluated(base, image, **drawn):
    """What the evaluation of a run gives the model, or training."""
    stored, center = stored_as(image.shape, SIDE, base.image_resize)
    held = image if stored is None else resize_square(image, stored)
    options = {"center": center, "how": None if stored else base.image_resize, "train": False}
    options |= {"mean": base.image_mean, "std": base.image_std} | drawn
    return np.asarray(jax.jit(partial(augment, image_size=SIDE, **options))(held[None])[0])


FILTERS = [VIT | {"resample": number} for number in range(6)]
ASKED = [
    *FILTERS,
    {"feature_extractor_type": "ViTFeatureExtractor", "size": SIDE},
    {"size": [SIDE, SIDE]},
    VIT | {"image_processor_type": "ViTImageProcessorFast", "processor_class": None},
    VIT | {"size": {"height": 60, "width": 45}} | MIDDLE,
    VIT | {"size": {"shortest_edge": SIDE + 5}} | MIDDLE,
    VIT | {"size": {"shortest_edge": SIDE - 9}, "resample": 3} | MIDDLE,
    VIT | {"do_resize": False} | MIDDLE,
    VIT | {"do_center_crop": False, "crop_size": 999},
    VIT | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    VIT | {"do_normalize": False},
    VIT | {"do_rescale": False, "do_normalize": False},
    VIT | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    VIT | {"do_convert_rgb": True, "do_pad": False, "data_format": "channels_first"},
    VIT | {"do_resize": None, "do_normalize": None} | MIDDLE,
    {"image_processor_type": "DeiTImageProcessor", "size": 36, "crop_size": SIDE},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, **MIDDLE},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 33}, **MIDDLE},
]


CLOSE = {"rtol": 1e-6, "atol": 1e-5}  # an absolute 1e-5 where pixels are rescaled


def kind_of(asked):
    name = str(asked.get("image_processor_type") or asked.get("feature_extractor_type"))
    return next((kind for kind in TYPES if name.startswith(kind)), "ViT")


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: str(asked)[:90])
def test_pixels_are_those_of_transformers(asked, tmp_path):
    base = base_of(tmp_path, asked)
    for height, width in ((100, 60), (41, 90), (17, 17), (SIDE, SIDE), (SIDE + 1, SIDE + 1)):
        image = photo(height, width)
        want = theirs(tmp_path, image, kind_of(asked))
        np.testing.assert_allclose(made_of(base, image), want, **CLOSE)
    # A gray image equals the same in RGB.
    gray, how = Image.fromarray(photo(50, 70)[..., 0]), base.image_resize
    in_rgb = pixels(gray.convert("RGB"), 3, how)
    np.testing.assert_array_equal(pixels(gray, 1, how), in_rgb[..., :1])


@pytest.mark.parametrize("asked", slow_but(ASKED, FILTERS[3]), ids=lambda asked: str(asked)[:90])
def test_pixels_of_a_run_and_of_predict(asked, tmp_path):
    """Small squares are resized on the device, all other images by pillow."""
    base = base_of(tmp_path, asked)
    for height, width in ((50, 70), (17, 17)):
        image = photo(height, width)
        want = theirs(tmp_path, image, kind_of(asked))
        np.testing.assert_allclose(predicted(base, image), want, **CLOSE)
        np.testing.assert_allclose(evaluated(base, image), want, **CLOSE)
        drawn = {"key": jax.random.key(0), "positions": np.arange(1), "train": True}
        still = evaluated(base, image, **drawn, crop="none", flip=False)
        np.testing.assert_allclose(still, want, **CLOSE)


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: str(asked)[:90])
def test_an_exported_model_says_the_same(asked, tmp_path):
    base = base_of(tmp_path / "base", asked)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text((tmp_path / "base/config.json").read_text())
    written = preprocessor(base, info_of(base))
    write_folder(out, config_of(CASES["plain"]), WEIGHTS, plain(written))
    back = hub.load_vit(out)
    assert back.image_resize == base.image_resize
    np.testing.assert_allclose(back.image_mean, base.image_mean)
    np.testing.assert_allclose(back.image_std, base.image_std)
    image = photo(50, 80)
    want = theirs(out, image, kind_of(written))
    # Where the base did not rescale, mean and deviation are below 1e-2.
    np.testing.assert_allclose(made_of(base, image), want, rtol=1e-5, atol=1e-5)


def test_a_model_without_our_own_file_is_read_by_its_processor(tmp_path):
    """With an image that is no square: the middle was taken, and a margin cut."""
    base = base_of(tmp_path / "base", VIT | {"resample": 3})
    out = hub.save_model(tmp_path / "out", base.params, base, info=info_of(base))
    assert json.loads((out / "rmlora.json").read_text())["resize"] == "processor"
    (out / "rmlora.json").unlink()
    image, model = photo(48, 64), hub.load(out)
    want = model.forward(model.params, theirs(out, image)[None])
    np.testing.assert_allclose(model.logits([image]), want, rtol=1e-4, atol=1e-5)


def test_a_run_evaluates_photos_with_these_pixels(tmp_path):
    base = base_of(tmp_path / "base", VIT | {"resample": 3}, num_classes=2)
    photos = [photo(20 + i, 60 - 7 * i, seed=i) for i in range(6)]
    for i, image in enumerate(photos):
        path = tmp_path / "photos/test" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    shutil.copytree(tmp_path / "photos/test", tmp_path / "photos/train")
    c = default_config()
    c.model.source, c.model.dtype, c.data.name = str(tmp_path / "base"), "float32", "folder"
    c.data.data_dir, c.data.cache, c.eval_batch_size = str(tmp_path / "photos"), "", 2
    order = [0, 2, 4, 1, 3, 5]  # by class
    for mode in ("resident", "stream"):
        c.data.mode = mode
        config = resolve(c)
        files = open_images(request(config))
        feed = open_feed(config, files, base, all_devices(limit=1))
        made = [feed.prepare_eval(feed.resident, batch)[0][0] for batch in feed.evaluate("test")]
        want = [theirs(tmp_path / "base", photos[i]) for i in order]
        np.testing.assert_allclose(np.concatenate(made), want, **CLOSE)


def test_another_image_size_keeps_the_proportions(tmp_path):
    base = base_of(tmp_path, VIT | {"size": {"shortest_edge": SIDE * 8 // 7}} | MIDDLE)
    assert base.image_resize == Resize(SIDE, SIDE * 8 // 7, crop=True)
    larger = hub.load_vit(tmp_path, image_size=2 * SIDE)
    assert larger.image_resize == Resize(2 * SIDE, round(SIDE * 8 // 7 * 2), crop=True)
    # A file without a size has the model's; without a file nothing is known.
    assert base_of(tmp_path, {}).image_resize == Resize(SIDE, (SIDE, SIDE))
    (tmp_path / "preprocessor_config.json").unlink()
    assert hub.load_vit(tmp_path).image_resize is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"size": 2 * SIDE}, f"'size' is {2 * SIDE}.*image_size in config.json"),
        (VIT | {"size": {"height": SIDE, "width": 9}}, "'size' is .* x 9"),
        (VIT | {"size": {"longest_edge": SIDE}}, "'size' is"),
        (VIT | {"size": {"shortest_edge": SIDE, "longest_edge": 99}}, "'size' is"),
        (VIT | {"size": "large"}, "'size' is"),
        (VIT | {"size": 10**9}, "'size' is"),
        (VIT | {"resample": 6}, "'resample' is 6"),
        (VIT | {"resample": "bicubic"}, r"'resample' is 'bicubic'.*3 \(BICUBIC\)"),
        (VIT | {"resample": None}, "'resample' is None"),
        (VIT | {"size": None}, "'size' is None"),
        (VIT | {"image_std": None}, "image_mean and image_std"),
        (VIT | {"rescale_factor": None}, "rescale_factor is None"),
        (VIT | {"do_normalize": "no"}, "'do_normalize' is 'no'"),
        (VIT | {"do_center_crop": True}, "'crop_size' is None"),
        (VIT | MIDDLE | {"crop_size": 9}, "'crop_size' is 9"),
        (VIT | {"do_resize": "yes"}, "'do_resize' is 'yes'"),
        (VIT | {"crop_pct": 0.9}, "'crop_pct' = 0.9 is not supported"),
        (VIT | {"do_pad": True}, "'do_pad' = True is not supported"),
        (VIT | {"do_flip_channel_order": True}, "'do_flip_channel_order'"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "'image_processor_type' is 'ConvNext"),
        ({"image_processor_type": ["ViT"]}, "'image_processor_type'"),
    ],
)
def test_what_is_not_obeyed_is_refused_by_name(asked, words, tmp_path):
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: .*{words}"):
        base_of(tmp_path, asked)


def test_an_image_that_is_no_square_then_is_refused(tmp_path):
    """transformers' model refuses it, too."""
    base = base_of(tmp_path, VIT | {"size": {"shortest_edge": SIDE}})
    square = photo(50, 50)
    np.testing.assert_allclose(made_of(base, square), theirs(tmp_path, square), **CLOSE)
    with pytest.raises(UserError, match=f"makes it {SIDE} x {2 * SIDE} pixels, and the model"):
        predicted(base, photo(40, 80))
    with pytest.raises(UserError, match=r"images of 40 x 80 pixels: preprocessor_config\.json"):
        stored_as((40, 80, 3), SIDE, base.image_resize)
    as_they_are = base_of(tmp_path, VIT | {"do_resize": False})
    with pytest.raises(UserError, match=f"makes it 50 x 50 pixels, and the model takes {SIDE}"):
        predicted(as_they_are, square)


def test_models_of_earlier_versions_go_on_as_they_were_trained(tmp_path):
    """Their rmlora.json knows nothing of the processor."""
    base = base_of(tmp_path, VIT | {"resample": 3})
    info = Info("image_classification", stored_size=40, center=SIDE / 40)
    assert ImageReader(base, info).resize is None
    assert preprocessor(base, info)["size"] == {"shortest_edge": 40}
    image = photo(100, 60)
    ((_, (made,)),) = ImageReader(base, info)([image], 1, None)[1]
    middle = augment(
        resize_square(image, 40)[None], image_size=SIDE, center=SIDE / 40, train=False,
        mean=base.image_mean, std=base.image_std,
    )
    np.testing.assert_array_equal(made, middle)


def test_a_run_of_an_earlier_version_goes_on_with_the_middle_square(tmp_path):
    c = default_config()
    c.model.source = "somewhere"
    now = resolve(c)
    assert now.data.resize == "processor"
    old = flatten(now) | {"data.data_dir": None}
    del old["data.resize"]
    write_json(tmp_path / "config.json", nested(old))
    assert read_config(tmp_path).data.resize == "square"
    goes_on = as_begun(now, tmp_path)
    assert goes_on.data.resize == "square"
    check_workdir(goes_on, tmp_path)
    with pytest.raises(UserError, match=r"data\.resize: 'square' -> 'processor'"):
        check_workdir(now, tmp_path)
    # A run of this version goes on as it began, whatever that was.
    write_json(tmp_path / "config.json", nested(flatten(now)))
    assert as_begun(now, tmp_path) == now
