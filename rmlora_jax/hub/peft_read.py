"""Reading an adapter in the format of Hugging Face PEFT."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.adapt import DESCRIPTIONS
from rmlora_jax.adapt.geometry import Layout
from rmlora_jax.adapt.lora import WEIGHTS, LoRA
from rmlora_jax.errors import UserError
from rmlora_jax.hub.peft_config import CONFIG_FILE, PREFIX, PeftConfig, ends_with, read_config
from rmlora_jax.hub.peft_write import WEIGHTS_FILE, alpha_of, peft_leaves
from rmlora_jax.hub.pickled import PickledTensors
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.safetensors_file import SafetensorsFile
from rmlora_jax.hub.weights import some, stored_shape
from rmlora_jax.models.family import Entry, flat_params

OLD_WEIGHTS_FILE = "adapter_model.bin"
NAMES = {name for d in DESCRIPTIONS for names in d.form.peft or () for name in names}
LEAF = re.compile(r"(.+)\.({})".format("|".join(map(re.escape, sorted(NAMES)))))


def load_peft(folder: str | Path, base: Pretrained, *, saved: bool = True) -> tuple[dict, LoRA]:
    """The adapter in a folder, as parameters of the adapted model and their description.

    Reads what `save_peft` and PEFT (in PyTorch) write, for every family of models that can be
    loaded and in both spellings of ViT's names::

        base = load_vit(source, num_classes=stored_labels(folder))
        params, lora = load_peft(folder, base)
        model = rmlora_jax.adapt(ViT(base.config, base.num_classes), lora)
        logits = model.apply({"params": params}, images)      # or go on training

    Layers that the file leaves out, or that have a lower rank than others of their stack, get
    directions that are 0 in A and in B, which no gradient moves. Where the scales of a stack
    differ, their ratio is multiplied into B. All else is taken over as it is stored, as float32.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
      base: the pretrained model, with as many labels as the adapter's own classifier has.
      saved: False takes the factors alone, so that the base may be for another task.

    Returns:
      (params, lora): ``params`` hold the arrays of ``base.params`` where nothing is stored.

    Raises:
      UserError: the folder is damaged, or a tensor is missing, unexpected or misshapen.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), _open(folder)
    params = flat_params(base.params)
    shapes = {path: np.shape(x) for path, x in params.items()}
    found = _sorted_out(folder, config, tensors, base, shapes)
    _check_complete(folder, config, found, shapes)
    if not saved:
        found = found._replace(saved={})
    described = {}
    for path, layers in found.factors.items():
        module = path.rpartition("/")[0]
        factors, scale = _stack(folder, config, layers, found.entries[path], params[path])
        names = config.description.form.leaves
        params |= {f"{module}/{name}": x for name, x in zip(names, factors, strict=True)}
        rank = factors[0].shape[-1]
        described[module] = (rank, alpha_of(scale, rank, config.rs))
    if not described:
        raise UserError(f"{folder / WEIGHTS_FILE} has no factors; is it an adapter of LoRA?")
    for (path, layer), name in found.saved.items():
        params[path] = _replaced(folder, tensors, name, params[path], layer, found.entries[path])
    trained = {path.rpartition("/")[0] for path, _ in found.saved}
    return unflatten_dict(params, sep="/"), _description(config, described, trained)


def _description(config: PeftConfig, described: dict[str, tuple[int, float]], trained) -> LoRA:
    """The LoRA of modules with these ranks and alphas, the most frequent as default."""
    common = Counter(described.values()).most_common(1)[0][0]
    others = [(re.escape(m), pair) for m, pair in sorted(described.items()) if pair != common]
    return config.description(
        rank=common[0],
        alpha=common[1],
        target=tuple(sorted(described)),
        train=tuple(sorted(trained)) or None,
        dropout=config.dropout,
        rs=config.rs,
        rank_pattern=tuple((module, rank) for module, (rank, _) in others),
        alpha_pattern=tuple((module, alpha) for module, (_, alpha) in others),
    )


def stored_labels(folder: str | Path) -> int | None:
    """Number of outputs of the classifier that an adapter's folder holds, None without one.

    Raises:
      UserError: the folder is damaged.
    """
    tensors = _open(Path(folder))
    names = {_plain(key): key for key in tensors}
    heads = [n for n in ("classifier.out_proj.weight", "classifier.weight") if n in names]
    return tensors.shape(names[heads[0]])[0] if heads else None


