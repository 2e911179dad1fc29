"""Class names in Hugging Face's ``config.json``."""

from collections.abc import Mapping
from typing import Any


def label_names(config: Mapping[str, Any], number: int) -> tuple[str, ...] | None:
    """The names under ``id2label``, None where they are not those of ``number`` classes.

    >>> label_names({"id2label": {"0": "cat", "1": "dog"}}, 2)
    ('cat', 'dog')
    """
    names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    if sorted(names) != list(range(number)):
        return None
    return tuple(names[index] for index in range(number))
