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
from rmlora_jax.hub.new_tokens import with_mean_rows
from rmlora_jax.hub.peft_config import (
    ALL_LINEAR,
    CONFIG_FILE,
    PeftConfig,
    matches,
    read_config,
)
from rmlora_jax.hub.peft_stored import (
    WEIGHTS_FILE,
    Stored,
    is_apart,
    open_tensors,
    plain_name,
    sorted_out,
)
from rmlora_jax.hub.peft_write import alpha_of, peft_leaves
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.tied import EMBEDDING, HEAD, tied_head, untied, was_tied
from rmlora_jax.hub.tokenizer import FILES
from rmlora_jax.hub.weights import (
    from_stored,
    layers_of,
    some,
    stored_shape,
    to_stored,
)
from rmlora_jax.models.family import Entry, flat_params


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
    config, tensors, file = read_config(folder), open_tensors(folder), folder / WEIGHTS_FILE
    if config.targets == ALL_LINEAR:
        config = config._replace(targets=_linear_modules(base))
    stored = sorted_out(file, config, tensors, base)
    if not stored.factors:
        raise UserError(f"{file} has no factors; is it an adapter of LoRA?")
    _check_patterns(file, config, stored)
    if tied_head(base) is not None:
        if is_apart(file, config, tensors, stored):
            raise UserError(
                f"{file} changes the embedding or the head of {base.source} alone, but they are "
                "one there; give load_peft the base that hub.adapter_base(folder, base) returns"
            )
        stored = stored.without(HEAD)
    elif was_tied(base):
        stored = _both(file, config, stored)
    params = flat_params(base.params)
    shapes = {path: np.shape(x) for path, x in params.items()}
    entries = {e.path: e for e in base.family.table if e.path in shapes}
    _check_complete(file, config, base, entries, stored, shapes)
    if saved:
        _check_head(file, config, base, {path for path, _ in stored.whole})
    described, trained = {}, set()
    for path, layers in stored.factors.items():
        module = path.rpartition("/")[0]
        leaves, scale = _stack(file, config, layers, entries[path], params[path])
        names = config.description.form.leaves
        params |= {f"{module}/{name}": x for name, x in zip(names, leaves, strict=True)}
        rank = leaves[0].shape[-1]
        described[module] = (rank, alpha_of(scale, rank, config.rs))
    whole = stored.whole | {
        (path, layer): names
        for (path, layer), names in stored.under.items()
        if not _is_base(tensors[names[1]], params[path], layer, entries[path])
    }
    still = untrained(config, stored)
    for (path, layer), (_, name) in whole.items() if saved else ():
        params[path] = _replaced(file, tensors, name, params[path], layer, entries[path])
        if (path, layer) not in still:
            trained.add(path.rpartition("/")[0])
    for (path, _), (module, name) in stored.rows.items() if saved else ():
        rows = config.rows_of(module)
        params[path] = _with_rows(file, tensors, name, params[path], rows, entries[path])
        if not set(rows) <= set(base.rows):
            trained.add(path.rpartition("/")[0])
    return unflatten_dict(params, sep="/"), _description(config, described, trained)


def adapter_base(folder: str | Path, base: Pretrained, *, rows: bool = False) -> Pretrained:
    """The base for `load_peft` of an adapter: ``base``, with a head of its own or more tokens where
    needed.

    In a language model whose head is its embedding, an adapter of PEFT may change one without the
    other. The head is then made a parameter of its own. Where an adapter has an embedding, or rows
    of one, for tokens that the base lacks, embedding and head grow, and a tokenizer in its folder
    is taken. Any other adapter takes ``base`` itself.

    Args:
      rows: whether the rows of tokens that the adapter has trained are to be trained by themselves,
        as ``rows`` of the base, or with their table.

    Raises:
      UserError: the folder is damaged, or holds an adapter of another model.
    """
    if base.family.outputs is None:
        return base
    folder = Path(folder)
    config, tensors, file = read_config(folder), open_tensors(folder), folder / WEIGHTS_FILE
    stored = sorted_out(file, config, tensors, base)
    if tied_head(base) is not None and is_apart(file, config, tensors, stored):
        base = untied(base)
    found = {row for module, _ in stored.rows.values() for row in config.rows_of(module)}
    places = {(EMBEDDING, 0), (HEAD, 0)}
    sizes = [tensors.shape(names[1])[0] for one in (stored.whole, stored.under)
             for place, names in one.items() if place in places]
    old = base.config.vocab_size
    own = found | {row for size in sizes for row in range(old, size)}
    grown = old + sum(row >= old for row in own)
    if grown > old and max(own) < grown:  # each number has a row, as in a folder that is whole
        base = with_mean_rows(base, grown, range(old, grown), old)
    if own and any((folder / name).exists() for name in FILES):
        base = base._replace(tokenizer=folder)
    return base._replace(rows=tuple(sorted(found))) if rows and found else base


