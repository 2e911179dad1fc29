"""Hugging Face files in and out, without PyTorch."""

from rmlora_jax.hub.export import save_model
from rmlora_jax.hub.info import Info, read_info, write_info
from rmlora_jax.hub.peft_read import load_peft, stored_labels
from rmlora_jax.hub.peft_write import save_peft
from rmlora_jax.hub.pretrained import load_pretrained
from rmlora_jax.hub.source import bundled, find_folder
from rmlora_jax.hub.text import PretrainedText, load_text, new_text_head
from rmlora_jax.hub.tokenizer import load_tokenizer
from rmlora_jax.hub.vit import Pretrained, load_vit, new_vit_head


def __getattr__(name):  # a trained model in use stands above this room, and is found when asked for
    if name in ("Classifier", "Prediction", "load"):
        from rmlora_jax.inference import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Classifier",
    "Info",
    "Prediction",
    "Pretrained",
    "PretrainedText",
    "bundled",
    "find_folder",
    "load",
    "load_peft",
    "load_pretrained",
    "load_text",
    "load_tokenizer",
    "load_vit",
    "new_text_head",
    "new_vit_head",
    "read_info",
    "save_model",
    "save_peft",
    "stored_labels",
    "write_info",
]
