"""K runs in one program against the same K one after another: seconds of training steps.

    python tests/measure_sweep.py --config=configs/vit_tiny_cifar100.py --runs=8 --steps=200

Both take the trainer's own steps and batches; the data are resident, both are compiled ahead, and
each repeat ends when its last step has. Prints one line of JSON with the medians.

``--random`` is for a machine without the data set: images of its shapes drawn at random, which cost
a step the same.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from rmlora_jax.data import ArraySource, Dataset
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep import many
from rmlora_jax.sweep.grid import check_config, runs
from rmlora_jax.tasks import images
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG = config_flags.DEFINE_config_file("config", str(CONFIGS / "vit_tiny_cifar100.py"))
RUNS = flags.DEFINE_integer("runs", 8, "runs, of as many seeds")
STEPS = flags.DEFINE_integer("steps", 100, "steps of each run in a repeat")
REPEATS = flags.DEFINE_integer("repeats", 5, "repeats, of which the median counts")
RANDOM = flags.DEFINE_bool("random", False, "images drawn at random in place of the data set")


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    config.sweep.seeds = RUNS.value
    config.steps = max(config.steps, STEPS.value)
    check_config(config)
    if RANDOM.value:
        images.data.open_images = random_images  # whatever the config names
    devices = all_devices(config.parallel)
    every, base = runs(resolve(config)), setup.open_base(resolve(config), devices)
    feed = base.feed.train(0)
    batches = [shard(next(feed), devices) for _ in range(STEPS.value)]

    together = many.build(every, base)
    program, compile_together = compiled(together, together.state, batches[0])
    alone = setup.build(every[0].config, devices)
    single, compile_alone = compiled(alone, alone.state, batches[0])
    constants = [
        alone.constants._replace(seed=many.pick(together.constants.values["seed"], i))
        for i in range(len(every))
    ]
    states = {"together": many.first_state(every, base)}
    states |= {i: many.pick(states["together"]._replace(step=np.zeros(len(every), np.int32)), i)
               for i in range(len(every))}

    def one_program():
        states["together"] = follow(program, states["together"], together.constants, batches)

    def one_after_another():
        for i in range(len(every)):
            states[i] = follow(single, states[i], constants[i], batches)

    for warm_up in (one_program, one_after_another):
        warm_up()
    seconds = {one_program: [], one_after_another: []}
    for _ in range(REPEATS.value):  # in turns, so that what else the machine does meets both
        for way, found in seconds.items():
            began = time.perf_counter()
            way()
            found.append(time.perf_counter() - began)
    many_seconds, single_seconds = (statistics.median(found) for found in seconds.values())
    trained = STEPS.value * config.batch_size * len(every)
    print(json.dumps({
        "device": jax.devices()[0].device_kind,
        "devices": devices.count,
        "method": config.method,
        "model": config.model.source,
        "dataset": "random images" if RANDOM.value else config.data.name,
        "dtype": config.model.dtype,
        "runs": len(every),
        "batch_size": config.batch_size,
        "steps": STEPS.value,
        "repeats": REPEATS.value,
        "one_program_seconds": many_seconds,
        "one_after_another_seconds": single_seconds,
        "ratio": many_seconds / single_seconds,
        "one_program_range": [min(seconds[one_program]), max(seconds[one_program])],
        "one_after_another_range": [
            min(seconds[one_after_another]), max(seconds[one_after_another])],
        "step_ms_one_program": 1000 * many_seconds / STEPS.value,
        "step_ms_single": 1000 * single_seconds / STEPS.value / len(every),
        "examples_per_second_one_program": trained / many_seconds,
        "examples_per_second_one_after_another": trained / single_seconds,
        "compile_seconds_one_program": compile_together,
        "compile_seconds_single": compile_alone,
        "memory_bytes_one_program": memory.needed(program),
        "memory_bytes_single": memory.needed(single),
    }), flush=True)


def compiled(job, state, batch):
    began = time.perf_counter()
    program = job.train_step.lower(state, job.constants, batch).compile()
    return program, time.perf_counter() - began


def follow(program, state, constants, batches):
    for batch in batches:
        state, metrics = program(state, constants, batch)
    jax.block_until_ready((state, metrics))
    return state


def random_images(request) -> Dataset:
    rng = np.random.default_rng(0)

    def split(count):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        return ArraySource(pixels, rng.integers(0, 100, count).astype(np.int32))

    return Dataset(
        name="random images",
        train=split(4_500),
        validation=split(500),
        test=split(1_000),
        num_classes=100,
        class_names=tuple(map(str, range(100))),
        image_shape=(32, 32, 3),
    )


if __name__ == "__main__":
    app.run(main)