def untrained(config: PeftConfig, stored: Stored) -> set[tuple[str, int]]:
    """The embedding and the head that PEFT has written as a whole only because of their new size,
    while rows of tokens were trained."""
    if not stored.rows:
        return set()
    whole = {place for place, (module, _) in stored.whole.items() if not config.keeps(module)}
    return {(EMBEDDING, 0), (HEAD, 0)} & (whole | stored.under.keys())


def _both(file: Path, config: PeftConfig, stored: Stored) -> Stored:
    """What an adapter has of an embedding that PEFT ties to the head, for both, in a base that has
    them apart."""
    if config.tied and EMBEDDING in stored.factors:
        raise UserError(f"{file} has factors of an embedding that is the head, so it does not go "
                        "with a head of its own; give load_peft the base as it was loaded")
    own, head = (EMBEDDING, 0), (HEAD, 0)
    rows, whole = stored.rows, stored.whole
    if own in rows and head not in rows:
        rows = rows | {head: rows[own]}
    if config.tied and own in whole and head not in whole:
        whole = whole | {head: whole[own]}
    return stored._replace(rows=rows, whole=whole)


def _linear_modules(base: Pretrained) -> tuple[str, ...]:
    """PyTorch's names of all linear layers but the head's, with and without the prefix."""
    shapes = {path: np.shape(x) for path, x in flat_params(base.params).items()}
    return tuple(
        name.removeprefix(prefix)
        for entry in base.family.table
        if entry.path.endswith("/kernel") and not entry.path.startswith("head/")
        and len(shapes.get(entry.path, ())) == 2 + entry.stacked
        for layer in layers_of(entry, shapes)
        for name in (spelled.format(layer).rpartition(".")[0] for spelled in entry.names)
        for prefix in ("", base.family.prefix)
    )


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
    tensors = open_tensors(Path(folder))
    names = {plain_name(key): key for key in tensors}
    heads = [n for n in ("classifier.out_proj.weight", "classifier.weight") if n in names]
    return tensors.shape(names[heads[0]])[0] if heads else None


def _check_patterns(file: Path, config: PeftConfig, stored: Stored) -> None:
    """Raises a UserError unless each pattern has an adapted module."""
    names = [name for layers in stored.factors.values() for name, _ in layers.values()]
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches(key, module) for module in names):
                raise UserError(f"{file.with_name(CONFIG_FILE)}: {field} has {key[:80]!r}, which "
                                "matches no adapted layer; correct it, or take it out")


def _check_complete(file: Path, config: PeftConfig, base, entries, stored: Stored, shapes) -> None:
    """Raises a UserError unless the file has what the config says: factors of the modules that it
    names and of no others, whole the modules to be saved, and the rows that are trained."""
    factors = stored.factors
    found = {(path, i): name for path, one in factors.items() for i, (name, _) in one.items()}
    have = {*found, *stored.whole}
    spelling = _spelling(entries, base.family.prefix, found)
    missing, extra = [], []
    if any(config.tokens.values()) and not stored.rows:
        missing.append("trainable_token_indices")
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
    whole = form.idle(weight, [(weight.shape[0], *shape) for shape in shapes])
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
            "many labels or tokens, and images of the size, that the adapter has"
        )
    new = np.array(old, np.float32)
    new[layer if entry.stacked else ...] = from_stored(tensors, name, entry.axes, file)
    return new


def _is_base(stored: np.ndarray, weight, layer: int, entry: Entry) -> bool:
    """Whether a weight in the file is the base's, as far as its dtype can tell."""
    own = np.asarray(weight[layer] if entry.stacked else weight)
    return np.array_equal(to_stored(own, entry.axes).astype(stored.dtype), stored)


def _with_rows(file: Path, tensors, name: str, old, rows: tuple[int, ...], entry: Entry):
    """An embedding, or a head's kernel, with these rows of its tokens as the file has them."""
    tokens = stored_shape(np.shape(old), entry.axes)
    if entry.stacked or len(tokens) != 2 or tensors.shape(name) != (len(rows), tokens[1]):
        raise UserError(f"{file}: {name!r} has shape {tensors.shape(name)}; the base, and "
                        f"trainable_token_indices of {CONFIG_FILE}, ask for {len(rows), tokens[1]}")
    if rows and max(rows) >= tokens[0]:
        raise UserError(f"{file}: {name!r} has token {max(rows)}, but the base has {tokens[0]} "
                        "tokens; load the base with the tokens that were added for the adapter")
    new = np.array(old, np.float32)
    table = new if entry.axes is None else new.T
    table[list(rows)] = from_stored(tensors, name, None, file)
    return new
