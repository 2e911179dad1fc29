"""What the file of an adapter in PEFT's format holds, by the parameters of its base."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmlora_jax.adapt.lora import WEIGHTS, LoRA
from rmlora_jax.errors import UserError
from rmlora_jax.hub.peft_config import CONFIG_FILE, PREFIX, PeftConfig
from rmlora_jax.hub.pickled import PickledTensors
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.safetensors_file import SafetensorsFile
from rmlora_jax.hub.tied import EMBEDDING, HEAD, are_tied, tied_head
from rmlora_jax.hub.weights import differences, from_stored, places
from rmlora_jax.models.family import flat_params

WEIGHTS_FILE = "adapter_model.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"
# What PEFT stores beside the factors of an embedding and a head: their own weights; and the trained
# rows of a weight, which LoraConfig(trainable_token_indices=...) names.
UNDER, ROWS = "base_layer.weight", "token_adapter.trainable_tokens_delta"
UNDER_ROWS = f"token_adapter.{UNDER}"  # the weight that has these rows, where it was resized


class Stored(NamedTuple):
    """What an adapter's file has, by the places of the base's parameters: (path, layer).

    A parameter without a stack has layer 0 alone. All but factors are (module, tensor) names.
    """

    factors: dict[str, dict[int, tuple[str, list[np.ndarray]]]]  # path -> layer -> module, leaves
    whole: dict[tuple[str, int], tuple[str, str]]  # parameters
    under: dict[tuple[str, int], tuple[str, str]]  # weights below factors
    rows: dict[tuple[str, int], tuple[str, str]]  # trained rows of weights

    def without(self, path: str) -> "Stored":
        """All but what belongs to one parameter."""
        factors = {own: layers for own, layers in self.factors.items() if own != path}
        rest = ({k: v for k, v in found.items() if k[0] != path} for found in self[1:])
        return Stored(factors, *rest)


def open_tensors(folder: Path) -> SafetensorsFile | PickledTensors:
    if (folder / WEIGHTS_FILE).exists():
        return SafetensorsFile(folder / WEIGHTS_FILE)
    if (folder / OLD_WEIGHTS_FILE).exists():
        return PickledTensors(folder / OLD_WEIGHTS_FILE)
    raise UserError(f"{folder} has no {WEIGHTS_FILE}; is it an adapter's folder?")


def plain_name(key: str) -> str:
    """The name of a tensor without what PEFT, in any of its releases, puts into it."""
    return key.removeprefix(PREFIX).replace(".modules_to_save.", ".")


def sorted_out(file: Path, config: PeftConfig, tensors, base: Pretrained) -> Stored:
    """What the file has. A head that is the base's embedding has a place of its own, too."""
    spelt = config.description.form.peft
    assert spelt is not None  # only forms that PEFT has are read
    shapes = {path: np.shape(x) for path, x in flat_params(base.params).items()}
    if head := tied_head(base):
        shapes[head.path] = shapes[EMBEDDING][::-1]
    slots: dict[str, tuple] = {**places(base.family, shapes)}
    for name, (path, layer) in tuple(slots.items()):
        if path.rpartition("/")[2] in WEIGHTS:
            module = name.rpartition(".")[0]
            for side in (*spelt[path.endswith("/embedding")], UNDER, ROWS):
                slots[f"{module}.{side}"] = (path, layer, side)
            slots[f"{module}.{UNDER_ROWS}"] = (path, layer, UNDER)
    found, modules, unexpected = {}, {}, []
    for key in tensors:
        if _is_copy(tensors, key):
            continue
        slot = slots.get(plain_name(key)) if key.startswith(PREFIX) else None
        if slot is None:
            unexpected.append(key)
        elif found.setdefault(slot, key) != key:
            raise UserError(f"{file}: {found[slot]!r} and {key!r} are the same tensor")
        elif len(slot) == 3 and slot[2] not in (UNDER, ROWS):
            modules[slot[:2]] = plain_name(key).removesuffix(f".{slot[2]}")
    lonely = [
        f"{PREFIX}{module}.{side}"
        for (path, layer), module in modules.items()
        for side in spelt[path.endswith("/embedding")]
        if (path, layer, side) not in found
    ]
    if wrong := differences(lonely, unexpected):
        kind = base.family.classifier
        raise UserError(f"{file} {wrong}. Is it an adapter of {base.source}, a {kind}?")
    factors: dict[str, dict[int, tuple[str, list[np.ndarray]]]] = {}
    for (path, layer), module in modules.items():
        names = (found[path, layer, side] for side in spelt[path.endswith("/embedding")])
        leaves = [from_stored(tensors, x, None, file).astype(np.float32) for x in names]
        factors.setdefault(path, {})[layer] = (module, leaves)

    def of(*side: str) -> dict[tuple[str, int], tuple[str, str]]:
        ending = side[0] if side else "weight"
        return {(slot[0], slot[1]): (plain_name(key).removesuffix(f".{ending}"), key)
                for slot, key in found.items() if slot[2:] == side}

    return Stored(factors, of(), of(UNDER), of(ROWS))


def _is_copy(tensors, key: str) -> bool:
    """Whether a tensor is only there because PEFT writes a resized embedding once more: that of a
    whole module under its inner name, or the base's in its place."""
    for inside in (".modules_to_save.", ".original_module."):
        outside = key.replace(inside, ".")
        if inside in key and outside in tensors:
            return "original" in inside or np.array_equal(tensors[key], tensors[outside])
    return False


def is_apart(file: Path, config: PeftConfig, tensors, stored: Stored) -> bool:
    """Whether an adapter gives embedding and head, which are one in the base, different weights.

    PEFT keeps rows of tokens together by itself, factors and whole modules only where
    ensure_weight_tying says so.
    """
    places = (EMBEDDING, 0), (HEAD, 0)
    (rows, head_rows), (whole, head_whole) = (
        [found.get(place) for place in places] for found in (stored.rows, stored.whole)
    )
    factors, head_factors = (stored.factors.get(path, {}).get(0) for path in (EMBEDDING, HEAD))
    if rows and head_rows and np.array_equal(*(tensors[names[1]] for names in (rows, head_rows))):
        head_rows = None  # PEFT writes both where the vocabulary was resized
    if rows or head_rows:
        if factors or head_factors or whole or head_whole:
            raise UserError(f"{file} has rows of tokens of an embedding that is the head, and "
                            "factors or a whole weight of them, too; train it with one of these")
        return head_rows is not None
    if factors and head_factors:
        names = (factors[0], head_factors[0])
        alike = len({config.scale_of(name, config.rank_of(name)) for name in names}) == 1
        same = alike and are_tied(factors[1], head_factors[1])
        damaged = config.tied and config.description is LoRA and alike and not same
    else:
        found = [tensors[names[1]] for names in (whole, head_whole) if names]
        same = len(found) == 2 and np.array_equal(*found)
        damaged = config.tied and len(found) == 2 and not same
    if damaged:
        raise UserError(f"{file}: {CONFIG_FILE} says ensure_weight_tying, but what it has of the "
                        "head is not what it has of the embedding; copy the folder again")
    one = bool(factors or whole) and not (head_factors or head_whole)
    none = not (factors or whole or head_factors or head_whole)
    return not (same or none or (config.tied and one))
