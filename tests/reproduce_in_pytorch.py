"""The accuracy of a finished run on images, once more in PyTorch with PEFT.

    python tests/reproduce_in_pytorch.py WORKDIR

Reads WORKDIR's config and data set, makes the pixels of its test images as its evaluation did, and
lets PEFT (in the environment of make_environment.py) open WORKDIR/adapter on the base. Prints the
accuracy that the run stored, the one that PyTorch gets, and how many classes differ.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from oracle import oracle

from rmlora_jax import hub
from rmlora_jax.data import load_resident, open_images
from rmlora_jax.hub.peft_config import read_config
from rmlora_jax.report.records import read_summary
from rmlora_jax.tasks import task
from rmlora_jax.train.config import read_config as config_of_run


def main(workdir: Path) -> None:
    config = config_of_run(workdir)
    summary = read_summary(workdir)
    model = hub.load(workdir)
    data = open_images(task.request(config))
    pixels, labels = load_resident(data.test, model.info.stored_size)
    ours = model.logits(pixels).argmax(-1)
    # The same numbers for PyTorch: what our own reader makes of the images.
    _, batches = model.read(pixels, 250, None)
    made = np.concatenate([np.asarray(x, np.float32)[: len(ids)] for ids, (x,) in batches])
    base = read_config(workdir / "adapter").base
    with tempfile.TemporaryDirectory() as work:
        given, out = Path(work, "in.npz"), Path(work, "out.npz")
        np.savez(given, pixel_values=made.transpose(0, 3, 1, 2))
        folder = hub.find_folder(base)
        oracle.run("adapters.py", "open", folder, workdir / "adapter", data.num_classes, given, out)
        theirs = np.load(out)["logits"].argmax(-1)
    print(f"images    {len(labels):,} of {data.name}, split {config.data.test_split}")
    print(f"stored    {summary['test_best']['accuracy']:.4f}")
    print(f"here      {(ours == labels).mean():.4f}")
    print(f"PyTorch   {(theirs == labels).mean():.4f}")
    print(f"classes that differ from ours: {(theirs != ours).sum()}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        oracle.python()
    except oracle.pytest.skip.Exception as missing:
        sys.exit(str(missing))
    main(Path(sys.argv[1]).absolute())
