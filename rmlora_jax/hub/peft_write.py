"""Writing an adapter in the format of Hugging Face PEFT.

What the folder holds is a product of names: the table of a family says what a parameter is called
in PyTorch and how its axes lie, PEFT puts ``base_model.model.`` in front and ``.lora_A.weight`` or
``.lora_B.weight`` behind. A stack of L layers here is L modules there, each with a rank of its own.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.adapt.forms import PLAIN, Form, is_factor
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.ranks import alpha_for, to_lora
from rmlora_jax.adapt.tree import adapted_weights
from rmlora_jax.errors import UserError
from rmlora_jax.files import new_folder, write_bytes_atomic, write_json, write_text_atomic
from rmlora_jax.hub.export import write_tokenizer
from rmlora_jax.hub.info import Info, adapter_card, write_info
from rmlora_jax.hub.peft_config import CONFIG_FILE, PREFIX, Names, endings
from rmlora_jax.hub.peft_stored import ROWS, WEIGHTS_FILE
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.source import PACKAGED, published_as
from rmlora_jax.hub.tied import EMBEDDING, HEAD, exchanged, grown_from, published
from rmlora_jax.hub.vllm import vllm_obstacles
from rmlora_jax.hub.weights import some, stored_tensors, to_stored
from rmlora_jax.models.family import Entry, flat_params

# PEFT has none for images.
TASK_TYPES = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}


def save_peft(
    folder: str | Path,
    params: Mapping[str, Any],
    lora: LoRA,
    base: Pretrained,
    *,
    info: Info | None = None,
    old_names: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes an adapter that PEFT opens in PyTorch, and `load_peft` here.

    The folder has the factors of every adapted module, and as ``modules_to_save`` whatever else is
    trained (``lora.train``) or new in ``base``. With them the base gives the outputs of the adapted
    model. AdaLoRA and SoRA are written as the plain LoRA that `to_lora` makes of them, each layer
    with the rank that it has left; PiSSA as the change to the untouched base, of twice the rank. A
    module that is trained in full and has factors is written merged.

    Where the head of a language model is its embedding, PyTorch has two modules, and so has the
    folder: factors of the embedding, exchanged, are those of the head. (Not DoRA's: both modules
    are then written whole.) Of an embedding, or a head, of which only some tokens have changed,
    these rows alone are written, as PEFT's trainable_token_indices. A tokenizer with new tokens is
    written, too.

    Args:
      folder: to write; it appears as a whole or not at all.
      params: parameters of the adapted model, base included, as `rmlora_jax.join` gives them.
      lora: their description.
      base: what `load_pretrained` returned, of which ``params`` are an adaptation.
      info: classes and preprocessing, kept beside the adapter and in its README.md.
      old_names: name a ViT's modules as transformers up to 5.8 does, not as later ones do. (Files
        of the other families have one spelling.) PEFT looks for the names of the version that it
        runs with.
      overwrite: replace a folder that exists.

    Raises:
      UserError: the folder exists, or something that is adapted or trained has no name in PyTorch.
      ValueError: ``params`` and ``lora`` do not belong together.
    """
    if lora.form.peft is None:
        params, lora = to_lora(params, lora)
    names = Names(base, old_names)
    flat = flat_params(params)  # of which only what is written comes to the host
    untouched = flat_params(base.params)
    kept = {path: np.asarray(flat[path]) for root in _saved_modules(names, flat, lora, base)
            for path in names.below(root)}
    modules, scales = {}, {}
    for (*module, leaf), weight, factors in adapted_weights(params, lora):
        path, scale = "/".join((*module, leaf)), lora.scale_of("/".join(module))
        if path not in names.entries:
            raise UserError(
                f"{'/'.join(module)!r} has factors, but no name in {base.family.classifier}; "
                "exclude it from LoRA.target, or merge and save the whole model"
            )
        tied = names.tied if path == EMBEDDING else None
        if path in kept or (tied and len(factors) > 2):
            kept[path] = np.asarray(lora.form.merged(np.asarray(weight), factors, scale))
            continue
        if lora.init == "pissa":
            a, b = factors
            factors = _from_untouched(untouched[path], a, b, scale, lora)
        entry = names.entries[path]
        layers: Any = zip(*map(np.asarray, factors), strict=True) if entry.stacked else [factors]
        for name, one in zip(names.of_layers(names.module(path)), layers, strict=True):
            modules[name] = _stored_leaves(lora.form, one, entry, weight.shape[entry.stacked :])
            scales[name] = scale
        if tied:
            (_, a), (_, b) = modules[names.module(path)]
            assert PLAIN.peft is not None
            modules[tied] = list(zip(PLAIN.peft[0], exchanged(a, b), strict=True))
            scales[tied] = scale
    # A layer without a direction is the base's, and left out; but PEFT wants to find one layer.
    used = {name: sides for name, sides in modules.items() if any(x.any() for _, x in sides)}
    modules = used or modules
    tensors = {
        f"{PREFIX}{name}.{side}": value for name, sides in modules.items() for side, value in sides
    }
    tokens, rows = _changed_rows(names, kept, untouched)
    kept = {path: value for path, value in kept.items() if names.module(path) not in tokens}
    whole = stored_tensors(kept, base.family.table, old_names=old_names) | rows
    saved = {names.root(path) for path in kept}
    if names.tied and EMBEDDING in kept:
        saved.add(names.tied)
        whole[f"{names.tied}.weight"] = np.asarray(kept[EMBEDDING])
    tensors |= {PREFIX + name: value for name, value in whole.items()}
    ranks = {name: len(sides[0][1]) for name, sides in modules.items()}
    alphas = {name: alpha_of(scales[name], rank, lora.rs) for name, rank in ranks.items()}
    config = _config(names, base, lora, ranks, alphas, saved)
    if tokens:
        config["trainable_token_indices"] = {
            ending: found for module, found in tokens.items()
            for ending in endings([module], names.modules)
        }
    if names.tied in saved or names.tied in modules:
        config["ensure_weight_tying"] = True  # in PEFT since 0.18; before, the two train apart
    with new_folder(Path(folder), overwrite=overwrite) as temporary:
        from safetensors.numpy import save

        write_bytes_atomic(temporary / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
        write_json(temporary / CONFIG_FILE, config)
        if info:
            packaged = base.source if base.source in PACKAGED else None
            write_info(temporary, dataclasses.replace(info, base=packaged))
        if base.tokens or base.tokenizer:
            write_tokenizer(base, temporary)
        vllm = vllm_obstacles(temporary, base.family)
        card = adapter_card(config, base, info, old_names, vllm)
        write_text_atomic(temporary / "README.md", card)
    return Path(folder)


def _config(names: Names, base: Pretrained, lora: LoRA, ranks, alphas, saved) -> dict[str, Any]:
    """The content of adapter_config.json, with every field that old releases of PEFT want."""
    name, revision = published_as(base.source)
    r, alpha = Counter((ranks[name], alphas[name]) for name in ranks).most_common(1)[0][0]

    def pattern(values: dict, usual) -> dict:
        return {
            ending: value
            for value in sorted(set(values.values()) - {usual})
            for ending in endings((n for n in values if values[n] == value), names.modules)
        }

    return {
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": endings(
            (name for root in sorted(saved) for name in names.of_layers(root)), names.modules
        ) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": pattern(ranks, r),
        "alpha_pattern": pattern(alphas, alpha),
        "revision": revision,
        "target_modules": endings(ranks, names.modules),
        "task_type": TASK_TYPES.get(base.family.purpose),
        "use_rslora": lora.rs,
        **lora.form.peft_fields,
    }


