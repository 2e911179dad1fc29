"""Twenty thousand steps on a CPU: is what a process holds the same at the end as at the start?

    python tests/faults/long_run.py --steps=20000

Trains a tiny ViT in this process with evaluations and checkpoints, and notes at each line of
metrics.jsonl its own memory, its open files and its threads, and what CPU time the lines took.
Compared are the medians over the first fifth of the samples behind the warm-up, a quarter of the
run, and over the last fifth. Its own memory is what it allocated, in RAM or swapped out: resident
memory as a whole goes down and up as a busy kernel drops pages of libraries and reads them again.
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


def allocated() -> int:
    """Bytes of this process's own memory, in RAM or swapped out, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmSwap"))]
    return 1024 * sum(kibibytes)


def measure(steps: int, folder: Path, model: Path) -> dict[str, float]:
    from faults.small import config_of, on_one_device

    from rmlora_jax.train import loop, metrics, nonfinite

    config = config_of(model)
    config.steps, config.eval_every, config.log_every = steps, steps // 20, 20
    samples, logging = [], [0.0]

    def timed(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                logging[0] += time.thread_time() - began

        setattr(owner, name, wrapped)

    timed(loop, "row_of")
    timed(metrics.MetricWriter, "write")
    timed(nonfinite.Watched, "add")
    row_of = loop.row_of
    training = [0.0]

    def sample(done, *rest):
        training[0] += done.seconds
        files = len(os.listdir("/proc/self/fd"))
        samples.append((done.step, allocated(), files, threading.active_count()))
        return row_of(done, *rest)

    loop.row_of = sample
    on_one_device(_Patch)
    began = time.process_time()
    loop.train(config, folder / "run")
    spent = time.process_time() - began
    step, *columns = np.array(samples).T
    print([round(float(np.median(part)) / 2**20) for part in np.array_split(columns[0], 10)])
    warm = np.flatnonzero(step > steps / 4)
    fifth = max(1, len(warm) // 5)
    (memory, files, threads), (memory_late, files_late, threads_late) = (
        [float(np.median(column[part])) for column in columns]
        for part in (warm[:fifth], warm[-fifth:])
    )
    return {
        "steps": steps,
        "memory_MiB": [round(memory / 2**20, 1), round(memory_late / 2**20, 1)],
        "memory_growth": round(memory_late / memory - 1, 4),
        "files": [files, files_late],
        "threads": [threads, threads_late],
        "step_ms": round(1e3 * training[0] / steps, 3),
        "logging_ms_a_step": round(1e3 * logging[0] / steps, 4),
        "logging_share": round(logging[0] / spent, 4),
    }


class _Patch:
    setattr = staticmethod(setattr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    given = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from faults.soak import write_model

    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"))
        os.environ["XLA_FLAGS"] = ""  # the tests' own make compilation quick and steps slow
        found = measure(given.steps, Path(folder), model)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
