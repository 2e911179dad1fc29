"""How many runs fit into the memory of a device at once, and what is said where none does."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence

import jax

from rmlora_jax.errors import UserError


def planned(program) -> dict[str, int]:
    """Bytes of each kind that XLA plans for a compiled program; {} if they are unknown."""
    found, kinds = program.memory_analysis(), ("argument", "temp", "output", "alias")
    return {kind: getattr(found, f"{kind}_size_in_bytes") for kind in kinds if found is not None}


def needed(program) -> int:
    """Bytes that a compiled program allocates while it runs; 0 if they are unknown."""
    plan = planned(program)
    return sum(plan.values()) - 2 * plan.get("alias", 0)  # an alias is an output in an argument


def available() -> int:
    """Bytes that a device of this process may hold; on CPUs a share of the machine's memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def is_short(error: Exception) -> bool:
    """Whether an error says that the memory of a device or of the host is exhausted.

    >>> is_short(MemoryError()), is_short(OSError(errno.ENOSPC, "No space left on device"))
    (True, False)
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = str(error).lower()
    short = "resource_exhausted" in words or "out of memory" in words
    return short and isinstance(error, RuntimeError)  # of XLA or of torch


@contextlib.contextmanager
def told(words: Callable[[], str]) -> Iterator[None]:
    """Turns running out of memory inside the block into a UserError with these words.

    >>> with told(lambda: "too large"):
    ...     raise MemoryError
    Traceback (most recent call last):
    rmlora_jax.errors.UserError: too large
    """
    try:
        yield
    except Exception as error:
        if not is_short(error):
            raise
        raise UserError(words()) from error


def of_a_model(what: str, less: Sequence[str] = ()) -> str:
    """Two lines for a model in use that does not fit: what needs too much, and what to type."""
    less = [*less, *(["JAX_PLATFORMS=cpu before it"] if jax.default_backend() != "cpu" else [])]
    advice = f"Type the command with {', or with '.join(less)}" if less else "Use a larger machine"
    return (f"{what} needs more memory than there is: each of {jax.local_device_count()} devices "
            f"of this machine has {available() / 2**30:.1f} GiB\n{advice}")


def largest(
    count: int, need: Callable[[int], int | None], limit: int, constant: int = 0
) -> tuple[int, int | None]:
    """The most runs, up to ``count``, that need at most ``limit``; and what ``count`` would need.

    Args:
      count: all runs.
      need: runs at once -> bytes, None where even the compiler runs out of memory.
      limit: available bytes.
      constant: bytes that do not grow with the number of runs, for a better guess.

    >>> largest(8, lambda runs: 10 + 4 * runs, limit=27, constant=10)
    (4, 42)
    """
    size, first = count, need(count)
    found = first
    while size > 1 and (found is None or found > limit):
        guess = size // 2
        if found is not None:
            guess = int((limit - constant) / max((found - constant) / size, 1))
        size = max(1, min(size - 1, guess))
        found = need(size) if size > 1 else 0
    return size, first
