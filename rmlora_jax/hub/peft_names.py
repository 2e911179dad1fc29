"""What PyTorch calls the modules of an adapted model, in one of its spellings."""

import re

import numpy as np
from flax.traverse_util import flatten_dict

from rmlora_jax.hub.text import PretrainedText
from rmlora_jax.hub.vit import Pretrained

PREFIX = "base_model.model."  # that PEFT puts in front

Base = Pretrained | PretrainedText


class Names:
    """PyTorch's names of a model's modules in one spelling.

    Attributes:
      entries: path of each parameter that the model has -> its line in the family's table.
      modules: the modules that hold them, and all that those are in.
    """

    def __init__(self, base: Base, old_names: bool):
        self.base, self.which = base, 0 if old_names else -1
        shapes = {path: np.shape(x) for path, x in flatten_dict(base.params, sep="/").items()}
        self.entries = {e.path: e for e in base.family.table if e.path in shapes}
        self.layers = max((shapes[p][0] for p, e in self.entries.items() if e.stacked), default=1)
        self.modules = {
            module
            for path in self.entries
            for name in self.of_layers(self.module(path))
            for module in _upwards(name)
        }

    def module(self, path: str) -> str:
        """The module of a parameter; "vit.layers.{}.mlp.fc1" where it is of every layer."""
        return self.entries[path].names[self.which].rpartition(".")[0]

    def of_layers(self, module: str) -> list[str]:
        """The names that "{}" stands for."""
        if "{}" not in module:
            return [module]
        return [module.format(layer) for layer in range(self.layers)]

    def root(self, path: str) -> str:
        """The module to keep if this parameter is trained: of what is new for the task, the
        uppermost (RoBERTa's "classifier" has two linear layers), else its own."""
        module, prefix = self.module(path), self.base.family.prefix
        if any(re.fullmatch(pattern, path) for pattern in self.base.family.new):
            inside = module.removeprefix(prefix)
            return module[: len(module) - len(inside)] + inside.partition(".")[0]
        return module

    def below(self, root: str) -> list[str]:
        """Paths of the parameters of a module and of all modules in it."""
        return [path for path in self.entries if root in _upwards(self.module(path))]


def _upwards(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
