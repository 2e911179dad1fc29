"""CIFAR-100 with the bundled ViT-Tiny (64 px): minutes on one GPU, no hub."""

from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
    c.model.source = "vit-tiny-patch8-64-tinyimagenet"
    c.model.unroll = 12
    c.data.name = "cifar100"
    c.eval_batch_size = 1000
    return c
