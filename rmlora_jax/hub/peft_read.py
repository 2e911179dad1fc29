"""Reading an adapter in the format of Hugging Face PEFT."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.adapt.forms import Form
from rmlora_jax.adapt.geometry import Layout
from rmlora_jax.adapt.lora import WEIGHTS, LoRA
from rmlora_jax.errors import UserError
from rmlora_jax.hub.peft_config import CONFIG_FILE, PREFIX, PeftConfig, matches, read_config
from rmlora_jax.hub.peft_write import WEIGHTS_FILE, alpha_of, peft_leaves
from rmlora_jax.hub.pickled import PickledTensors
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.safetensors_file import SafetensorsFile
from rmlora_jax.hub.weights import differences, from_stored, layers_of, places, some, stored_shape
from rmlora_jax.models.family import Entry, flat_params

OLD_WEIGHTS_FILE = "adapter_model.bin"


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

    Where ``init_lora_weights`` is "pissa" or "olora", PEFT takes s A_0 B_0 out of the base before
    it adds s A B. The base here stays whole: the factors are [A, A_0] and [B; -B_0], of twice the
    rank.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
      base: the pretrained model, with as many labels as the adapter's own classifier has.
      saved: False takes the factors alone, so that the base may be for another task, or have
        layers that are new (``base.new``) and still to be trained.

    Returns:
      (params, lora): ``params`` hold the arrays of ``base.params`` where nothing is stored.

    Raises:
      UserError: the folder is damaged, or a tensor is missing, unexpected or misshapen; the config
        asks for what cannot be done here; a layer is new in the base and not stored.
    """
    folder = Path(folder)
    config, tensors, file = read_config(folder), _open(folder), folder / WEIGHTS_FILE
    params = flat_params(base.params)
    shapes = {path: np.shape(x) for path, x in params.items()}
    entries = {e.path: e for e in base.family.table if e.path in shapes}
    factors, whole = _sorted_out(file, config, tensors, base, shapes)
    have = {*whole, *((path, layer) for path, layers in factors.items() for layer in layers)}
    if not factors:
        raise UserError(f"{file} has no factors; is it an adapter of LoRA?")
    _check_complete(file, config, base, entries, factors, have, shapes)
    if saved:
        _check_head(file, config, base, {path for path, _ in whole})
    described, trained = {}, set()
    for path, layers in factors.items():
        module = path.rpartition("/")[0]
        leaves, scale = _stack(file, config, layers, entries[path], params[path])
        names = config.description.form.leaves
        params |= {f"{module}/{name}": x for name, x in zip(names, leaves, strict=True)}
        rank = leaves[0].shape[-1]
        described[module] = (rank, alpha_of(scale, rank, config.rs))
    for (path, layer), name in whole.items() if saved else ():
        params[path] = _replaced(file, tensors, name, params[path], layer, entries[path])
        trained.add(path.rpartition("/")[0])
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


