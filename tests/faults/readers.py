"""The readers of files from outside, each with files to begin with: what fuzz.py damages."""

import csv
import functools
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "data"), str(HERE.parent), str(HERE.parent.parent)]

FIXTURES = HERE.parent / "fixtures"
TEXTS = ["A damaged file.", "Ünïcode, 1 2 3! " * 20, ""]


class Reader(NamedTuple):
    """``make(folder)`` writes a whole set of files; ``read(folder)`` reads them, or raises a
    UserError. ``files`` are the patterns of those that are damaged, one at a time."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]


def _tiny_vit(folder):
    import safetensors.numpy
    from conftest import TINY_RUN
    from fixtures.vit import cases

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cases.config_of(TINY_RUN)))
    safetensors.numpy.save_file(cases.weights_of(TINY_RUN), folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
         "do_rescale": True, "rescale_factor": 1 / 255}))


# Weights


class Ran:
    """A pickle that leaves a file behind where it is run."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return os.system, (f"touch {self.name}",)


def make_bin(folder):
    for path in (FIXTURES / "pickles").glob("*.bin"):
        shutil.copy(path, folder)
    (folder / "evil.bin").write_bytes(pickle.dumps({"w": Ran(folder / "ran")}, 2))


def read_bin(folder):
    from rmlora_jax.hub.pickled import PickledTensors

    (path,) = folder.iterdir()
    touch(PickledTensors(path))


def touch(tensors):
    for name in tensors:
        value = tensors[name]
        assert value.shape == tensors.shape(name)
        if value.size:
            value.ravel()[[0, -1]] if value.size < 1 << 20 else value.flat[0]


def make_safetensors(folder):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {f"layer.{i}.weight": rng.normal(size=(i + 1, 3)).astype(np.float32)
               for i in range(8)}
    save_file(tensors | {"half": np.ones((2, 2), np.float16)}, folder / "a.safetensors")
    save_file({"w": np.arange(4)}, folder / "b.safetensors", metadata={"format": "pt"})


def read_safetensors(folder):
    from rmlora_jax.hub.safetensors_file import SafetensorsFile

    (path,) = folder.iterdir()
    touch(SafetensorsFile(path))


def make_index(folder):
    make_safetensors(folder)
    shutil.copy(FIXTURES / "pickles" / "module.bin", folder / "outside.bin")
    weights = {f"layer.{i}.weight": "a.safetensors" for i in range(8)} | {"w": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 500}, "weight_map": weights}))


def read_index(folder):
    from rmlora_jax.hub.weights import Tensors

    touch(Tensors(folder))


# Models


def read_vit(folder):
    from rmlora_jax.hub import load_vit

    load_vit(folder, num_classes=5)


def make_text(folder):
    from fixtures.text import cases

    cases.write_folder(folder, "bert")


def read_text(folder):
    from rmlora_jax.hub import load_text

    load_text(folder, num_labels=3)


def make_deberta(folder):
    from fixtures.text import cases

    cases.write_folder(folder, "deberta_v3")


def make_peft(folder):
    from fixtures.peft import cases

    cases.write_base(folder / "base", "vit")
    shutil.copytree(FIXTURES / "peft" / "vit", folder / "adapter")
    from rmlora_jax.hub import Info
    from rmlora_jax.hub.info import write_info

    write_info(folder / "adapter", Info("image_classification", labels=("a", "b", "c")))


def read_peft(folder):
    from rmlora_jax.hub import load_peft, load_pretrained, read_info, stored_labels

    read_info(folder / "adapter")
    stored_labels(folder / "adapter")
    if "base" not in BASES:  # it is whole, and the same for all
        BASES["base"] = load_pretrained(folder / "base")
    load_peft(folder / "adapter", BASES["base"])


BASES = {}


# Tokenizers


def make_tokenizer(folder):
    """WordPiece from vocab.txt, and the tokenizer.json that comes of it."""
    from fixtures.text.tiny import write_model

    from rmlora_jax.hub import load_tokenizer

    write_model(folder)
    load_tokenizer(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]", "cls_token": "[CLS]"}')
    for path in folder.glob("model*"):
        path.unlink()


def make_vocabulary(folder):
    make_tokenizer(folder)
    (folder / "tokenizer.json").unlink()


def make_bpe(folder):
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    words = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(97, 123)), "Ġ", "th", "the", "an"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\na n\n")
    (folder / "tokenizer_config.json").write_text(
        '{"model_max_length": 32, "tokenizer_class": "RobertaTokenizer"}')


def make_sentencepiece(folder):
    from fixtures.make_deberta_folder import README, write_tokenizer

    write_tokenizer(folder, README, 300)
    (folder / "config.json").write_text('{"model_type": "deberta-v2"}')


