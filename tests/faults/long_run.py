"""Twenty thousand steps on a CPU: is what a process holds the same at the end as at the start?

    python tests/faults/long_run.py --steps=20000

Trains a tiny ViT in this process with evaluations and checkpoints, and notes at each line of
metrics.jsonl its resident memory, its open files and its threads, and how long the lines took to
write. Memory is compared between the first fifth of the samples behind the warm-up, a quarter of
the run, and the last fifth.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def resident() -> int:
    """Bytes of memory of this process, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(steps: int, folder: Path, model: Path) -> dict[str, float]:
    from faults.small import config_of, on_one_device

    from rmlora_jax.train import loop, metrics, nonfinite

    config = config_of(model)
    config.steps, config.eval_every, config.log_every = steps, steps // 20, 20
    samples, logging = [], [0.0]

    def timed(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                logging[0] += time.perf_counter() - began

        setattr(owner, name, wrapped)

    row_of = loop.row_of
    training = [0.0]

    def sample(done, *rest):
        training[0] += done.seconds
        files = len(os.listdir("/proc/self/fd"))
        samples.append((done.step, resident(), files, threading.active_count()))
        return row_of(done, *rest)

    loop.row_of = sample
    timed(loop, "row_of")
    timed(metrics.MetricWriter, "write")
    timed(nonfinite.Watched, "add")
    on_one_device(_Patch)
    loop.train(config, folder / "run")
    step, memory, files, threads = np.array(samples).T
    warm = np.flatnonzero(step > steps / 4)
    fifth = max(1, len(warm) // 5)
    early, late = memory[warm[:fifth]].mean(), memory[warm[-fifth:]].mean()
    return {
        "steps": steps,
        "memory_early_MiB": round(early / 2**20, 1),
        "memory_late_MiB": round(late / 2**20, 1),
        "memory_growth": round(late / early - 1, 4),
        "files": sorted({int(files[warm[0]]), int(files[-1])}),
        "threads": sorted({int(threads[warm[0]]), int(threads[-1])}),
        "step_ms": round(1e3 * training[0] / steps, 3),
        "logging_share": round(logging[0] / training[0], 4),
    }


class _Patch:
    setattr = staticmethod(setattr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    given = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from faults.soak import write_model

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.steps, Path(folder), write_model(Path(folder, "model")))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
