"""Kills a run at random moments, again and again, and holds its end against an undisturbed run's.

    python tests/faults/soak.py --kills=50

Each life of a run is a process of its own, killed by SIGKILL in its compilation, in a training
step, an evaluation, a checkpoint or the export of its end, and followed by the same command. After
ten kills or so the run is left to its end, where adapters, checkpoints, metrics.jsonl,
intrinsic.jsonl and TensorBoard's scalars must be those of a run that was never killed, to the bit.
Prints the figures as JSON; exits with 1 at any mismatch.
"""

import argparse
import collections
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
MIDDLE = ("compile", "step", "evaluation", "checkpoint")
STEPS, EVERY = 24, 3
A_RUN = 10  # kills of a run before it is left to its end, the last two of them in the export
LONGEST = {"compile": 1.0, "step": 0.003}  # seconds from the beginning of a phase to the kill
TIME = ("examples_per_second",)  # of a metrics row: what no two runs share


def command(model: Path, workdir: Path, phases: Path) -> list[str]:
    fields = {
        "model.source": model, "model.image_size": 16, "model.dtype": "float32",
        "steps": STEPS, "eval_every": EVERY, "log_every": 1, "batch_size": 16,
        "data.limit": 200, "compilation_cache": "", "snapshots": True,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, HERE / "phases.py", phases, f"--workdir={workdir}", *overrides]


def environment(cache: Path, platform: str = "cpu") -> dict[str, str]:
    from fake_devices import with_devices

    own = with_devices(1)
    if platform != "cpu":
        own["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true"
    return own | {
        "JAX_PLATFORMS": platform,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Soak:
    """The lives of runs of one config in ``folder``; ``figures`` counts them."""

    def __init__(self, model: Path, folder: Path, cache: Path, seed: int, platform: str = "cpu"):
        self.model, self.folder, self.random = model, folder, random.Random(seed)
        self.environment = environment(cache, platform)
        self.figures = collections.Counter()
        self.whole = folder / "whole"
        assert self.life(self.whole) is None

    def life(self, workdir: Path, aim: str | None = None) -> str | None:
        """One process; ``aim``: the phase to kill it in. Returns where it died, None at its end."""
        phases = self.folder / "phases"
        phases.unlink(missing_ok=True)
        process = subprocess.Popen(
            command(self.model, workdir, phases), env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        nth = self.random.randint(1, {"compile": 1, "step": 4}.get(aim, 2))
        while process.poll() is None:
            if aim and phases.exists() and phases.read_text().splitlines().count(aim) >= nth:
                time.sleep(self.random.uniform(0, LONGEST.get(aim, 0.04)))
                process.kill()
                break
            time.sleep(0.001)
        _, errors = process.communicate()
        if process.returncode == 0:
            return None
        assert process.returncode == -9, errors
        return phases.read_text().splitlines()[-1]

    def run(self, name: str, aims: list[str]) -> list[str]:
        """A run with a kill for each aim, and then its end; returns what is not as in ``whole``."""
        workdir = self.folder / name
        for aim in aims:
            died = self.life(workdir, aim)
            if died is None:
                break  # it was done before
            self.figures["kills"] += 1
            self.figures[f"in {died}" if died != "-" else "in between"] += 1
            left = (workdir / "checkpoints").glob("*tmp*")
            self.figures["with a checkpoint half written"] += any(left)
        assert self.life(workdir) is None
        self.figures["runs"] += 1
        self.figures["resumes"] = self.figures["kills"]
        wrong = mismatches(self.whole, workdir)
        self.figures["mismatches"] += len(wrong)
        return wrong

    def aims(self, kills: int) -> list[str]:
        """The phases to kill a run in: the four of its middle in turn, the export at the end."""
        middle = [MIDDLE[i % 4] for i in range(max(0, kills - 2))]
        self.random.shuffle(middle)
        return middle + ["export"] * min(kills, 2)


def mismatches(one: Path, other: Path) -> list[str]:
    """What of two runs differs, in words; TensorBoard apart."""
    found = []
    for path in sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file()):
        exact = path.parts[0] in ("adapter", "snapshots") or path.name == "intrinsic.jsonl"
        if exact and contents(one / path) != contents(other / path):
            found.append(f"{other / path} differs")
    if arrays(one) != arrays(other):
        found.append(f"{other}: checkpoints differ")
    ours, theirs = rows(one), rows(other)
    if [row["step"] for row in theirs] != list(range(1, STEPS + 1)):
        found.append(f"{other}: steps {[row['step'] for row in theirs]}")
    if ours != theirs:
        found.append(f"{other}: metrics differ")
    return found


def contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def rows(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIME} for line in lines]


def arrays(workdir: Path) -> dict[str, bytes]:
    """Every array of every checkpoint, read back."""
    import orbax.checkpoint as ocp
    from jax.tree_util import keystr, tree_leaves_with_path

    found = {}
    for step in (workdir / "checkpoints").iterdir():
        tree = ocp.StandardCheckpointer().restore(step / "default")
        for path, leaf in tree_leaves_with_path(tree):
            found[f"{step.name}{keystr(path)}"] = leaf.tobytes()
    return found


def shown(workdir: Path, python: str) -> dict[str, list]:
    """The scalars that TensorBoard shows, those of time apart; ``python`` has TensorBoard."""
    done = subprocess.run(
        [python, HERE / "scalars.py", workdir / "tensorboard"],
        capture_output=True, text=True, check=True,
    )
    return {k: v for k, v in json.loads(done.stdout).items() if k not in TIME}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensorboard", default=sys.executable, metavar="PYTHON",
                        help="an interpreter that has tensorboard; empty: do not look")
    parser.add_argument("--platform", default="cpu", help="cuda: with deterministic operations")
    given = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    model = write_model(folder / "model")
    soak = Soak(model, folder, folder / "cache", given.seed, given.platform)
    expected, wrong = None, []
    if given.tensorboard:
        expected = shown(soak.whole, given.tensorboard)
        assert len(expected["train/loss"]) == STEPS
    while soak.figures["kills"] < given.kills:
        name = f"run{soak.figures['runs']}"
        aims = soak.aims(min(A_RUN, given.kills - soak.figures["kills"]))
        wrong += soak.run(name, aims)
        if expected and shown(folder / name, given.tensorboard) != expected:
            wrong.append(f"{folder / name}: TensorBoard shows other scalars")
            soak.figures["mismatches"] += 1
        print(json.dumps(soak.figures), flush=True)
    print("\n".join(wrong), f"{time.monotonic() - began:.0f} s", sep="\n")
    if not wrong:
        shutil.rmtree(folder)
    return bool(wrong)


def write_model(folder: Path) -> Path:
    from conftest import TINY_RUN  # sets the environment of the tests, which is for this process
    from fixtures.vit import cases
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cases.config_of(TINY_RUN)))
    save_file(cases.weights_of(TINY_RUN), folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    sys.exit(main())