def read_tokenizer(folder):
    from rmlora_jax.data import tokenise
    from rmlora_jax.hub import load_tokenizer

    tokenise((TEXTS,), load_tokenizer(folder), 16)


# Data


def make_image(folder):
    from PIL import Image

    noise = np.random.RandomState(0).randint(0, 256, (20, 24, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    for suffix in ("png", "gif", "bmp", "webp", "tiff", "ppm"):
        image.save(folder / f"a.{suffix}")
    image.save(folder / "b.jpg", quality=90)
    image.save(folder / "progressive.jpg", progressive=True)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("1").save(folder / "fax.tiff", compression="group4")
    image.save(folder / "lzw.tiff", compression="tiff_lzw")
    image.save(folder / "lossless.webp", lossless=True)
    image.convert("P").save(folder / "b.gif", save_all=True, append_images=[image.convert("P")])


def read_image(folder):
    from rmlora_jax.hub import Info
    from rmlora_jax.inference.inputs import _image_batches
    from rmlora_jax.inference.inputs import read_image as read_one

    (path,) = folder.iterdir()
    info, failures = Info("image_classification", image_size=16), []
    named, read = [(str(path), str(path))], functools.partial(read_one, info=info, image_size=16)
    list(_image_batches(named, read, 1, failures.append))
    if failures:
        raise failures[0]


def make_rows(folder):
    rows = [{"text": f'a, "b" ü {i}', "label": ["x", "y"][i % 2]} for i in range(12)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for suffix, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
        file = io.StringIO()
        writer = csv.DictWriter(file, rows[0], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
        (folder / f"a.{suffix}").write_text(file.getvalue())


def read_rows(folder):
    from rmlora_jax.data import load_texts

    (path,) = folder.iterdir()
    load_texts("mine", columns=("text",), train_file=path, bad_records=3)


def make_tfds(folder):
    from test_data_tfds import gray_rows, image_features, make

    make(folder, "gray", image_features((9, 9, 1)), {"train": gray_rows(12), "test": gray_rows(4)})


def read_tfds(folder):
    from rmlora_jax.data import load_images, load_resident

    data = load_images("gray", data_dir=folder, bad_records=2, validation=2)
    for split in (data.train, data.validation, data.test):
        load_resident(split)


# Folders of runs


def make_run(folder):
    from rmlora_jax.files import write_json
    from rmlora_jax.hub import Info
    from rmlora_jax.hub.info import write_info
    from rmlora_jax.train.config import default_config

    config = default_config()
    config.model.source = str(folder / "base")
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "summary.json", {"task": "image_classification", "test_best": {"step": 2}})
    write_info(folder, Info("image_classification", labels=("a", "b", "c")))
    make_peft(folder)


def read_run(folder):
    from rmlora_jax.errors import UserError
    from rmlora_jax.hub.info import read_info
    from rmlora_jax.train.checkpoint import read_base
    from rmlora_jax.train.config import default_config, read_config, resolve
    from rmlora_jax.train.loop import check_workdir

    read_config(folder)
    read_info(folder)
    for read in (lambda: check_workdir(resolve(default_config()), folder),
                 lambda: read_base(folder, "image_classification", "advice")):
        try:
            read()
        except UserError as error:
            assert str(folder) in str(error)


READERS = {
    "bin": Reader(make_bin, read_bin, ("*.bin",)),
    "safetensors": Reader(make_safetensors, read_safetensors, ("*.safetensors",)),
    "index": Reader(make_index, read_index, ("*.json",)),
    "vit": Reader(_tiny_vit, read_vit, ("*.json",)),
    "bert": Reader(make_text, read_text, ("*.json",)),
    "deberta": Reader(make_deberta, read_text, ("*.json",)),
    "peft": Reader(make_peft, read_peft, ("adapter/*",)),
    "tokenizer": Reader(make_tokenizer, read_tokenizer, ("*.json",)),
    "vocabulary": Reader(make_vocabulary, read_tokenizer, ("*.txt", "tokenizer_config.json")),
    "bpe": Reader(make_bpe, read_tokenizer, ("vocab.json", "merges.txt", "tok*.json")),
    "sentencepiece": Reader(make_sentencepiece, read_tokenizer, ("spm.model", "tok*.json")),
    "image": Reader(make_image, read_image, ("*",)),
    "rows": Reader(make_rows, read_rows, ("*",)),
    "tfds": Reader(make_tfds, read_tfds, ("gray/*/*",)),
    "run": Reader(make_run, read_run, ("*.json",)),
}
ALONE = ("bin", "safetensors", "image", "rows")  # readers of one file, which lies by itself
