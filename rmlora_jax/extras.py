"""The extras of this package: what to install for a command whose libraries are missing."""

from rmlora_jax import called

# Modules that the extra `train` brings; the core needs jax, flax and optax alone.
TRAIN = (
    *("absl", "grain", "huggingface_hub", "importlib_resources", "jinja2", "matplotlib"),
    *("ml_collections", "orbax", "PIL", "safetensors", "scipy", "sentencepiece", "sklearn"),
    *("tensorboardX", "tensorflow_datasets", "tqdm", "transformers"),
)


def install(extra: str) -> str:
    """What to type for an extra, also where the package itself is installed already.

    >>> install("gguf")
    "pip install 'rmlora-jax[gguf]'"
    """
    return f"pip install 'rmlora-jax[{extra}]'"


def lacking(error: ModuleNotFoundError) -> str | None:
    """Two lines for a module of the extra `train` that is missing; None for another module.

    >>> import unittest.mock
    >>> with unittest.mock.patch("sys.argv", ["/usr/bin/rmlora"]):
    ...     print(lacking(ModuleNotFoundError("No module named 'orbax'", name="orbax")))
    this needs the extra train of rmlora-jax: there is no module orbax; type
    pip install 'rmlora-jax[train]'
    """
    module = (error.name or "").partition(".")[0]
    if module not in TRAIN:
        return None
    # Of a checkout the package itself may be missing, too.
    line = "pip install -e '.[train]'" if called.is_script() else install("train")
    return f"this needs the extra train of rmlora-jax: there is no module {module}; type\n{line}"
