"""A trained model as a folder that Hugging Face's transformers opens, without PyTorch."""

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.core import meta

from rmlora_jax.adapt.lora import LoRA, is_factor
from rmlora_jax.adapt.tree import adapted_weights
from rmlora_jax.errors import UserError
from rmlora_jax.files import new_folder, read_object, write_json, write_text_atomic
from rmlora_jax.hub.chat_template import Template, end_tokens
from rmlora_jax.hub.info import Info, check_fits, write_info
from rmlora_jax.hub.new_tokens import tokenizer_of
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.rounding import Rounding
from rmlora_jax.hub.safetensors_write import Tensor, write_tensors
from rmlora_jax.hub.source import (
    CONFIG,
    EXTRAS,
    GENERATION,
    PREPROCESSOR,
    gguf_files,
    raw_config,
)
from rmlora_jax.hub.tokenizer import FILES, load_tokenizer
from rmlora_jax.hub.weights import differences, some, stored_shape, to_stored
from rmlora_jax.models.family import TOKENS, Entry, flat_params, param_shapes
from rmlora_jax.models.processor import Resize

CARD = "README.md"

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = tuple(dict.fromkeys(name for name in (*EXTRAS, *FILES) if name != PREPROCESSOR))

TEMPLATE = "chat_template.jinja"
EOS = "eos_token_id"
TOKEN_IDS = ("bos_token_id", EOS, "pad_token_id")

# Fields that make transformers fetch or run code, or read other weights than these.
CODE = (
    *("auto_map", "custom_pipelines", "trust_remote_code", "attn_implementation"),
    "quantization_config",
)


