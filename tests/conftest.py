"""Eight fake CPU devices for every test, and a compilation cache that all workers share."""

import os
import tempfile
from pathlib import Path

from fake_devices import xla_flags

CACHE = Path(tempfile.gettempdir(), f"rmlora_jax_test_cache_{os.getuid()}")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import json  # noqa: E402  (jax reads the environment when it is first imported)

import pytest  # noqa: E402
import safetensors.numpy  # noqa: E402
from fixtures.vit import cases  # noqa: E402

TINY_RUN = {
    "config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
    },
    "classes": 5,
    "image_size": 16,
    "seed": 7,
}


# Folders whose files take long though they hold few tests. Workers get them first: a worker that
# began the longest file last would end long after the others.
LONG = ("sweep", "faults", "train", "tasks", "parallel")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in LONG)  # otherwise in the old order


@pytest.fixture
def config(tiny_vit):
    """Twenty steps of that ViT on digits, in float32."""
    return tiny_config(tiny_vit)


def tiny_config(tiny_vit):
    from rmlora_jax.train.config import default_config

    c = default_config()
    c.model.source = str(tiny_vit)
    c.model.dtype = "float32"
    c.model.image_size = 16
    c.data.name = "digits"
    c.data.crop = "pad"
    c.batch_size = 16
    c.eval_batch_size = 64
    c.steps = 20
    c.lora.rank = 4
    return c


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    """A folder with a random two-layer ViT of the Hugging Face layout, 16 px, 5 classes."""
    folder = tmp_path_factory.mktemp("tiny_vit")
    (folder / "config.json").write_text(json.dumps(cases.config_of(TINY_RUN)))
    safetensors.numpy.save_file(cases.weights_of(TINY_RUN), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def undisturbed_run(tiny_vit, tmp_path_factory):
    """The folder of the run that runs with faults are compared with. Do not write into it."""
    from faults import small

    workdir = tmp_path_factory.mktemp("faults") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        small.on_one_device(patch)
        small.train(small.config_of(tiny_vit), workdir)
    return workdir
