"""Which fields of a config to correct, where the library refuses their values."""

import contextlib
from collections.abc import Iterator

from rmlora_jax.errors import UserError


@contextlib.contextmanager
def fields(names: str) -> Iterator[None]:
    """Turns a ValueError or RuntimeError of the library into a UserError that names ``names``."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as e:
        raise UserError(f"{str(e).splitlines()[0]}\nCorrect --config.{names}") from e
