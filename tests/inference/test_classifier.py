"""A trained model in use: the trainer's own numbers, whatever its inputs come as."""

import contextlib
import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from fixtures.text.tiny import SPECIAL, WORDS, write_head, write_model
from marks import slow
from PIL import EpsImagePlugin, Image
from safetensors.numpy import load_file, save_file

import rmlora_jax as rm
from rmlora_jax import data, hub
from rmlora_jax.data.vision import open_image, pixels
from rmlora_jax.errors import UserError
from rmlora_jax.hub.info import Info, write_info
from rmlora_jax.inference import inputs
from rmlora_jax.inference.classifier import Classifier, info_of
from rmlora_jax.inference.predict import predict
from rmlora_jax.parallel.mesh import all_devices, shard, spread
from rmlora_jax.tasks import images
from rmlora_jax.tasks.task import classification
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve

LORA = rm.LoRA(rank=3, alpha=6, target=r"encoder/layers/.*", train="head")
CLASSES = tuple("abcde")


MADE = {}


def adapted(base, dtype="float32"):
    """The adapted module and parameters whose factors are all random."""
    model = base.family.model(base.config, base.num_labels, dtype=jnp.dtype(dtype))
    model = rm.adapt(model, LORA)
    key = base.source, base.num_labels
    if key not in MADE:
        example = jnp.zeros((1, 4), jnp.int32)
        if base.image_size:
            example = jnp.zeros((1, base.image_size, base.image_size, 3))
        random = np.random.RandomState(2)

        def draw(path, leaf):
            is_b = path[-1].key == "lora_b"
            return 0.3 * random.standard_normal(leaf.shape).astype("f4") if is_b else leaf

        params = rm.attach(jax.random.key(1), model, base.params, example)
        MADE[key] = jax.tree_util.tree_map_with_path(draw, params)
    return model, MADE[key]


@pytest.fixture(scope="module")
def vit(tiny_vit):
    return hub.load_vit(tiny_vit)


@pytest.fixture(scope="module")
def model(vit):
    return Classifier(vit, adapted(vit)[1], LORA, Info("image_classification", CLASSES))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = write_head(write_model(tmp_path_factory.mktemp("bert")), 3)
    return hub.load_text(folder)


@pytest.fixture(scope="module")
def reader(bert):
    info = Info("text_classification", ("x", "y", "z"), max_length=40)
    return Classifier(bert, adapted(bert)[1], LORA, info)


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


def photo(height, width, seed=0):
    """Smooth, as JPEG wants it."""
    small = Image.fromarray(noise(5, 5, 3, seed=seed))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def texts(n, seed=0):
    random = np.random.RandomState(seed)
    return [" ".join(random.choice(WORDS, random.randint(1, 60))) for _ in range(n)]


class Files:
    """A data set of files in memory, as TFDS gives them."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def load(self, index, size=None):
        return pixels(open_image(self.files[index]), 3, size), index % 5


def as_trained(config, dataset, base, split, dtype="float32"):
    """Logits of a split by the trainer's feed, and what its evaluation step says of it."""
    devices = all_devices(limit=1)
    config.model.dtype = dtype
    config.eval_batch_size = 16
    module, params = adapted(base, dtype)
    feed = images.open_feed(resolve(config), dataset, base, devices)
    trainable, frozen = rm.split(params, LORA)
    step = setup.make_eval_step(
        lambda params, inputs: module.apply({"params": params}, *inputs, train=False),
        classification().predict,
        feed.prepare_eval,
    )
    step = spread(step, devices)

    @jax.jit
    def forward(params, resident, batch):
        arguments, _ = feed.prepare_eval(resident, batch)
        return module.apply({"params": params}, *arguments, train=False)

    logits, said = [], []
    constants = setup.Constants(frozen, feed.resident, np.uint32(0), np.uint32(0))
    for batch in feed.evaluate(split):
        mask = batch["mask"]
        logits.append(np.asarray(forward(params, feed.resident, batch))[mask])
        if dtype != "float32":
            continue
        rows = jax.device_get(step(trainable, constants, shard(batch, devices)))
        said.append({name: rows[name][mask] for name in ("prediction", "loss", "label")})
    names = said[0] if said else ()
    return np.concatenate(logits), {k: np.concatenate([rows[k] for rows in said]) for k in names}


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_small_squares_give_the_trainers_logits(tiny_vit, vit, tmp_path, dtype):
    digits = data.load_images("digits")
    expected, rows = as_trained(tiny_config(tiny_vit), digits, vit, "test", dtype)
    model = Classifier(vit, adapted(vit)[1], LORA, Info("image_classification", dtype=dtype))
    pixels = digits.test.images
    logits = model.logits(pixels, batch_size=16)
    assert logits.dtype == np.float32 and logits.shape == (360, 5)
    np.testing.assert_array_equal(logits, expected)
    if dtype == "float32":
        np.testing.assert_array_equal(logits.argmax(1), rows["prediction"])
    for i in range(16):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i:02}.png")
    np.testing.assert_array_equal(model.logits([tmp_path], batch_size=16), expected[:16])


