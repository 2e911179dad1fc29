"""Class names in Hugging Face's ``config.json``."""

from collections.abc import Mapping
from typing import Any


def label_names(config: Mapping[str, Any], number: int) -> tuple[str, ...] | None:
    """The names under ``id2label``, None where they are not those of ``number`` classes.

    >>> label_names({"id2label": {"0": "cat", "1": "dog"}}, 2)
    ('cat', 'dog')
    """
    names = config.get("id2label")
    if not isinstance(names, Mapping) or len(names) != number:
        return None
    found = [names.get(str(index)) for index in range(number)]
    return tuple(map(str, found)) if all(isinstance(n, str | int | float) for n in found) else None
