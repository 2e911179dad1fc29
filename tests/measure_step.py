"""What a step costs: time, examples a second and memory, for each shape of a run's batches.

    python tests/measure_step.py --config=configs/deberta_glue.py:cola --config.model.source=...

Takes the run's own train step and its own batches, already on the device.
"""

import json
import sys
import time
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve

CONFIG = config_flags.DEFINE_config_file("config")
STEPS = flags.DEFINE_integer("measured_steps", 30, "steps of a shape")
SHAPES = flags.DEFINE_integer("shapes", 3, "shapes of batches, in the order in which they occur")


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    devices = all_devices(config.parallel)
    job = setup.build(resolve(config), devices)
    state, seen = job.state, set()
    for batch, _ in zip(job.feed.train(0), range(500), strict=False):
        shapes = str({name: x.shape for name, x in batch.items()})
        if shapes in seen or len(seen) == SHAPES.value:
            continue
        seen.add(shapes)
        batch = shard(batch, devices)
        began = time.perf_counter()
        step = job.train_step.lower(state, job.constants, batch).compile()
        compiled = time.perf_counter() - began
        for _ in range(5):
            state, metrics = step(state, job.constants, batch)
        jax.block_until_ready(metrics)
        began = time.perf_counter()
        for _ in range(STEPS.value):
            state, metrics = step(state, job.constants, batch)
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - began) / STEPS.value
        row = {
            "shapes": shapes,
            "step_ms": 1000 * seconds,
            "examples_per_second": config.batch_size / seconds,
            "memory_gib": memory.needed(step) / 2**30,
            "compile_seconds": compiled,
            "device": jax.devices()[0].device_kind,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