@pytest.mark.parametrize("stored", [18, None])
def test_photos_give_the_trainers_logits(tiny_vit, vit, tmp_path, stored):
    sizes = [(40, 60), (90, 50), (300, 420), (18, 18), (19, 19)]
    files = []
    for i in range(20):
        kind = ("JPEG", "PNG")[i % 2]
        files.append(encoded(photo(*sizes[i % 5], seed=i), kind))
        (tmp_path / f"{i:02}.{kind.lower()}").write_bytes(files[-1])
    source = Files(files)
    dataset = data.Dataset("photos", source, source, source, 5, CLASSES, None)
    expected, rows = as_trained(tiny_config(tiny_vit), dataset, vit, "test")
    info = Info("image_classification", CLASSES, stored_size=stored, center=16 / 18)
    if stored is None:  # as a model that was trained on small squares
        info = Info("image_classification", CLASSES)
    logits = Classifier(vit, adapted(vit)[1], LORA, info).logits(str(tmp_path), batch_size=16)
    # A square that a data set of its like would store as it is, is left so.
    kept = [i for i in range(20) if stored or sizes[i % 5] != (18, 18)]
    np.testing.assert_array_equal(logits[kept], expected[kept])
    if stored:
        chosen = softmax(logits)[np.arange(20), rows["label"]]
        np.testing.assert_allclose(chosen, np.exp(-rows["loss"]), rtol=1e-5)