def _stored_leaves(form: Form, leaves, entry: Entry, shape: tuple[int, ...]):
    """(name, value) of each leaf of one layer, whose weight has this shape, as PEFT keeps it.

    Directions of A (in, r) and B (r, out) behind the last that is not 0 on both sides are padding,
    and are left out.
    """
    a, b, *others = leaves
    used = np.flatnonzero((a != 0).any(0) | (b != 0).any(1))
    rank = int(used[-1]) + 1 if used.size else 1
    leaves = (a[:, :rank], b[:rank], *others)
    return [
        (name, to_stored(np.reshape(x, ours), axes))
        for x, (name, ours, axes) in zip(leaves, peft_leaves(form, entry, shape, rank), strict=True)
    ]


def peft_leaves(form: Form, entry: Entry, shape: tuple[int, ...], rank: int):
    """(PEFT's name, shape in our order of axes, ``Entry.axes`` to it) of each leaf of a form.

    ``shape`` is that of the weight of one layer.
    """
    assert form.peft is not None
    embedded = entry.path.endswith("/embedding")
    axes = (1, 0) if embedded else entry.axes
    for name, ours in zip(form.peft[embedded], form.peft_shapes(shape, rank), strict=True):
        yield name, ours, axes if len(ours) == len(shape) else None