def _open(folder: Path) -> SafetensorsFile | PickledTensors:
    if (folder / WEIGHTS_FILE).exists():
        return SafetensorsFile(folder / WEIGHTS_FILE)
    if (folder / OLD_WEIGHTS_FILE).exists():
        return PickledTensors(folder / OLD_WEIGHTS_FILE)
    raise UserError(f"{folder} has no {WEIGHTS_FILE}; is it an adapter's folder?")


def _plain(key: str) -> str:
    """The name of a tensor without what PEFT, in any of its releases, puts into it."""
    return key.removeprefix(PREFIX).replace(".modules_to_save.", ".")


class _Found(NamedTuple):
    """The tensors of a file by what they are here; a layer without a stack is layer 0."""

    entries: dict[str, Entry]
    factors: dict[str, dict[int, tuple[str, list[np.ndarray]]]]  # (module's name, leaves)
    saved: dict[tuple[str, int], str]  # (path, layer) -> name in the file


def _sorted_out(folder: Path, config: PeftConfig, tensors, base: Pretrained, shapes) -> _Found:
    """Every tensor of the file, found in the family's table.

    Raises:
      UserError: one is not in it, is there twice, or is a factor without its partner.
    """
    file, prefix = folder / WEIGHTS_FILE, base.family.prefix
    spelt = config.description.form.peft
    assert spelt is not None  # only forms that PEFT has are read
    entries = {e.path: e for e in base.family.table if e.path in shapes}
    slots = {
        name: (entry.path, layer)
        for entry in entries.values()
        for spelling in entry.names
        for layer in range(_layers(entry, shapes))
        for name in (spelling.format(layer), spelling.format(layer).removeprefix(prefix))
    }
    weights = {
        name.rpartition(".")[0]: slot
        for name, slot in slots.items()
        if slot[0].rpartition("/")[2] in WEIGHTS
    }
    found: dict[Any, str] = {}
    modules, unexpected = {}, []
    for key in tensors:
        factor = LEAF.fullmatch(_plain(key))
        slot = weights.get(factor[1]) if factor else slots.get(_plain(key))
        if slot is None or not key.startswith(PREFIX):
            unexpected.append(key)
            continue
        if factor:
            kinds = spelt[slot[0].endswith("/embedding")]
            if factor[2] not in kinds:
                unexpected.append(key)
                continue
            modules[slot] = factor[1]
            slot = (*slot, kinds.index(factor[2]))
        if found.setdefault(slot, key) != key:
            raise UserError(f"{file}: {found[slot]!r} and {key!r} are the same tensor")
    sides = range(len(spelt[0]))
    halves = [(slot, side) for slot in modules for side in sides if (*slot, side) not in found]
    lonely = [f"{PREFIX}{modules[slot]}.{spelt[0][side]}" for slot, side in halves]
    if unexpected or lonely:
        parts = [("lacks", lonely), ("has unexpected", unexpected)]
        what = "; ".join(f"{verb} {some(names)}" for verb, names in parts if names)
        kind = base.family.classifier
        raise UserError(f"{file} {what}. Is it an adapter of {base.source}, a {kind}?")
    factors = {}
    for (path, layer), module in modules.items():
        leaves = [_floating(folder, tensors, found[path, layer, side]) for side in sides]
        factors.setdefault(path, {})[layer] = (module, leaves)
    saved = {slot: key for slot, key in found.items() if len(slot) == 2}
    return _Found(entries, factors, saved)


def _layers(entry: Entry, shapes) -> int:
    return shapes[entry.path][0] if entry.stacked else 1


def _floating(folder: Path, tensors, name: str) -> np.ndarray:
    value = tensors[name]
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{folder / WEIGHTS_FILE}: {name!r} is {value.dtype}; it must be floating")
    return value.astype(np.float32)


