"""The bundled configs: ``configs/`` of a checkout, ``rmlora_jax/configs/`` of an installation.

This module is the package of them in both places: ``from rmlora_jax.configs import quickstart``.
"""

import ast
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

_PLACES = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
FOLDER = next((place for place in _PLACES if (place / "quickstart.py").is_file()), _PLACES[0])

__path__ = [str(FOLDER)]  # a module that has it is a package

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


def names() -> list[str]:
    """The names of all bundled configs, in order.

    >>> names()[:2]
    ['ablation', 'beyond_lora']
    """
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def file_of(name: str) -> Path | None:
    """The file of ``NAME`` or ``configs/NAME.py``, if it is a bundled config.

    >>> file_of("quickstart") == file_of("configs/quickstart.py") == FOLDER / "quickstart.py"
    True
    """
    path = PurePosixPath(name)
    known = path.stem in names() and name in (path.stem, f"configs/{path.stem}.py")
    return FOLDER / f"{path.stem}.py" if known else None


def summary(name: str) -> str:
    """The first line of a config's docstring; the config is not run.

    >>> summary("quickstart")
    'Handwritten digits with the bundled ViT-Tiny: no network, a minute on two CPU cores.'
    """
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0].replace("``", "")