def alpha_of(scale: float, rank: int, rs: bool) -> float:
    """The alpha of this scale, a whole number where there is one: PEFT says it is."""
    alpha = alpha_for(scale, math.sqrt(rank) if rs else rank)
    return int(alpha) if alpha.is_integer() else alpha


def _from_untouched(weight, a, b, scale: float, lora: LoRA):
    """(A', B') of twice the rank with s A' B' = s A B - s A_0 B_0: the change to a base from which
    PiSSA has moved A_0 B_0 out."""
    weight, shapes = jnp.asarray(np.asarray(weight)), (a.shape, b.shape)
    (a0, b0), _ = lora.form.initial(
        jax.random.key(0), weight, None, shapes, scale, lora.init, lora.dtype
    )
    return jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -2)


def _changed_rows(names: Names, kept, untouched) -> tuple[dict[str, list[int]], dict]:
    """({module: tokens}, {name: rows}) of embeddings and heads to keep of which few have changed.

    Tokens that the published base does not have, or that are new, count as changed. PEFT keeps the
    rows of an embedding and of a head together where they are one in the base's files, so that
    there a head that was made a parameter of its own is kept as a whole.
    """
    base, tokens, found = names.base, {}, {}
    if base.family.outputs is None:
        return {}, {}
    own = published(base)
    if names.tied is None and own.tie_word_embeddings:
        return {}, {}
    for path in (p for p in (EMBEDDING, HEAD) if p in kept):
        entry = names.entries[path]
        new, old = (to_stored(np.asarray(x), entry.axes) for x in (kept[path], untouched[path]))
        changed = (new != old.astype(new.dtype)).any(1)
        changed[own.vocab_size :] = True
        changed[list(base.rows)] = True
        if 0 < changed.sum() <= len(changed) / 4:
            module, rows = names.module(path), np.flatnonzero(changed)
            tokens[module], found[f"{module}.{ROWS}"] = rows.tolist(), new[rows]
    return tokens, found


def _saved_modules(names, flat, lora: LoRA, base: Pretrained) -> list[str]:
    """Names of the modules to keep as a whole: those trained beside the factors, new, moved, or
    with new tokens."""
    grown = bool(base.rows) or grown_from(base) is not None
    own = [p for p in flat if not is_factor(p.split("/")) and (
        lora.trains(p) or p in base.new or (base.moved and p.startswith("head/"))
        or (grown and p in (EMBEDDING, HEAD)))]
    unknown = [path for path in own if path not in names.entries]
    if unknown:
        raise UserError(
            f"{some(unknown)} is trained, but has no name in {base.family.classifier}; only the "
            "whole model can be saved"
        )
    return sorted({names.root(path) for path in own})
