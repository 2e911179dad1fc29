"""Parameters on disk: the numbers of those that are read at once; what host and devices hold."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.decoders.cases import write_folder
from fixtures.sft.tiny import config_of, write_chats, write_model

from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub import placing
from rmlora_jax.models.family import flat_params
from rmlora_jax.parallel.mesh import all_devices, base_sharding, shard
from rmlora_jax.train import record, setup
from rmlora_jax.train.config import resolve


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_way_to_read_gives_the_same_bits(tmp_path, monkeypatch, dtype):
    folder = write_folder("qwen2_sliding", tmp_path)
    read = flat_params(hub.load_decoder(folder, dtype=dtype).params)
    left = flat_params(hub.load_pretrained(folder, dtype=dtype, on_disk=True).params)
    assert read.keys() == left.keys()
    for small in (0, 2**20):
        monkeypatch.setattr("rmlora_jax.hub.on_disk.SMALL", small)
        for path, x in left.items():
            own = read[path]
            assert (x.shape, x.dtype) == (own.shape, own.dtype)
            for found in (np.asarray(x), x.place(), jnp.asarray(x)):
                assert found.dtype == own.dtype
                np.testing.assert_array_equal(found, own)
            for stride in (1, 7, 50):
                np.testing.assert_array_equal(x.every(stride), own.ravel()[::stride])
            if x.stacked:
                np.testing.assert_array_equal(x[1], own[1])
    np.testing.assert_array_equal(np.asarray(left["embed/embedding"].T), read["embed/embedding"].T)


def test_casts_follow_each_other(tmp_path):
    folder = write_folder("qwen2_sliding", tmp_path)
    read = flat_params(hub.load_decoder(folder).params)
    for path, x in flat_params(hub.load_pretrained(folder, on_disk=True).params).items():
        own = read[path].astype(jnp.bfloat16).astype(np.float32)
        assert (own != read[path]).any() or path.endswith(("scale", "bias"))
        both = x.astype("bfloat16").astype("float32")
        for found in (np.asarray(both), both.place()):
            np.testing.assert_array_equal(found, own)


def test_a_file_that_is_written_to_while_it_is_in_use_is_refused(tmp_path):
    folder = write_folder("qwen2_sliding", tmp_path)
    file = folder / "model.safetensors"
    x = flat_params(hub.load_pretrained(folder, on_disk=True).params)["embed/embedding"]
    before = np.asarray(x)
    content = file.read_bytes()
    (tmp_path / "other").write_bytes(content)
    (tmp_path / "other").replace(file)  # another file under the name: ours is there as long as x
    np.testing.assert_array_equal(np.asarray(x), before)
    x = flat_params(hub.load_pretrained(folder, on_disk=True).params)["embed/embedding"]
    with open(file, "r+b") as opened:
        opened.seek(len(content) - 4)
        opened.write(bytes(4))
    os.utime(file, ns=(1, 1))  # clocks of some disks are coarse
    with pytest.raises(UserError, match=r"model.safetensors was changed while it was in use"):
        np.asarray(x)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_disk")
    write_model(folder / "model")
    write_chats(folder / "train.jsonl", 40, seed=0)
    return folder


def of_a_step(job, where):
    batch = shard(next(iter(job.feed.train(0))), where)
    _, metrics = job.train_step(job.state, job.constants, batch)
    return jax.device_get(metrics)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_whose_base_is_split_never_has_a_whole_weight_on_a_device(root, monkeypatch, method):
    monkeypatch.setattr("rmlora_jax.parallel.mesh.SMALL", 1000)
    monkeypatch.setattr("rmlora_jax.hub.on_disk.SMALL", 0)
    where = all_devices(fsdp=8)
    cut, most = placing._cut, []
    before = jax.live_arrays()

    def watched(tensor, inside):
        own = [x for x in jax.live_arrays() if not any(x is other for other in before)]
        most.append(max((part.data.size / x.size for x in own if x.size >= 1000
                         for part in x.addressable_shards), default=0))  # fmt: skip
        return cut(tensor, inside)

    config = resolve(config_of(root, 5, **{"fsdp": 8, "method": method}))
    with monkeypatch.context() as patch:
        patch.setattr(placing, "_cut", watched)
        job = setup.build(config, where)
    assert most
    if method == "lora":
        assert max(most) == 1 / 8  # factors are smaller
        for path, x in flat_params(job.constants.frozen).items():
            assert x.sharding == base_sharding(x.shape, where), path
    kept = record.record_of(job.base)

    whole = hub.load_pretrained

    def read_at_once(*args, on_disk, **options):
        return whole(*args, **options)

    monkeypatch.setattr("rmlora_jax.hub.load_pretrained", read_at_once)
    other = setup.build(config, where)
    assert record.record_of(other.base) == kept
    trees = ((one.state.trainable, one.constants.frozen) for one in (job, other))
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=str(path), strict=True),
        *trees,
    )
    found = of_a_step(job, where)
    for name, value in of_a_step(other, where).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


PROGRAM = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
from fixtures.sft.tiny import config_of
from rmlora_jax import hub
from rmlora_jax.parallel.mesh import all_devices
from rmlora_jax.train import record, setup
from rmlora_jax.train.config import resolve

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = Path(sys.argv[2]), Path(sys.argv[3])
fields = {"model.base_dtype": "bfloat16"}
setup.build(resolve(config_of(small, 2, **fields)), all_devices(limit=1))  # what any run needs
before = peak()
job = setup.build(resolve(config_of(large, 2, **fields)), all_devices(limit=1))
record.record_of(job.base)
held = sum(x.nbytes for x in jax.live_arrays())
largest = max(x.nbytes for x in jax.tree.leaves(job.constants.frozen))
print(peak() - before, held, largest)
"""


@pytest.mark.slow
def test_the_host_holds_one_layer_beside_the_base(root, tmp_path):
    """On a CPU the device's memory is the host's: what is more than the base is the host's own."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}
    write_model(tmp_path / "model", **sizes)  # 360 MB in float32
    write_chats(tmp_path / "train.jsonl", 40, seed=0)
    tests = str(Path(__file__).parents[1])
    ran = subprocess.run([sys.executable, "-c", PROGRAM, tests, str(root), str(tmp_path)],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    more, held, largest = map(int, ran.stdout.split()[-3:])
    assert held > 150e6 and largest == 12 * 512 * 4096 * 2
    assert more < held + 1.3 * largest, (more, held, largest)
