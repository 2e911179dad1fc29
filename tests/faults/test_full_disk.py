"""A disk that is full or read-only: plain words, and the same command goes on afterwards.

The slow tests mount a real, small file system in a namespace of their own, which root may do and
elsewhere whoever may make user namespaces; where neither, they are skipped. Permissions alone
would show nothing to root.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_devices import with_devices
from faults.small import EVERY, STEPS, check_same_end, config_of, on_one_device, steps_of, train
from marks import slow

from rmlora_jax.errors import UserError
from rmlora_jax.train import checkpoint, metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        yield


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def no_checkpoint(manager, step, *_, write=checkpoint.write):
    if step > EVERY:
        full(manager.directory)
    write(manager, step, *_)


def half_a_line(path, line, append=metrics._append):
    if '"step": 7' not in line:
        return append(path, line)
    with open(path, "a") as file:
        file.write(line[:30])
    full(path)


@pytest.mark.parametrize(
    ("module", "name", "refusing"),
    [(checkpoint, "write", no_checkpoint), slow(metrics, "_append", half_a_line)],
)
def test_what_was_saved_stays(
    undisturbed_run, tiny_vit, tmp_path, monkeypatch, module, name, refusing
):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refusing)
        with pytest.raises(UserError) as raised:
            train(config_of(tiny_vit), tmp_path)
    said = str(raised.value)
    assert f"cannot write to {tmp_path}: No space left on device" in said
    assert f"the checkpoint of step {EVERY} is whole" in said and "free some space" in said
    train(config_of(tiny_vit), tmp_path)
    check_same_end(undisturbed_run, tmp_path)


def test_a_folder_that_nobody_can_make(tiny_vit):
    with pytest.raises(UserError, match=r"cannot write to the workdir /proc/1/run: .*--workdir"):
        train(config_of(tiny_vit), Path("/proc/1/run"))


MOUNT = """
set -u
mkdir "$1/disk" && mount -t tmpfs -o size=2m none "$1/disk" || exit 99
mkdir "$1/disk/run"
head -c $((2097152 - $2 * 1024)) /dev/zero > "$1/disk/filler"
shift 2
"$@" > "$OUT/full.txt" 2>&1; echo $? > "$OUT/full.code"
rm "$DISK/filler"
cp -r "$DISK/run" "$OUT/left"
mount -o remount,ro "$DISK" || exit 99
"$@" > "$OUT/read_only.txt" 2>&1; echo $? > "$OUT/read_only.code"
mount -o remount,rw "$DISK"
"$@" > "$OUT/again.txt" 2>&1; echo $? > "$OUT/again.code"
cp -r "$DISK/run" "$OUT/run"
"""


def can_mount():
    test = "d=$(mktemp -d) && mount -t tmpfs none $d && umount $d; rmdir $d"
    return shutil.which("unshare") and not subprocess.run(
        ["unshare", "-rm", "sh", "-c", test], capture_output=True, check=False
    ).returncode


def command(tiny_vit, workdir):
    return [
        sys.executable, str(ROOT / "run.py"), f"--workdir={workdir}",
        f"--config.model.source={tiny_vit}", "--config.model.image_size=16",
        f"--config.steps={STEPS}", f"--config.eval_every={EVERY}", "--config.log_every=1",
        "--config.batch_size=16", "--config.data.limit=200", "--config.compilation_cache=",
    ]


@pytest.fixture(scope="module")
def undisturbed(tiny_vit, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("disk") / "undisturbed"
    subprocess.run(command(tiny_vit, workdir), env=with_devices(1), check=True, timeout=300)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("free", [120, 280, 480])
def test_a_real_file_system(undisturbed, tiny_vit, tmp_path, free):
    """Full after so many KiB, whatever is being written then; then read-only; then as it was."""
    if not can_mount():
        pytest.skip("this user cannot mount a tmpfs of its own")
    script = ["unshare", "-rm", "bash", "-c", MOUNT, "bash", str(tmp_path), str(free)]
    done = subprocess.run(
        [*script, *command(tiny_vit, tmp_path / "disk" / "run")],
        env=with_devices(1) | {"OUT": str(tmp_path), "DISK": str(tmp_path / "disk")},
        capture_output=True, text=True, timeout=500, check=False,
    )
    assert done.returncode == 0, done.stderr
    said = {name: (tmp_path / f"{name}.txt").read_text() for name in ("full", "read_only", "again")}
    codes = {name: (tmp_path / f"{name}.code").read_text().strip() for name in said}
    assert codes == {"full": "1", "read_only": "1", "again": "0"}, said
    assert not any("Traceback" in words for words in said.values()), said
    assert "No space left on device" in said["full"]
    assert "Read-only file system" in said["read_only"]
    left = steps_of(tmp_path / "left") if (tmp_path / "left" / "checkpoints").is_dir() else []
    if left:
        assert f"the checkpoint of step {max(left)} is whole" in said["full"]
        assert f"continuing after step {max(left)}" in said["again"]
    check_same_end(undisturbed, tmp_path / "run")
