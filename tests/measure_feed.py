"""How far the input pipeline is from free: steps a second with real input over those without any.

    python tests/measure_feed.py --config=configs/vit_cifar100.py --config.data.data_dir=...

For resident and for streamed data, times the run's own train step on one batch that stays on the
device, and on what the pipeline delivers, in turns, and prints the medians and their ratio.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve

CONFIG = config_flags.DEFINE_config_file("config")
STEPS = flags.DEFINE_integer("measured_steps", 30, "steps of a turn")
TURNS = flags.DEFINE_integer("turns", 5, "turns of each kind")


def rate(step, state, constants, batches, steps):
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, constants, next(batches))
    jax.block_until_ready(metrics)
    return state, steps / (time.perf_counter() - began)


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    devices = all_devices(config.parallel)
    for mode in ("resident", "stream"):
        config.data.mode = mode
        job = setup.build(resolve(config), devices)
        state = job.state
        fed = (shard(batch, devices) for batch in job.feed.train(0))
        fixed = next(fed)
        step = job.train_step.lower(state, job.constants, fixed).compile()
        still = iter(lambda fixed=fixed: fixed, None)
        rates = {"still": [], "fed": []}
        for batches in (still, fed):  # warm up
            state, _ = rate(step, state, job.constants, batches, 5)
        for _ in range(TURNS.value):
            for name, batches in (("still", still), ("fed", fed)):
                state, value = rate(step, state, job.constants, batches, STEPS.value)
                rates[name].append(value)
        middle = {name: statistics.median(values) for name, values in rates.items()}
        row = {"mode": mode, **middle, "ratio": middle["fed"] / middle["still"]}
        print(json.dumps(row | {"device": jax.devices()[0].device_kind}), flush=True)


if __name__ == "__main__":
    app.run(main)
