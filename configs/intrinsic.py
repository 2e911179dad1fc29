"""How many directions updates use: by ``:methods``, ``:penalty``, ``:classes``, ``:domain``.

The rank of one update Delta W = s A B is at most r. What its increments span over training may be
larger; both are measured from the factors alone.
"""

from rmlora_jax.study.config import default_study

VIT = "configs/vit_tiny_cifar100.py"


def get_config(part="methods"):
    c = default_study()
    c.study = f"intrinsic_{part}"
    c.tasks = (VIT,)
    c.methods = ("lora", "rm_lora")
    c.rates = (1e-3,)  # one rate for all: what differs is not the rate
    c.seeds = 3
    # One length, and ten times at which layers and what was explored are measured.
    c.fields = ("steps=2000", "eval_every=200", "snapshots=True")
    c.pictures = ("dimension", "layers")
    if part == "methods":
        c.tasks = (VIT, "configs/minilm_glue.py:cola")
        c.methods = ("lora", "adalora", "sora", "reg_only", "mask_only", "rm_lora")
    elif part == "penalty":
        c.methods = ("reg_only", "rm_lora")
        c.grid.penalty = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
        c.along = "penalty"
    elif part == "classes":
        # Harder tasks of one size: 4,000 images whatever the number of classes.
        c.variants = tuple(
            (f"data.classes={n}", f"data.per_class={4000 // n}") for n in (10, 20, 50, 100)
        )
        c.along = "data.classes"
    elif part == "domain":
        # Ten classes and about 1,290 images at one size: photographs, as in pretraining; digits.
        same = "model.image_size=64 model.dtype=bfloat16 batch_size=64 data.flip=False"
        c.tasks = (
            f"{VIT} {same} data.classes=10 data.per_class=129 as photographs",
            f"configs/quickstart.py {same} data.crop=pad as digits",
        )
        c.along = "task"
    else:
        raise ValueError(f"no part {part!r} of this study: methods, penalty, classes, domain")
    return c
