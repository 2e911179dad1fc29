"""The paper's vision setting: ViT-B/16 (ImageNet-21k) on CIFAR-100, all encoder linears adapted."""

from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
    c.model.source = "google/vit-base-patch16-224-in21k"
    c.model.base_dtype = "bfloat16"
    c.model.unroll = 12
    c.data.name = "cifar100"
    c.batch_size = 128
    c.eval_batch_size = 512
    return c
