"""What a trained model is for: its classes, and how its inputs are made. Kept beside adapters."""

import dataclasses
from pathlib import Path
from typing import Any

from rmlora_jax.errors import UserError
from rmlora_jax.files import write_json
from rmlora_jax.hub.source import read_json

FILE = "rmlora.json"
TASKS = ("image_classification", "text_classification", "text_regression")


@dataclasses.dataclass(frozen=True)
class Info:
    """What PEFT's own files do not say of a trained model.

    Attributes:
      task: "image_classification", "text_classification" or "text_regression".
      labels: names of the classes; None where they are numbers, or for regression.
      image_size: side of the images in pixels; None is the base's own.
      stored_size: side to which the middle square of an image is brought first; None leaves an
        image as it is.
      center: part of the side of such an image whose middle is taken, then resized to image_size.
      channels: 3, or 1 for images that are made gray.
      max_length: tokens of a text.
      columns: names of the one or two texts of an example.
      dtype: in which the model was computed: "float32", "bfloat16", "float16".
      about: what else a model card says: data, method, metrics, config. Any JSON.
    """

    task: str
    labels: tuple[str, ...] | None = None
    image_size: int | None = None
    stored_size: int | None = None
    center: float = 1.0
    channels: int = 3
    max_length: int = 128
    columns: tuple[str, ...] = ("text",)
    dtype: str = "float32"
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_image(self) -> bool:
        return self.task == TASKS[0]

    @property
    def is_regression(self) -> bool:
        return self.task == TASKS[2]

    def label(self, index: int) -> str:
        """The name of a class, its number where it has none."""
        return self.labels[index] if self.labels else str(index)


def write_info(folder: Path, info: Info) -> Path:
    """Writes ``rmlora.json`` into a folder."""
    return write_json(folder / FILE, dataclasses.asdict(info))


def read_info(folder: Path) -> Info | None:
    """The `Info` of a folder, None where it has none.

    Raises:
      UserError: the file is damaged, or a field has a value that it cannot have.
    """
    path = folder / FILE
    if not path.exists():
        return None
    raw = read_json(path)
    checks = {
        "task": lambda x: x in TASKS,
        "labels": lambda x: x is None or _strings(x, 1, 100_000),
        "image_size": lambda x: x is None or _count(x),
        "stored_size": lambda x: x is None or _count(x),
        "center": lambda x: type(x) in (int, float) and 0 < x <= 1,
        "channels": lambda x: x in (1, 3) and type(x) is int,
        "max_length": _count,
        "columns": lambda x: _strings(x, 1, 2),
        "dtype": lambda x: x in ("float32", "bfloat16", "float16"),
        "about": lambda x: isinstance(x, dict),
    }
    wrong = [name for name in raw if name not in checks or not checks[name](raw[name])]
    if "task" not in raw or wrong:
        raise UserError(f"{path}: {wrong[0] if wrong else 'task'} is missing, unknown or wrong; "
                        "copy the folder again")
    tuples = {k: tuple(raw[k]) for k in ("labels", "columns") if raw.get(k) is not None}
    return Info(**raw | tuples)


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**16


def _strings(value: Any, least: int, most: int) -> bool:
    return (isinstance(value, list) and least <= len(value) <= most
            and all(isinstance(text, str) for text in value))