def _sorted_out(file: Path, config: PeftConfig, tensors, base: Pretrained, shapes):
    """({path: {layer: (module's name, leaves)}}, {(path, layer): name in the file}) of factors and
    of whole parameters; one without a stack has layer 0 alone."""
    spelt = config.description.form.peft
    assert spelt is not None  # only forms that PEFT has are read
    slots: dict[str, tuple] = {**places(base.family, shapes)}
    for name, (path, layer) in tuple(slots.items()):
        if path.rpartition("/")[2] in WEIGHTS:
            for side, leaf in enumerate(spelt[path.endswith("/embedding")]):
                slots[f"{name.rpartition('.')[0]}.{leaf}"] = (path, layer, side)
    found, modules, unexpected = {}, {}, []
    for key in tensors:
        slot = slots.get(_plain(key)) if key.startswith(PREFIX) else None
        if slot is None:
            unexpected.append(key)
        elif found.setdefault(slot, key) != key:
            raise UserError(f"{file}: {found[slot]!r} and {key!r} are the same tensor")
        elif len(slot) == 3:
            leaf = spelt[slot[0].endswith("/embedding")][slot[2]]
            modules[slot[:2]] = _plain(key).removesuffix(f".{leaf}")
    lonely = [
        f"{PREFIX}{module}.{leaf}"
        for (path, layer), module in modules.items()
        for side, leaf in enumerate(spelt[path.endswith("/embedding")])
        if (path, layer, side) not in found
    ]
    if wrong := differences(lonely, unexpected):
        kind = base.family.classifier
        raise UserError(f"{file} {wrong}. Is it an adapter of {base.source}, a {kind}?")
    factors: dict[str, dict[int, tuple[str, list[np.ndarray]]]] = {}
    for (path, layer), module in modules.items():
        names = (found[path, layer, side] for side in range(len(spelt[0])))
        leaves = [from_stored(tensors, x, None, file).astype(np.float32) for x in names]
        factors.setdefault(path, {})[layer] = (module, leaves)
    return factors, {slot: key for slot, key in found.items() if len(slot) == 2}


def _check_complete(file: Path, config: PeftConfig, base, entries, factors, have, shapes) -> None:
    """Raises a UserError unless the file has what the config says: factors of the modules that it
    names and of no others, whole the modules to be saved, and a module for each pattern."""
    found = {(path, i): name for path, one in factors.items() for i, (name, _) in one.items()}
    spelling = _spelling(entries, base.family.prefix, found)
    missing, extra = [], []
    for entry in entries.values():
        adaptable = entry.path.rpartition("/")[2] in WEIGHTS
        for layer in layers_of(entry, shapes):
            place, name = (entry.path, layer), spelling(entry, layer)
            modules = [name.format(layer).rpartition(".")[0] for name in entry.names]
            inside = any(map(config.keeps, modules))
            named = adaptable and config.adapts(name)
            if (named or inside) and place not in have:
                missing.append(entry.names[-1].format(layer))
            if place in found and config.targets and not (named or inside):
                extra.append(name)
    if missing:
        raise UserError(
            f"{file} lacks what {CONFIG_FILE} says of {some(missing)}; copy the folder again"
        )
    if extra:
        raise UserError(f"{file} has factors of {some(extra)}, which {CONFIG_FILE} does not target "
                        "and PEFT leaves out; correct its target_modules, or copy the folder again")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches(key, module) for module in found.values()):
                raise UserError(f"{file.with_name(CONFIG_FILE)}: {field} has {key[:80]!r}, which "
                                "matches no adapted layer; correct it, or take it out")


def _spelling(entries, prefix: str, found) -> Callable[[Entry, int], str]:
    """(entry, layer) -> the module's name, as the file spells those that it has factors of."""

    def spell(which: int, cut: str, entry: Entry, layer: int) -> str:
        return entry.names[which].format(layer).rpartition(".")[0].removeprefix(cut)

    ways = [partial(spell, which, cut) for which in (-1, 0) for cut in ("", prefix)]
    return max(ways, key=lambda way: sum(
        way(entries[path], layer) == name for (path, layer), name in found.items()))


def _check_head(file: Path, config: PeftConfig, base: Pretrained, whole: set[str]) -> None:
    """Raises a UserError unless all that the base lacks is stored, for a model of its purpose."""
    if config.task not in ("", base.family.purpose) and any(x.startswith("head/") for x in whole):
        raise UserError(f"{file} holds the head of a model for {config.task}, not for "
                        f"{base.family.purpose}; train one with task_type SEQ_CLS")
    if lacking := [path for path in base.new if path not in whole]:
        raise UserError(
            f"{file} has no trained {', '.join(lacking)}, nor has the base {base.source}; list it "
            "in PEFT's modules_to_save and train again, or take the factors alone with "
            "load_peft(..., saved=False)"
        )