def softmax(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


def test_small_squares_stay_and_others_become_squares():
    info = Info("image_classification")
    for shape, held, center in (
        ((32, 32, 3), (32, 32, 3), 1.0),
        ((256, 256, 3), (256, 256, 3), 1.0),
        ((257, 257, 3), (256, 256, 3), 0.875),
        ((32, 40, 3), (256, 256, 3), 0.875),
        ((32, 32, 1), (32, 32, 3), 1.0),
    ):
        pixels, part = inputs.read_image(noise(*shape), info, 224)
        assert pixels.shape == held and part == center, shape
    gray = Info("image_classification", channels=1, stored_size=20, center=0.8)
    pixels, part = inputs.read_image(noise(32, 40, 3), gray, 16)
    assert pixels.shape == (20, 20, 1) and part == 0.8


def test_texts_give_the_trainers_logits(bert, reader):
    words = texts(70)
    module, params = adapted(bert)
    tokenizer = hub.load_tokenizer(bert.folder)
    tokens = data.tokenise([words], tokenizer, 40)
    apply = jax.jit(lambda *arguments: module.apply({"params": params}, *arguments))
    expected = np.zeros((70, 3), np.float32)
    for batch in data.eval_text_batches(
        tokens, np.zeros(70), 16, pad_id=tokenizer.pad_token_id, max_length=40
    ):
        arguments = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
        expected[batch["id"][batch["mask"]]] = np.asarray(apply(*arguments))[batch["mask"]]
    assert np.ptp(expected, axis=0).min() > 0.1  # else any order would do
    np.testing.assert_allclose(reader.logits(words, batch_size=16), expected, atol=1e-6)
    assert [p.input for p in reader(words)] == words


def test_pairs_are_told_apart(bert):
    info = Info("text_classification", columns=("premise", "hypothesis"), max_length=40)
    model = Classifier(bert, bert.params, None, info)
    pairs = [("good w1", "bad w2"), ("bad w2", "good w1"), ("w3", "w4")]
    logits = model.logits(pairs)
    ids = hub.load_tokenizer(bert.folder)("good w1", "bad w2", return_token_type_ids=True)
    plain = bert.family.model(bert.config, 3)
    arguments = (np.array([ids[name]]) for name in ("input_ids", "attention_mask"))
    types = np.array([ids["token_type_ids"]])
    assert types.max() == 1
    expected = jax.jit(plain.apply)({"params": bert.params}, *arguments, types)
    np.testing.assert_allclose(logits[:1], expected, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    assert model(pairs)[2].input == ("w3", "w4") and model(pairs)[2].label in "012"


def test_order_and_batch_size_do_not_matter(model):
    shapes = [(5, 5, 3), (9, 9, 3), (9, 5, 3)]
    mixed = [noise(*shapes[i % 3], seed=i) for i in range(7)] * 2
    alone = np.concatenate([model.logits([image]) for image in mixed[:7]])
    assert len(np.unique(alone.round(4), axis=0)) == 7
    for batch_size in (3, 64):
        logits = model.logits(mixed, batch_size=batch_size)
        np.testing.assert_allclose(logits, np.tile(alone, (2, 1)), atol=1e-5)
    assert model.logits([]).shape == (0, 5) and model([]) == []


def test_probabilities_and_labels(model):
    pixels = noise(6, 16, 16, 3)
    logits = model.logits(pixels)
    expected = softmax(logits)
    best = model(pixels)
    assert [p.input for p in best] == [f"image {i}" for i in range(6)]
    assert [p.label for p in best] == [CLASSES[k] for k in logits.argmax(1)]
    np.testing.assert_allclose([p.probability for p in best], expected.max(1), atol=1e-6)
    every = model(pixels, top=9)  # there are five
    assert len(every) == 30 and [p.input for p in every[:6]] == ["image 0"] * 5 + ["image 1"]
    found = np.array([p.probability for p in every]).reshape(6, 5)
    np.testing.assert_allclose(found, -np.sort(-expected, 1), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)


def test_large_logits_keep_their_probabilities():
    from rmlora_jax.inference.classifier import softmax

    np.testing.assert_allclose(softmax(np.float32([[1000, 1000, -1000]]), axis=1), [[0.5, 0.5, 0]])


def test_few_programs_compile(vit, reader):
    model = Classifier(vit, vit.params, None, info_of(vit))
    model.logits([noise(n, n, 3) for n in (3, 3, 3, 4, 5)], batch_size=2)  # three shapes
    assert model.forward._cache_size() == 1
    before = reader.forward._cache_size()
    reader.logits(texts(100, seed=1), batch_size=16)
    assert reader.forward._cache_size() - before <= 2  # 32 and 40 tokens


def test_what_images_may_be(model, tmp_path):
    colours = photo(12, 12)
    gray = colours.convert("L")
    as_colours = np.repeat(np.asarray(gray)[..., None], 3, -1)
    palette = colours.convert("P")
    clear = colours.convert("RGBA")
    clear.putalpha(Image.fromarray(noise(12, 12)))
    many = {
        "gray.png": (gray, as_colours),
        "palette.gif": (palette, np.asarray(palette.convert("RGB"))),
        "clear.png": (clear, np.asarray(colours)),
        "bits.png": (gray.convert("1"), np.asarray(gray.convert("1").convert("RGB"))),
        "UPPER.PNG": (colours, np.asarray(colours)),
    }
    for name, (image, _) in many.items():
        image.save(tmp_path / name)
    expected = model.logits(np.stack([pixels for _, pixels in many.values()]))
    assert np.unique(expected.round(4), axis=0).shape[0] == 4  # clear and UPPER are one
    paths = [tmp_path / name for name in many]
    np.testing.assert_array_equal(model.logits(paths), expected)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Image.open(path)) for path in paths]
        np.testing.assert_array_equal(model.logits(opened), expected)
        assert model(opened)[0].input == str(paths[0])
    arrays = [np.asarray(gray)[..., None], *map(np.asarray, (palette.convert("RGB"), clear))]
    np.testing.assert_allclose(model.logits(arrays), expected[:3], atol=1e-5)
    np.testing.assert_allclose(model.logits(colours), expected[-1:], atol=1e-5)


