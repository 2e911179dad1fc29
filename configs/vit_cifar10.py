"""The paper's vision setting on CIFAR-10."""

from rmlora_jax.configs import vit_cifar100


def get_config():
    c = vit_cifar100.get_config()
    c.data.name = "cifar10"
    return c
