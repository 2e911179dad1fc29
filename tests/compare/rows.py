"""A row of the table: its name, the model it runs, and the check that gives the verdict."""

import dataclasses
from collections.abc import Callable

from .libraries import Case


@dataclasses.dataclass(frozen=True)
class Row:
    """``check(case, library, framework)`` returns where the claim holds and raises otherwise."""

    section: str
    name: str
    case: Case
    check: Callable

    @property
    def frameworks(self) -> tuple[str, ...]:
        return tuple(f for f in ("linen", "nnx") if getattr(self.case, f) is not None)


def all_rows() -> list[Row]:
    from . import rows_behaviour, rows_layers, rows_numbers, rows_structure

    sections = (rows_layers, rows_structure, rows_numbers, rows_behaviour)
    return [row for section in sections for row in section.rows()]