def test_folders_are_searched_in_order(model, tmp_path):
    names = ["b.png", "a/z.jpg", "a/deep/er.webp", "c.bmp"]
    for name in [*names, ".hidden.png", "a/.git/x.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(9, 9, seed=len(name)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = [p.input for p in model([tmp_path, str(tmp_path / "c.bmp")])]
    expected = ["a/deep/er.webp", "a/z.jpg", "b.png", "c.bmp", "c.bmp"]
    assert found == [str(tmp_path / name) for name in expected]


def test_a_corrupt_image_is_named_or_left_out(model, tmp_path):
    for i in range(4):
        photo(9, 9, seed=i).save(tmp_path / f"{i}.png")
    whole = model(tmp_path)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.png cannot be read as an image"):
        model(tmp_path)
    with pytest.raises(UserError, match=r"1\.png"):
        model.logits(tmp_path)
    failed = []
    left = model(tmp_path, failed=failed.append)
    assert [str(error)[: len(str(tmp_path)) + 6] for error in failed] == [
        str(tmp_path / "1.png"),
        str(tmp_path / "2.png"),
    ]
    assert [p.input for p in left] == [p.input for p in (whole[0], whole[3])]
    np.testing.assert_allclose(
        [p.probability for p in left], [whole[i].probability for i in (0, 3)], atol=1e-6
    )


def test_bombs_and_programs_are_refused(model, tmp_path, monkeypatch):
    photo(50, 50).save(tmp_path / "large.png")
    (tmp_path / "page.png").write_bytes(encoded(photo(9, 9), "EPS"))
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: ran.append(a))
    with pytest.raises(UserError, match=r"page\.png cannot be read as an image"):
        model(tmp_path / "page.png")
    assert not ran
    assert model(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"large\.png cannot be read.*2500 pixels"):
        model(tmp_path / "large.png")


