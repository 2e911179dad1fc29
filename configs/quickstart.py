"""Handwritten digits with the bundled ViT-Tiny: no network, a minute on two CPU cores."""

from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
    c.steps = 300
    c.batch_size = 32
    c.eval_every = 100
    c.log_every = 10
    c.model.source = "vit-tiny-patch8-64-tinyimagenet"
    c.model.image_size = 32
    c.model.dtype = "float32"
    c.data.name = "digits"
    c.data.flip = False  # a mirrored digit is another digit, or none
    c.data.crop = "none"  # of 8 pixels none can be spared
    c.optimizer.learning_rate = 2e-3
    return c