def _check_complete(folder: Path, config: PeftConfig, found: _Found, shapes) -> None:
    """Raises a UserError unless every module that the config names is in the file."""
    have = {(path, layer) for path, layers in found.factors.items() for layer in layers}
    have |= found.saved.keys()
    missing = []
    for entry in found.entries.values():
        adaptable = entry.path.rpartition("/")[2] in WEIGHTS
        for layer in range(_layers(entry, shapes)):
            modules = [name.format(layer).rpartition(".")[0] for name in entry.names]
            targets = config.targets if adaptable and config.targets else ()
            named = any(ends_with(module, target) for module in modules for target in targets)
            inside = any(_is_inside(module, root) for module in modules for root in config.saved)
            if (named or inside) and (entry.path, layer) not in have:
                missing.append(entry.names[-1].format(layer))
    if missing:
        raise UserError(
            f"{folder / WEIGHTS_FILE} lacks what {CONFIG_FILE} says of {some(missing)}; copy the "
            "folder again"
        )


def _is_inside(module: str, root: str) -> bool:
    """Whether a module is one that ``root`` names, or is in it.

    >>> _is_inside("bert.pooler.dense", "pooler"), _is_inside("bert.poolers", "pooler")
    (True, False)
    """
    return f".{root}." in f".{module}."


def _stack(folder: Path, config: PeftConfig, layers: dict, entry: Entry, weight):
    """(leaves, such as A (*stack, in, r) and B (*stack, r, out)), s of one weight from the leaves
    of its layers."""
    weight = weight if entry.stacked else np.asarray(weight)[None]
    ready, scales = {}, {}
    for layer, (name, leaves) in layers.items():
        ready[layer] = _leaves(folder, config, name, leaves, entry, weight.shape[1:])
        scales[layer] = config.scale_of(name, ready[layer][0].shape[1])
    common = Counter(scales.values()).most_common(1)[0][0]
    rank, count = max(a.shape[1] for a, *_ in ready.values()), len(weight)
    a, b, *others = next(iter(ready.values()))
    shapes = [(count, len(a), rank), (count, rank, b.shape[1])]
    whole = config.description.form.idle(weight, [*shapes, *((count, *x.shape) for x in others)])
    for layer, (a, b, *others) in ready.items():
        ratio = scales[layer] / common
        whole[0][layer, :, : a.shape[1]] = a
        whole[1][layer, : len(b)] = b if ratio == 1 else (ratio * b.astype(np.float64))
        for rest, x in zip(whole[2:], others, strict=True):
            rest[layer] = x
    return whole if entry.stacked else tuple(x[0] for x in whole), common


def _leaves(folder: Path, config: PeftConfig, name: str, leaves, entry: Entry, inner):
    """The leaves of one module, whose weight has the shape ``inner`` here: A (in, r), B (r, out).

    Raises:
      UserError: they do not fit the weight, or the rank that the config gives the module.
    """
    rank, form = config.rank_of(name), config.description.form
    _, ours, axes = zip(*peft_leaves(form, entry, inner, rank), strict=True)
    wanted = list(map(stored_shape, ours, axes))
    if [x.shape for x in leaves] != wanted:
        found = " and ".join(str(x.shape) for x in leaves)
        raise UserError(
            f"{folder / WEIGHTS_FILE}: the factors of {name!r} have shapes {found};"
            f" the base, and rank {rank} of {CONFIG_FILE}, ask for "
            + " and ".join(map(str, wanted))
        )
    shapes = form.shapes(inner, Layout((), tuple(range(len(inner) - 1)), (len(inner) - 1,)), rank)
    unfolded = [x if own is None else x.transpose(own) for x, own in zip(leaves, axes, strict=True)]
    return [x.reshape(shape) for x, shape in zip(unfolded, shapes, strict=True)]


def _replaced(folder: Path, tensors, name: str, old, layer: int, entry: Entry) -> np.ndarray:
    """A parameter with it, or one layer of it, as the file has it."""
    value = _floating(folder, tensors, name)
    wanted = stored_shape(np.shape(old)[entry.stacked :], entry.axes)
    if value.shape != wanted:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: {name!r} has shape {value.shape}, the base's is {wanted}; "
            "load the base with as many labels, and images of the size, that the adapter has"
        )
    value = np.ascontiguousarray(value if entry.axes is None else value.transpose(entry.axes))
    if not entry.stacked:
        return value
    new = np.array(old, np.float32)
    new[layer] = value
    return new
