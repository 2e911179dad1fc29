"""The paper's comparison: methods x tasks x seeds, a learning rate chosen for each.

    python run.py --config=configs/paper_table.py --config.dry_run    # the plan and what it costs
"""

from rmlora_jax.study.config import default_study


def get_config():
    c = default_study()
    c.study = "paper_table"
    c.tasks = (
        "configs/vit_tiny_cifar100.py",
        "configs/minilm_glue.py:cola",
        "configs/minilm_glue.py:rte",
    )
    c.methods = (
        "full", "head", "lora", "adalora", "sora", "reg_only", "mask_only", "rm_lora",
    )
    c.rates = (3e-4, 1e-3, 3e-3, 1e-2)  # all but full and head choose among these,
    c.full_rates = (2e-5, 5e-5, 1e-4, 2e-4)  # full among its own,
    c.head_rates = (1e-3, 3e-3, 1e-2, 3e-2)  # head among its own,
    c.choose_seeds = 2  # by the validation split at the last step, seeds 100 and 101;
    c.seeds = 5  # reported: test at the last step, seeds 0 to 4
    c.fields = ("snapshots=True",)
    c.pictures = ("table", "gap", "layers", "dimension")
    return c
