"""Writes the API reference, made from docstrings: ``python .ci/api_reference.py FOLDER``.

The extra ``docs`` brings pdoc, which it needs. A warning of pdoc ends it with an error.
"""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

PACKAGES = ("rmlora_jax", "rmlora_jax.hub", "rmlora_jax.models", "rmlora_jax.data")


def main(folder: str) -> None:
    for name in PACKAGES:
        package = importlib.import_module(name)
        for public in package.__all__:  # pdoc does not see names that are imported on demand
            setattr(package, public, getattr(package, public))
    pdoc.render.configure(docformat="google", math=True, show_source=False)
    warnings.simplefilter("error", UserWarning)
    # `rmlora_jax.adapt` is a function; the module of that name is not public.
    pdoc.pdoc(*PACKAGES, r"!rmlora_jax\.adapt$", output_directory=Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
