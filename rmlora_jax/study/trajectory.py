"""The dimension of the space that a run's updates explored, from the factors it left behind.

The rank of one update Delta W = s A B is bounded by r, at every step. Its increments from one
snapshot to the next may each lie in another subspace: what they span together is bounded only by
2 r for each of them, and by the width of the layer. Delta W itself is never formed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

import rmlora_jax as rm
from rmlora_jax.optim.factors import find_factors, flatten
from rmlora_jax.train import snapshots

MOST = 16  # snapshots that are used, evenly over the run


def trajectory(folder: Path, config: Mapping[str, Any]) -> dict[str, list] | None:
    """Of the snapshots up to each step, means over all modules and layers:

    ``{"step": [K], "effective_rank": [K], "numerical_rank": [K], "bound": [K], "layers": [L]}``,
    with ``bound`` the most that either could be and ``layers`` the effective rank of each layer at
    the end. None where the run left fewer than two snapshots.
    """
    taken = snapshots.read(folder)
    if len(taken) < 2:
        return None
    from rmlora_jax.methods import description

    own = description(ml_collections.ConfigDict(dict(config)))
    # A snapshot of AdaLoRA or SoRA has its diagonal in A: to plain factors a plain description.
    lora = rm.LoRA(**{f.name: getattr(own, f.name) for f in dataclasses.fields(rm.LoRA)})
    kept = np.unique(np.linspace(0, len(taken) - 1, MOST).round().astype(int))
    taken = [taken[i] for i in kept]
    found = {"step": [], "effective_rank": [], "numerical_rank": [], "bound": []}
    for count in range(2, len(taken) + 1):
        modules = dimension([tree for _, tree in taken[:count]], lora)
        found["step"].append(taken[count - 1][0])
        for name in ("effective_rank", "numerical_rank"):
            values = np.concatenate([np.ravel(m[name]) for m in modules.values()])
            found[name].append(round(float(values.mean()), 4))
        bounds = [m["singular_values"].shape[-1] for m in modules.values()]
        found["bound"].append(round(float(np.mean(bounds)), 4))
    ranks = [np.ravel(m["effective_rank"]) for m in modules.values()]
    deepest = max(map(len, ranks))
    layers = np.mean([r for r in ranks if len(r) == deepest], axis=0)
    return found | {"layers": [round(float(r), 4) for r in layers]}


def dimension(factors: list[dict], lora: rm.LoRA) -> dict[str, dict[str, np.ndarray]]:
    """`rmlora_jax.trajectory_dimension` of trees that hold factors alone."""
    return rm.trajectory_dimension([_with_weights(tree, lora) for tree in factors], lora)


def _with_weights(tree: dict, lora: rm.LoRA) -> dict:
    """The tree with a weight of zeros, which takes no memory, beside every pair of factors."""
    leaves, _, _ = flatten(tree)
    pairs = {}
    for factor in find_factors(tree):
        pairs.setdefault(factor.module, {})[factor.side] = leaves[factor.index]
    whole = {}
    for module, pair in pairs.items():
        a, b = pair["a"], pair["b"]
        shape = (*a.shape[:-1], b.shape[-1])
        node = whole
        for name in filter(None, module.split("/")):
            node = node.setdefault(name, {})
        weight = np.broadcast_to(np.float32(0), shape)
        node |= {"lora_a": a, "lora_b": b, lora.weights[0]: weight}
    return whole
