"""How many operations a step needs: the matrix products of the model, counted from its sizes."""

import re
from collections.abc import Iterator

from rmlora_jax.bench.models import CLASSES, Entry, tokens
from rmlora_jax.bench.variants import MODULES
from rmlora_jax.models import DebertaConfig

ATTENTION = ("query", "key", "value", "out")
LINEARS = (*ATTENTION, "fc1", "fc2")


def step_flops(entry: Entry, batch: int, variant: str, rank: int = 4, modules: str = "all") -> int:
    r"""Floating-point operations of one step, a multiplication and an addition being 2.

    The forward pass of B examples of N tokens, with width D, MLP width F and L layers, is

    * linears: :math:`2 B N (4 D^2 + 2 D F)` a layer; the factors of one of in x out features
      :math:`2 B N r (\mathrm{in} + \mathrm{out})` more;
    * attention: :math:`4 B N^2 D` a layer, for :math:`Q K^T` and the mixing of V;
    * for each of DeBERTa's terms c2p and p2c :math:`4 B N^2 D` more a layer, and
      :math:`4 N D^2` for the projection of the 2 N relative positions;
    * ViT's patches :math:`2 B g^2 p^2 c D`, the pooler of texts :math:`2 B D^2`, the head
      :math:`2 B D \cdot \mathrm{classes}`.

    The backward pass of a product takes as much again for each of its two sides that a gradient
    must reach. On the floor it must reach the encoder's input, and no weight; with factors the
    lowest of them; for ``head`` nothing in the encoder; in full fine-tuning every weight. So a
    linear costs 2, about 2, 1 and 3 times its forward pass.

    It is what the method needs and not what a program does: rematerialisation and the products of
    ``execution="merged"`` are not counted, nor is anything but matrix products.

    Args:
      entry: the model and the length of its texts.
      batch: B.
      variant: one of ``rmlora_jax.bench.variants.VARIANTS``.
      rank: r.
      modules: a key of ``rmlora_jax.bench.variants.MODULES``, for the variants with factors.

    >>> from rmlora_jax.bench.models import MODELS
    >>> [f"{step_flops(MODELS['vit-base'], 256, v) / 1e12:.1f}" for v in ("floor", "lora", "full")]
    ['18.3', '18.3', '26.9']
    """
    c = entry.config
    full, floor, head = (variant == name for name in ("full", "floor", "head"))
    adapted = set() if full or floor or head else {n for n in LINEARS if _is_adapted(n, modules)}
    moved = set(LINEARS) if full else adapted
    later = c.num_hidden_layers - 1
    products = [*_layer(entry, batch, moved, adapted, rank, full, reached=full or floor)]
    products += later * [*_layer(entry, batch, moved, adapted, rank, full, reached=not head)]
    rows = batch * 2 * c.hidden_size
    if entry.length is None:
        patch = rows * c.grid**2 * c.patch_size**2 * c.num_channels
        products.append((patch, full))
    else:
        products.append((rows * c.hidden_size, 1 + (not floor)))
    products.append((rows * CLASSES, 1 + (not floor)))
    return sum(flops * (1 + sides) for flops, sides in products)


def _is_adapted(name: str, modules: str) -> bool:
    group = "attention" if name in ATTENTION else "mlp"
    return re.fullmatch(MODULES[modules], f"encoder/layers/{group}/{name}") is not None


def _layer(
    entry: Entry, batch: int, moved: set, adapted: set, rank: int, full: bool, *, reached: bool
) -> Iterator[tuple[int, int]]:
    """(flops forward, sides that a gradient must reach) of each product of a layer.

    ``moved`` are the linears with anything to train, ``reached`` says whether the layer's input
    needs a gradient.
    """
    c, n = entry.config, tokens(entry)
    d, f = c.hidden_size, c.intermediate_size
    sizes = dict.fromkeys(ATTENTION, (d, d)) | {"fc1": (d, f), "fc2": (f, d)}
    query, key, value = (reached or name in moved for name in ATTENTION[:3])
    mixed = query or key or value
    after = mixed or "out" in moved
    reach = {"query": reached, "key": reached, "value": reached}
    reach |= {"out": mixed, "fc1": after, "fc2": after or "fc1" in moved}

    def linear(name: str, rows: int, reached: bool) -> Iterator[tuple[int, int]]:
        wide, narrow = sizes[name]
        yield 2 * rows * wide * narrow, reached + full
        if name in adapted:
            yield 2 * rows * wide * rank, reached + 1
            yield 2 * rows * rank * narrow, 2

    for name in LINEARS:
        yield from linear(name, batch * n, reach[name])
    core = 2 * batch * n * n * d
    yield core, query + key
    yield core, (query or key) + value
    if isinstance(c, DebertaConfig):
        # The relative positions go through the projections of the content (share_att_key).
        for term, content, position in (("c2p", query, "key"), ("p2c", key, "query")):
            if term in c.terms:
                yield 2 * core, content + (position in moved)
                yield from linear(position, 2 * n, full)
