"""Reading and checking of Hugging Face's ``config.json``, the same for every model family."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh")

# Fields that say nothing about the numbers of a classifier: book-keeping, labels (read by the
# loader), and what belongs to generation.
BOOKKEEPING = (
    *("architectures", "model_type", "problem_type", "finetuning_task", "transformers_version"),
    *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "tie_word_embeddings", "use_cache"),
    *("return_dict", "output_attentions", "output_hidden_states", "gradient_checkpointing"),
    *("id2label", "label2id", "num_labels", "chunk_size_feed_forward"),
)

LARGEST = 2**24  # of any size; a damaged or hostile one would only be found out of memory
MOST_LAYERS = 1000

# Fields of ours: what is put into the layers, see inserts.py. By default nothing.
INSERTS = {"bottleneck_width": 0, "prefix_length": 0}


def check_fields(config: Any, minimum: Mapping[str, int] = {}) -> None:
    """Checks the values of a dataclass of sizes and constants, by the types of its fields.

    int: a whole number of at least ``minimum[name]``, by default 1, and at most 2**24, of layers
    1000; bool; float: finite and at
    least 0, below 1 where the name ends in ``_prob`` or ``dropout``; names that end in ``act``: an
    activation; ``num_attention_heads`` divides ``hidden_size``.

    Raises:
      ValueError: naming the field, its value and what is allowed.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        least = (INSERTS | dict(minimum)).get(name, 1)
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        if field.type is int and (type(value) is not int or not least <= value <= most):
            above = f" and at most {most}" if type(value) is int and value > most else ""
            refuse(name, value, f"a whole number of at least {least}{above}")
        if field.type is bool and not isinstance(value, bool):
            refuse(name, value, "true or false")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if field.type is float and not (number and 0 <= value <= LARGEST):
            refuse(name, value, "a number of at least 0")
        if field.type is float and name.endswith(("_prob", "dropout")) and value >= 1:
            refuse(name, value, "a probability below 1")
        if name.endswith("act") and value not in ACTIVATIONS:
            refuse(name, value, f"one of {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        refuse(
            "num_attention_heads",
            config.num_attention_heads,
            f"a divisor of hidden_size = {config.hidden_size}",
        )


def known_fields(
    cls: type,
    config: Mapping[str, Any],
    *,
    model_types: Collection[str],
    ignored: Collection[str] = (),
    model: str,
) -> dict[str, Any]:
    """The entries of a ``config.json`` that are fields of the dataclass ``cls``.

    A field that could change the model's numbers and is not known is refused by name rather than
    ignored; one whose value is null, false, 0 or empty asks for nothing.

    Args:
      model_types: allowed values of ``model_type``, the first of them the default.
      ignored: fields without influence on what is computed, beside ``BOOKKEEPING``.
      model: name for the message.

    Raises:
      ValueError: an unsupported ``model_type`` or field.
    """
    allowed = tuple(model_types)
    kind = config.get("model_type", allowed[0])
    if kind not in allowed:
        refuse("model_type", kind, " or ".join(map(repr, allowed)))
    ours = {field.name for field in dataclasses.fields(cls)}
    fine = ours | set(BOOKKEEPING) | set(ignored)
    for name, value in config.items():
        if name not in fine and not name.startswith("_") and value:
            raise ValueError(
                f"config field {_short(name)} = {_short(value)} is not supported by this {model}; "
                "remove it if it does not change what the model computes"
            )
    return {name: config[name] for name in ours & config.keys()}


def refuse(name: str, value: Any, allowed: str):
    raise ValueError(f"config field {name!r} is {_short(value)}; it must be {allowed}")


def _short(value: Any) -> str:
    return repr(value)[:80]
