"""Ten images a class of CIFAR-100: who overfits, in curves of train and held-out images."""

from rmlora_jax.study.config import default_study


def get_config():
    c = default_study()
    c.study = "small_data"
    c.tasks = ("configs/vit_tiny_cifar100.py data.per_class=10 as cifar100_10_a_class",)
    c.methods = ("full", "head", "lora", "reg_only", "mask_only", "rm_lora")
    c.rates = (3e-4, 1e-3, 3e-3, 1e-2)  # as in paper_table.py, with its rates for full and head
    c.seeds = 5
    c.fields = ("steps=1000", "eval_every=50")  # 64 passes over 1,000 images
    c.pictures = ("table", "gap")
    return c