def _stack(file: Path, config: PeftConfig, layers: dict, entry: Entry, weight):
    """(leaves, such as A (*stack, in, r) and B (*stack, r, out)), s of one weight from the leaves
    of its layers."""
    weight = weight if entry.stacked else np.asarray(weight)[None]
    inner, form = weight.shape[1:], config.description.form
    axes = Layout((), tuple(range(len(inner) - 1)), (len(inner) - 1,))
    ready, scales = {}, {}
    for layer, (name, leaves) in layers.items():
        rank = config.rank_of(name)
        leaves = _in_our_order(file, form, name, leaves, entry, inner, rank)
        shapes = form.shapes(inner, axes, rank)
        ready[layer] = [x.reshape(shape) for x, shape in zip(leaves, shapes, strict=True)]
        scales[layer] = config.scale_of(name, rank)
        if config.init:
            if len(inner) != 2 or entry.path.endswith("/embedding"):
                raise UserError(f"{file}: init_lora_weights is {config.init!r}, which PEFT has for "
                                f"linear layers alone, not for {name!r}")
            a, b, *others = ready[layer]
            a0, b0 = _taken_out(config.init, weight[layer], rank, scales[layer])
            ready[layer] = [np.hstack([a, a0]), np.vstack([b, -b0]), *others]
    common = Counter(scales.values()).most_common(1)[0][0]
    shapes = form.shapes(inner, axes, max(len(b) for _, b, *_ in ready.values()))
    whole = form.idle(weight, [(len(weight), *shape) for shape in shapes])
    for layer, (a, b, *others) in ready.items():
        ratio = scales[layer] / common
        whole[0][layer, :, : a.shape[1]] = a
        whole[1][layer, : len(b)] = b if ratio == 1 else (ratio * b.astype(np.float64))
        for rest, x in zip(whole[2:], others, strict=True):
            rest[layer] = x
    return whole if entry.stacked else tuple(x[0] for x in whole), common


def _taken_out(init: str, weight, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A_0 (in, r) and B_0 (r, out): PEFT's base is ``weight`` (in, out) - scale A_0 B_0."""
    weight = np.asarray(weight, np.float32)
    if init == "olora":  # arXiv:2406.01775, of PyTorch's weight (out, in)
        q, r = np.linalg.qr(weight.T)
        return r[:rank].T, q[:, :rank].T
    u, s, vt = np.linalg.svd(weight, full_matrices=False)  # arXiv:2404.02948
    root = np.sqrt(s[:rank].astype(np.float64) / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _in_our_order(file: Path, form: Form, name: str, leaves, entry: Entry, inner, rank: int):
    """The leaves of a module of this rank, whose weight has the shape ``inner``, in our order of
    axes."""
    _, ours, axes = zip(*peft_leaves(form, entry, inner, rank), strict=True)
    wanted = list(map(stored_shape, ours, axes))
    if [x.shape for x in leaves] != wanted:
        found = " and ".join(str(x.shape) for x in leaves)
        raise UserError(
            f"{file}: the factors of {name!r} have shapes {found}; the base, and rank {rank} of "
            f"{CONFIG_FILE}, ask for " + " and ".join(map(str, wanted))
        )
    return [x if own is None else x.transpose(own) for x, own in zip(leaves, axes, strict=True)]


def _replaced(file: Path, tensors, name: str, old, layer: int, entry: Entry) -> np.ndarray:
    """A parameter with it, or one layer of it, as the file has it."""
    shape, wanted = tensors.shape(name), stored_shape(np.shape(old)[entry.stacked :], entry.axes)
    if shape != wanted:
        raise UserError(
            f"{file}: {name!r} has shape {shape}, the base's is {wanted}; load the base with as "
            "many labels, and images of the size, that the adapter has"
        )
    new = np.array(old, np.float32)
    new[layer if entry.stacked else ...] = from_stored(tensors, name, entry.axes, file)
    return new