def save_model(
    folder: str | Path,
    params: Any,
    base: Pretrained,
    *,
    info: Info,
    lora: LoRA | None = None,
    old_names: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the whole model as a folder of the Hugging Face layout.

    ``AutoModelForImageClassification``, ``AutoModelForSequenceClassification`` or
    ``AutoModelForCausalLM`` opens it in PyTorch, `load_pretrained` here, bit for bit. The folder
    holds config.json, model.safetensors in the dtypes of ``params`` (transformers computes
    classifiers in float32, and language models in the dtype of most parameters), rmlora.json, a
    README.md where ``info.about`` has a ``"card"``, and preprocessor_config.json or what belongs to
    the tokenizer of ``base``: its files, chat template and settings of generation. More than 5 GB
    of weights are split into shards with an index. A head that is the embedding stays so.

    Weights are merged and written one layer at a time, so that no second copy of the model is made.

    Args:
      folder: to write; it appears as a whole or not at all.
      params: nested dict, the parameters of the unadapted Linen model
        ``base.family.model(base.config, base.num_labels)``: what ``rm.merge`` returns, or a model
        that was trained in full; with ``lora`` those of the adapted model.
      base: what the training began with, as loaded; its files are still in ``base.folder``.
      info: the task, the names of the classes, and how images are made.
      lora: the description of the factors in ``params``, which are merged, summed in float32.
      old_names: for ViT, the names of transformers up to 5.8, which every later release reads too.
        Those since 5.9 (False) are unknown to older ones, which then draw new layers at random.
      dtype: "float32", "bfloat16" or "float16", of all weights of a language model, rounded after
        merging; the card says by how much, see `rounding`. None: the dtypes of ``params``.
      overwrite: replaces a folder that exists.

    Raises:
      UserError: factors in ``params``, or parameters that are missing, unexpected or misshapen;
        values that are not finite; ``info`` of another task, number of classes or image size than
        ``base``; a ``folder`` that exists. Nothing is written then.
      OSError: the folder cannot be written; nothing is left of it.

    >>> import tempfile
    >>> from rmlora_jax.hub import load_vit
    >>> base = load_vit("vit-tiny-patch8-64-tinyimagenet", num_classes=2)
    >>> info = Info("image_classification", labels=("cat", "dog"))
    >>> with tempfile.TemporaryDirectory() as root:
    ...     load_vit(save_model(root + "/pets", base.params, base, info=info)).labels
    ('cat', 'dog')
    """
    folder = Path(folder).expanduser()
    check_fits(base, info)
    flat, factors = _checked(params, base, lora)
    config = hf_config(base, info)
    rounding = Rounding(dtype) if dtype else None
    if base.family.inputs is TOKENS:
        config["dtype"] = dtype or _usual_dtype(flat)
    elif rounding:
        raise UserError(f"dtype={dtype!r}: transformers computes classifiers in float32; leave it "
                        "out")
    spelling = 0 if old_names else -1
    # Larger numbers first: each value then starts at a multiple of its size.
    table = sorted((e for e in base.family.table if e.path in flat),
                   key=lambda entry: -flat[entry.path].dtype.itemsize)
    tensors = {
        name: Tensor(rounding.dtype if rounding else np.dtype(flat[e.path].dtype),
                     stored_shape(shape, e.axes))
        for e in table
        for name, shape in _names(e, spelling, np.shape(flat[e.path]))
    }
    values = (
        (name, to_stored(value, entry.axes))
        for entry in table
        for name, value in _layers(
            entry, spelling, flat[entry.path], factors.get(entry.path), rounding
        )
    )
    with new_folder(folder, overwrite=overwrite) as new:
        write_json(new / CONFIG, config)
        write_tensors(new, tensors, values)
        if base.image_mean is None:
            write_tokenizer(base, new)
            if info.template:
                write_template(base, new, info.template)
        else:
            write_json(new / PREPROCESSOR, preprocessor(base, info))
        write_info(new, info)
        if isinstance(card := info.about.get("card"), str):
            more = f"\n## Weights\n\n{rounding.words()}\n" if rounding else ""
            write_text_atomic(new / CARD, card + more)
    return folder


def _names(entry: Entry, spelling: int, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple]]:
    """(name in the file, shape in the model) of each layer of a parameter."""
    name = entry.names[spelling]
    if not entry.stacked:
        yield name, shape
    else:
        yield from ((name.format(layer), shape[1:]) for layer in range(shape[0]))


def _layers(
    entry: Entry, spelling: int, value, merge, rounding: Rounding | None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the file, value) of each layer of a parameter; ``merge(weight, layer)`` adds the
    factors of a layer, None of a parameter without layers."""
    for layer, (name, _) in enumerate(_names(entry, spelling, np.shape(value))):
        which = layer if entry.stacked else None
        one = value if which is None else value[which]
        found = np.asarray(one if merge is None else merge(one, which))
        if rounding is not None:
            found = rounding(found.astype(np.float32), None if merge is None else one)
        if not np.isfinite(found).all():
            raise UserError(f"params: {entry.path!r} have values that are not finite; such a model "
                            "gives no answers, so it is not written")
        yield name, found


def _usual_dtype(flat: Mapping[str, Any]) -> str:
    """The dtype that most numbers have."""
    sizes: Counter[str] = Counter()
    for x in flat.values():
        sizes[np.dtype(x.dtype).name] += math.prod(x.shape)
    return sizes.most_common(1)[0][0]


def hf_config(base: Pretrained, info: Info) -> dict[str, Any]:
    """The base's config.json for the trained model.

    Left out are fields that would run code and private ones, such as the writer's paths. The dtype
    is float32: transformers 5 would otherwise compute in the dtype of the published base.
    """
    raw = _without_code(raw_config(base.folder)[1])
    # The older spelling of "dtype", and what transformers takes from other fields.
    left_out = ("torch_dtype", "num_labels", "problem_type")
    raw = {k: v for k, v in raw.items() if not k.startswith("_") and k not in left_out}
    if base.family.inputs is TOKENS:
        none = ("id2label", "label2id", "generation_config")
        raw = {name: value for name, value in raw.items() if name not in none}
        return raw | {
            "architectures": [base.family.classifier],
            "vocab_size": base.config.vocab_size,
            "tie_word_embeddings": base.config.tie_word_embeddings,
        }
    labels = info.labels or [f"LABEL_{i}" for i in range(base.num_labels)]
    config = raw | {
        "architectures": [base.family.classifier],
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "dtype": "float32",
    }
    config.setdefault("model_type", base.family.config.model_types[0])
    if base.image_size is not None:
        config["image_size"] = base.image_size
    if info.is_regression:
        config["problem_type"] = "regression"
    elif base.num_labels > 1:  # transformers refuses it for a single class
        config["problem_type"] = "single_label_classification"
    return config


def preprocessor(base: Pretrained, info: Info) -> dict[str, Any]:
    """preprocessor_config.json: what evaluation did to images, as nearly as transformers can.

    Where the base's own file said how images are resized, this one says the same. Otherwise an
    image is resized (bilinear, antialiased) and normalised, (x / 255 - mean) / std. Where only
    the middle was used, the shorter side is first brought to ``image_size / center``. Two
    differences stay: transformers rounds the longer side to whole pixels before it takes the
    middle, and ``info.channels`` 1 is not made of colours; gray images are repeated to three
    channels, as here.
    """
    side = base.image_size
    assert side is not None
    how = Resize(side, (side, side))
    if info.resize == "processor":
        how = base.image_resize or how
    elif info.stored_size is not None or info.center < 1:
        how = Resize(side, round(side / info.center), crop=True)
    height, width = how.size if isinstance(how.size, tuple) else (side, side)
    size = {"height": height, "width": width}
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": base.config.num_channels == 3,
        "do_resize": how.size is not None,
        "size": {"shortest_edge": how.size} if isinstance(how.size, int) else size,
        "resample": how.resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": base.image_mean,
        "image_std": base.image_std,
    }
    if not how.crop:
        return config
    # ViTImageProcessor can take the middle only since transformers 5; CLIP's always could.
    return config | {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
    }