def test_wrong_images_are_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    for given, words in (
        (tmp_path / "notes.txt", r"notes\.txt does not have the suffix of an image"),
        ([tmp_path / "empty"], "there is no image in .*empty"),
        ("nowhere.png", "no file or folder 'nowhere.png'"),
        (noise(9, 9, 3), r"uint8 \(n, H, W, C\) or a list, got an array \(9, 9, 3\)"),
        ([noise(9, 9)], r"image 0 cannot be read.*got uint8 \(9, 9\)"),
        (np.zeros((1, 9, 9, 3)), r"image 0 cannot be read.*got float64"),
        ([noise(9, 9, 3), noise(9, 9, 2)], r"image 1 cannot be read.*\(9, 9, 2\)"),
        ([3], "image 0 cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            model(given)
    with pytest.raises(UserError, match="batch_size is 0"):
        model(noise(1, 9, 9, 3), batch_size=0)


def test_wrong_texts_are_refused(bert, reader):
    pairs = Classifier(bert, bert.params, None, Info(
        "text_classification", columns=("one", "two"), max_length=40
    ))
    for model, given, words in (
        (reader, [("a", "b")], r"input 0 is \('a', 'b'\); this model takes a string each"),
        (reader, ["a", 3], "input 1 is 3"),
        (pairs, ["a"], r"input 0 is 'a'; this model takes a pair of strings \(one, two\)"),
        (pairs, [("a", "b"), ("a", "b", "c")], "input 1 is"),
        (pairs, [("a", 2)], "input 0 is"),
    ):
        with pytest.raises(UserError, match=words):
            model(given)
    assert len(reader("good")) == 1 and reader([]) == []


def test_parts_that_do_not_belong_together(vit, bert):
    for base, info, words in (
        (vit, Info("text_classification"), "it is a model of images"),
        (bert, Info("image_classification"), "it is a model of texts"),
        (vit, Info("image_classification", ("a", "b")), "5 outputs, but 2 are needed"),
        (bert, Info("text_regression"), "3 outputs, but 1 are needed"),
        (vit, Info("image_classification", image_size=32), "16 pixels, but 32 are needed"),
        (bert, Info("text_classification", max_length=65), "takes 64 tokens, not 65"),
    ):
        with pytest.raises(UserError, match=words):
            Classifier(base, base.params, None, info)


def test_whole_models_say_what_they_are_for(tiny_vit, bert, tmp_path):
    model = hub.load(tiny_vit)
    assert model.info == Info(
        "image_classification", tuple(f"class {i}" for i in range(5)), image_size=16
    )
    assert model(noise(1, 8, 8, 3))[0].label.startswith("class ")
    assert hub.load(bert.folder).info == Info("text_classification", bert.labels, max_length=64)
    folder = write_head(write_model(tmp_path / "run" / "merged"), 1)
    write_info(folder, Info("text_regression", max_length=20))
    value = hub.load(tmp_path / "run")
    assert value.info.max_length == 20
    found = value(["good w1 w2", "bad"])
    assert found[0].label is None and found[0].probability is None
    values = value.logits(["good w1 w2", "bad"])[:, 0]
    np.testing.assert_allclose([p.value for p in found], values, atol=1e-6)
    assert values[0] != values[1]


@pytest.mark.parametrize("inside", [slow("."), "adapter"])
def test_an_adapter_is_put_on_its_base(tiny_vit, tmp_path, inside):
    base = hub.load_vit(tiny_vit, num_classes=3, image_size=24)
    params = adapted(base)[1]
    info = Info("image_classification", CLASSES[:3], image_size=24)
    hub.save_peft(tmp_path / "run" / inside, params, LORA, base, info=info)
    model = hub.load(tmp_path / "run")
    assert (model.info, model.base.image_size, model.base.num_labels) == (info, 24, 3)
    pixels = noise(4, 16, 16, 3)
    expected = Classifier(base, params, LORA, info).logits(pixels)
    np.testing.assert_array_equal(model.logits(pixels), expected)
    plain = Classifier(base, base.params, None, info).logits(pixels)
    assert np.abs(expected - plain).max() > 0.01
    config = tmp_path / "run" / inside / "adapter_config.json"
    config.write_text(config.read_text().replace(json.dumps(str(tiny_vit)), "null"))
    with pytest.raises(UserError, match=r"does not say its base_model_name_or_path; add it"):
        hub.load(tmp_path / "run")


def test_folders_without_a_model(tiny_vit, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        hub.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run nor a model"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"method": "lora"}))
    with pytest.raises(UserError) as error:
        hub.load(tmp_path)
    assert "has neither adapter/ nor merged/" in str(error.value)
    assert f"python run.py --workdir={tmp_path} --export=merged" in str(error.value)
    headless = write_model(tmp_path / "headless")
    with pytest.raises(UserError, match="has no head"):
        hub.load(headless)
    several = write_head(write_model(tmp_path / "several"), 3)
    config = json.loads((several / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (several / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="several labels at once"):
        hub.load(several)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("multi_label_classification", "several labels"), ("regression", "several numbers")],
)
def test_a_problem_of_several_outputs_is_refused(kind, words, bert, tmp_path):
    """For a whole model, and for an adapter of PEFT, which leaves it to its base."""
    base = tmp_path / "base"
    shutil.copytree(bert.folder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"problem_type": kind}))
    asked = hub.load_text(base)
    where = hub.save_peft(tmp_path / "peft", adapted(bert)[1], LORA, asked)
    for folder in (base, where):
        with pytest.raises(UserError, match=rf"base.config\.json: problem_type .* {words} at once"):
            hub.load(folder)
    # An adapter that says what it is for may lie on any base.
    info = Info("text_classification", ("x", "y", "z"), max_length=40)
    ours = hub.save_peft(tmp_path / "ours", adapted(bert)[1], LORA, asked, info=info)
    assert hub.load(ours).base.num_labels == 3


def test_no_label_without_finite_logits(bert, reader):
    """One word's row of the table is broken: texts with it are left out, the rest are as ever."""
    params = jax.tree.map(np.array, adapted(bert)[1])
    params["embed"]["word"]["embedding"][len(SPECIAL) + WORDS.index("w7")] = np.nan
    broken = Classifier(bert, params, LORA, reader.info)
    given, lost = ["good w1", "w7 bad", "w2"], []
    with pytest.raises(UserError, match=r"1 of 3 inputs are not finite.*no prediction: 'w7 bad'"):
        broken(given)
    rows, fine = broken(given, failed=lost.append), reader(["good w1", "w2"])
    assert [(row.input, row.label) for row in rows] == [(row.input, row.label) for row in fine]
    assert len(lost) == 1
    assert np.isnan(broken.logits(given)[1]).all()


def test_words_and_types_beyond_their_tables(bert, reader):
    reader.read.config = dataclasses.replace(bert.config, vocab_size=len(SPECIAL + WORDS) - 1)
    with pytest.raises(UserError, match=r"^'good w39': token 'w39' has number 46, .*is 46"):
        reader(["w38", "good w39"])
    info = dataclasses.replace(reader.info, columns=("a", "b"))
    pairs = Classifier(bert, adapted(bert)[1], LORA, info)
    pairs.read.config = dataclasses.replace(bert.config, type_vocab_size=1)
    with pytest.raises(UserError, match="gives token type 1, but the model's type_vocab_size is 1"):
        pairs([("w1", "w2")])
    reader.read.config = bert.config


def test_predict_ends_with_an_error_where_nothing_has_an_answer(bert, tmp_path, capsys):
    write_head(write_model(tmp_path), 3)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.bias"][1] = np.inf
    save_file(tensors, tmp_path / "model.safetensors")
    assert predict(str(tmp_path), ["w1"]) == 1 and not (tmp_path / "predictions.csv").exists()
    said = capsys.readouterr()
    assert "1 of 1 inputs are not finite" in said.err and not said.out
