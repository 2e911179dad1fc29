"""Hugging Face files in and out, without PyTorch."""

from rmlora_jax.hub.chat_template import (
    Template,
    describe,
    encode,
    encode_prompt,
    end_tokens,
    find_template,
    fingerprint,
)
from rmlora_jax.hub.export import save_model
from rmlora_jax.hub.info import Info, read_info, write_info
from rmlora_jax.hub.new_tokens import tokenizer_of, with_tokens
from rmlora_jax.hub.on_disk import OnDisk, on_device
from rmlora_jax.hub.peft_read import adapter_base, load_peft, stored_labels
from rmlora_jax.hub.peft_write import save_peft
from rmlora_jax.hub.pretrained import (
    Pretrained,
    class_order,
    find_architecture,
    load_decoder,
    load_pretrained,
    load_text,
    load_vit,
    new_head,
    with_head_order,
)
from rmlora_jax.hub.source import bundled, find_folder
from rmlora_jax.hub.tied import untied
from rmlora_jax.hub.tokenizer import load_tokenizer
from rmlora_jax.hub.vllm import vllm_obstacles

# Older names.
PretrainedText = Pretrained
new_vit_head = new_text_head = new_head


def __getattr__(name):
    # A trained model in use is in a room above this one; it is imported when somebody asks for it.
    if name in ("Classifier", "Prediction"):
        from rmlora_jax.inference import classifier

        return getattr(classifier, name)
    if name in ("Answer", "Generator"):
        from rmlora_jax.inference import generator

        return getattr(generator, name)
    if name == "load":
        from rmlora_jax.inference import loading

        return loading.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Answer",
    "Classifier",
    "Generator",
    "Info",
    "OnDisk",
    "Prediction",
    "Pretrained",
    "PretrainedText",
    "Template",
    "adapter_base",
    "bundled",
    "class_order",
    "describe",
    "encode",
    "encode_prompt",
    "end_tokens",
    "find_architecture",
    "find_folder",
    "find_template",
    "fingerprint",
    "load",
    "load_decoder",
    "load_peft",
    "load_pretrained",
    "load_text",
    "load_tokenizer",
    "load_vit",
    "new_head",
    "new_text_head",
    "new_vit_head",
    "on_device",
    "read_info",
    "save_model",
    "save_peft",
    "stored_labels",
    "tokenizer_of",
    "untied",
    "vllm_obstacles",
    "with_head_order",
    "with_tokens",
    "write_info",
]