def write_tokenizer(base: Pretrained, target: Path) -> None:
    """Copies the tokenizer's files of ``base`` to a folder, never code; or writes those of the
    tokenizer in a GGUF model, and which tokens begin and end a text. New tokens are added."""
    source = base.tokenizer or base.folder
    if gguf_files(base.folder):
        raw = raw_config(base.folder)[1]
        ids = {name: raw[name] for name in TOKEN_IDS if raw.get(name) is not None}
        write_json(target / GENERATION, ids)
    if gguf_files(source):
        load_tokenizer(source, padding=False).save_pretrained(target)
    kept = (base.folder / GENERATION, *(source / name for name in TOKENIZER))
    for path in kept if source.is_dir() else ():
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    file = target / TOKENIZER_CONFIG
    raw = read_object(file) if file.exists() else {}
    clean = _without_code(raw)
    if base.tokens:
        text = tokenizer_of(base).backend_tokenizer.to_str(pretty=True)
        write_text_atomic(target / FILES[0], text)
        clean.setdefault("tokenizer_class", "PreTrainedTokenizerFast")  # if there's no config.json
    if clean != raw:
        write_json(file, clean)


def write_template(base: Pretrained, target: Path, template: str) -> None:
    """Writes a chat template that takes the place of the tokenizer's own, and the tokens that end
    its answers."""
    write_text_atomic(target / TEMPLATE, template)
    file, raw = target / GENERATION, raw_config(base.folder)[1]
    stored = read_object(file) if file.exists() else {}
    ids = {name: raw[name] for name in TOKEN_IDS if raw.get(name) is not None} | stored
    own = ids.get(EOS, [])
    tokenizer, ends = tokenizer_of(base), ()
    with contextlib.suppress(UserError):  # it refuses so short a conversation
        ends = end_tokens(tokenizer, Template("of the model", template))
    both = dict.fromkeys([*(own if isinstance(own, list) else [own]), *ends])
    write_json(file, ids | {EOS: [*both]})


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in CODE}


def _checked(params: Any, base: Pretrained, lora: LoRA | None):
    """'/'-joined path -> value of exactly the parameters that the model's files hold; and path ->
    how the factors of a layer are merged into its weight."""
    flat = flat_params(meta.unbox(params))
    leaves = [path for path in flat if is_factor(path.split("/"))]
    if leaves and lora is None:
        raise UserError(f"params: {some(leaves)} are low-rank factors; save what "
                        "rm.merge(params, lora) returns, or give their description lora=...")
    merges = {} if lora is None else {
        "/".join(path): partial(_merged, lora, lora.scale_of("/".join(path[:-1])), factors)
        for path, _, factors in adapted_weights(params, lora)
    }
    flat = {path: value for path, value in flat.items() if path not in leaves}
    shapes = param_shapes(base.family, base.config, base.num_labels)
    known = {entry.path for entry in base.family.table}
    missing = sorted(shapes.keys() - flat.keys())
    if wrong := differences(missing, sorted(flat.keys() - (shapes.keys() & known))):
        raise UserError(f"params: {wrong}. A {base.family.classifier} cannot have them so; give "
                        "the whole parameters of the unadapted model")
    for path, shape in shapes.items():
        if np.shape(flat[path]) != shape:
            raise UserError(f"params: {path!r} has shape {np.shape(flat[path])}, but "
                            f"{base.source} asks for {shape}; give the base that was trained")
    return flat, merges


def _merged(lora: LoRA, scale: float, factors, weight, layer: int | None):
    """A weight, of one layer, with its factors."""
    own = factors if layer is None else [x[layer] for x in factors]
    return lora.form.merged(weight, own, scale)
