"""Llama 3.1 8B on chats of one's own: ``--config.sft.files="('chats.jsonl',)"``."""

from rmlora_jax.tasks.sft import use_sft
from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
    use_sft(c)
    c.model.source = "meta-llama/Llama-3.1-8B-Instruct"
    c.model.base_dtype = "bfloat16"
    c.model.remat = "full"  # "none" is faster where memory allows
    c.sft.length = 4096
    c.batch_size = c.eval_batch_size = 16  # 65,536 tokens a step
    c.epochs = 1.0
    c.lora.rank, c.lora.alpha = 16, 32.0
    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule, c.optimizer.warmup = "cosine", 0.03
    return c
