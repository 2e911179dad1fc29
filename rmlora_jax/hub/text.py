"""Text encoders of the Hugging Face layout, without PyTorch."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rmlora_jax.errors import UserError
from rmlora_jax.hub.bert import BERT, ROBERTA
from rmlora_jax.hub.deberta import DEBERTA
from rmlora_jax.hub.labels import label_names
from rmlora_jax.hub.source import CONFIG, find_folder, read_json
from rmlora_jax.hub.weights import Tensors, read_params
from rmlora_jax.models.bert_config import ROBERTAS
from rmlora_jax.models.family import Family, shapes_of

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    **dict.fromkeys(ROBERTAS, ROBERTA),
    "deberta-v2": DEBERTA,  # v3 has the same name
}


class PretrainedText(NamedTuple):
    """A pretrained text encoder, ready for ``family.model(config, num_labels)``.

    Attributes:
      family: what kind of model it is.
      config: the architecture.
      params: nested dict of numpy arrays, the parameters of ``family.model(config, num_labels)``.
      num_labels: outputs of the head.
      labels: class names, or None where the head is new.
      dropped: names of tensors in the file that were left out.
      new: paths of parameters that are newly initialised.
      folder: where its files are, the tokenizer's too.
      source: what was loaded, as given.
    """

    family: Family
    config: Any
    params: dict[str, Any]
    num_labels: int
    labels: tuple[str, ...] | None
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    folder: Path
    source: str


def load_text(
    source: str | Path,
    *,
    num_labels: int | None = None,
    key: jax.Array | None = None,
    dtype=jnp.float32,
    revision: str | None = None,
) -> PretrainedText:
    """Loads BERT, RoBERTa or DeBERTa-v2/v3 with a classification head.

    Reads safetensors or ``pytorch_model.bin``, sharded or not, in any floating type, with or
    without the encoder's prefix. Heads of pre-training are left out; a pooler and a head that the
    file lacks, or a head of another size, are new: normal of standard deviation
    ``config.initializer_range``, bias 0.

    Args:
      source: a local folder, a packaged model or a name on the hub.
      num_labels: outputs of the head, 1 for regression; None keeps the file's head.
      key: for what is new; default ``jax.random.key(0)``.
      dtype: of all parameters but pooler and head, which are trained and always float32.
      revision: branch, tag or commit on the hub.

    Raises:
      UserError: a model that is not found or not supported, tensors that are missing, unexpected
        or misshapen, or ``num_labels`` left out where the file has no head.
    """
    folder = find_folder(source, revision)
    raw = read_json(folder / CONFIG)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{folder / CONFIG}: model_type is {repr(kind)[:80]}; texts are for "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    try:
        config = family.config.from_hf(raw)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    tensors = Tensors(folder)

    heads = (entry for entry in family.table if entry.path.startswith("head/"))
    head = [name for entry in heads for name in entry.names]
    stored = next((tensors.shape(name)[0] for name in head if name in tensors), None)
    labels = stored if num_labels is None else num_labels
    if labels is None:
        raise UserError(f"{folder} has no head; say how many labels with num_labels=...")
    if not isinstance(labels, int) or labels < 1:
        raise UserError(f"num_labels is {labels!r}; it must be a whole number of at least 1")
    shapes = shapes_of(folder, family, config, labels)
    wanted, leftovers = shapes, family.leftovers
    if stored != labels:
        wanted = {path: shape for path, shape in shapes.items() if not path.startswith("head/")}
        leftovers = (*leftovers, *(name.replace(".", r"\.") for name in head))
    read = read_params(
        tensors,
        family.table,
        wanted,
        prefix=family.prefix,
        leftovers=leftovers,
        optional=family.new,
        trained=(r"(pooler|head)/.*",),
        dtype=dtype,
    )
    params = flatten_dict(read.params, sep="/")
    new = tuple(path for path in shapes if path not in params)
    params |= {path: np.zeros(shapes[path], np.float32) for path in new}
    pretrained = PretrainedText(
        family=family,
        config=config,
        params=unflatten_dict(params, sep="/"),
        num_labels=labels,
        labels=label_names(raw, labels) if "head/kernel" not in new else None,
        dropped=read.dropped,
        new=new,
        folder=folder,
        source=str(source),
    )
    return new_text_head(pretrained, jax.random.key(0) if key is None else key)


def new_text_head(pretrained: PretrainedText, key: jax.Array) -> PretrainedText:
    """The same model with all that is new drawn from ``key``, as `load_text`; nothing is read."""
    params = flatten_dict(pretrained.params, sep="/")
    for number, path in enumerate(pretrained.new):
        if path.endswith("/kernel"):
            shape = params[path].shape
            draw = jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
            params[path] = pretrained.config.initializer_range * np.asarray(draw)
    return pretrained._replace(params=unflatten_dict(params, sep="/"))
