"""What the penalty and the mask each do: ``:grid`` of their strengths, ``:frequency`` of the mask.

    python run.py --config=configs/ablation.py:grid
"""

from rmlora_jax.study.config import default_study

NEVER = 10**9  # steps: no run is as long


def get_config(part="grid"):
    c = default_study()
    c.study = f"ablation_{part}"
    c.tasks = ("configs/vit_tiny_cifar100.py", "configs/minilm_glue.py:cola")
    c.methods = ("rm_lora",)
    c.rates = (3e-4, 1e-3, 3e-3, 1e-2)  # chosen once a task, at the task's penalty and keep
    c.seeds = 3
    if part == "grid":
        c.grid.penalty = (0.0, 0.01, 0.1, 0.3, 1.0)
        c.grid.keep = (0.125, 0.25, 0.5, 0.75, 1.0)  # penalty 0 and keep 1: plain LoRA
        c.along = "keep"
        c.pictures = ("heat",)
        return c
    if part == "frequency":
        c.fields = ("steps=2400", "eval_every=100")  # one length; evaluated often, to see how soon
        c.variants = (
            (),  # a draw every step from step 1 on
            ("rm.resample_every=10",),
            ("rm.resample_every=100",),
            (f"rm.resample_every={NEVER}",),  # one draw for the whole run
            ("rm.start_step=100",),
            ("rm.start_step=600",),
            ("rm.start_step=1200",),
            (f"rm.start_step={NEVER}",),  # no mask
        )
        c.along = "rm.resample_every"
        c.pictures = ("frequency",)
        return c
    raise ValueError(f"no part {part!r} of this study: grid, frequency")
