"""A Linen or an NNX model as a pure function of a flat dictionary of parameters.

A host is what every check of the comparison runs: ``host.run(values, *args)``, where ``values``
maps '/'-joined paths to arrays. ``host.static`` is the hashable part of the model, so that a check
can count how often jit traces it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict


@dataclasses.dataclass
class Host:
    """Methods that both frameworks share; ``static``, ``values`` and ``call`` differ."""

    def run(self, values, *args, **kwargs):
        return self.call(self.static, values, *args, **kwargs)


@dataclasses.dataclass
class Linen(Host):
    """``module`` with its ``variables``, whose parameters may be boxed."""

    module: nn.Module
    variables: dict[str, Any]

    @classmethod
    def create(cls, module, args, **kwargs):
        return cls(module, jax.jit(lambda k: module.init(k, *args, **kwargs))(jax.random.key(0)))

    @property
    def static(self):
        return self.module

    @property
    def values(self):
        return flatten_dict(meta.unbox(self.variables["params"]), sep="/")

    @property
    def names(self):
        """{path: names of the mesh axes} of the parameters that carry any."""
        flat = flatten_dict(self.variables["params"], sep="/")
        return {p: tuple(v.names) for p, v in flat.items() if isinstance(v, meta.Partitioned)}

    def call(self, static, values, *args, key=None, **kwargs):
        variables = {**self.variables, "params": unflatten_dict(dict(values), sep="/")}
        rngs = None if key is None else {"dropout": key}
        return static.apply(variables, *args, rngs=rngs, **kwargs)


@dataclasses.dataclass
class NNX(Host):
    """An NNX ``module``, run in the mode of ``module.train()`` where there is a ``key``."""

    module: nnx.Module
    # What a library wants done before a call in training, beside that: (module, key) -> None.
    before_training: Any = None

    def __post_init__(self):
        self.static, self._params, self._rest = nnx.split(self.module, nnx.Param, ...)

    @property
    def values(self):
        return {_join(p): v.get_raw_value() for p, v in nnx.to_flat_state(self._params)}

    @property
    def names(self):
        found = {}
        for path, variable in nnx.to_flat_state(self._params):
            metadata = variable.get_metadata()
            # Flax renamed it in 0.12.
            names = metadata.get("out_sharding", metadata.get("sharding_names"))
            if names is not None:
                found[_join(path)] = tuple(names)
        return found

    def call(self, static, values, *args, key=None, method=None, **kwargs):
        module = self.with_values(values, static)
        if key is None:
            module.eval()
        else:
            module.train()
            nnx.reseed(module, dropout=key)
            if self.before_training is not None:
                self.before_training(module, key)
        return getattr(module, method or "__call__")(*args, **kwargs)

    def with_values(self, values, static=None) -> nnx.Module:
        """A module with these parameters, which shares no Variable with this one."""
        flat = nnx.to_flat_state(self._params)
        params = nnx.from_flat_state([(p, v.replace(values[_join(p)])) for p, v in flat])
        rest = jax.tree.map(lambda leaf: leaf, self._rest)  # nnx.merge keeps the Variables it gets
        return nnx.merge(static or self.static, params, rest)

    def select(self, chosen) -> set[str]:
        """Paths of the leaves that an NNX filter selects."""
        state = nnx.split(self.module, chosen, ...)[1]
        return {_join(path) for path, _ in nnx.to_flat_state(state)}


def _join(path) -> str:
    return "/".join(map(str, path))
