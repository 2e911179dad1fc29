"""Records that cannot be used: left out, counted and named, up to a number.

They are left out first, as if the data set had been made without them: what is held out, limits and
the order of examples follow from what is left, and every process, which reads the same files, comes
to the same.
"""

from rmlora_jax.errors import UserError

SHOWN = 5  # records that an error or a note names
FIELD = "config.data.bad_records"
# What to type where a record cannot be used and none may be left out.
LEAVE_OUT = f"--{FIELD}=10 to leave out up to 10 such records (0, the default: none)"


class BadRecord(UserError):
    """One record cannot be used; the first line names it and says why."""


class Skipped:
    """What is left out of a data set, at most ``limit`` records of all its splits together.

    >>> skipped = Skipped(1)
    >>> skipped.add(BadRecord("a.csv, line 3: 'text' is empty"))
    >>> skipped.records
    ["a.csv, line 3: 'text' is empty"]
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.records: list[str] = []

    def add(self, *errors: BadRecord) -> None:
        """Leaves out these records.

        Raises:
          UserError: they are more than may be left out.
        """
        self.records += [str(error).partition("\n")[0] for error in errors]
        if len(self.records) <= self.limit:
            return
        if self.limit == 0:
            first = str(errors[0])
            end = "" if LEAVE_OUT in first else f"\nCorrect it, or type {LEAVE_OUT}"
            raise UserError(f"{first}{end}") from errors[0]
        raise UserError(
            f"{len(self.records)} records cannot be used, where {FIELD}={self.limit}: "
            f"{listed(self.records)}\nCorrect them, or type a larger --{FIELD}"
        ) from errors[-1]


def listed(records: list[str] | tuple[str, ...]) -> str:
    """The first few records.

    >>> listed([f"record {i}" for i in range(7)])
    'record 0; record 1; record 2; record 3; record 4; and 2 more'
    """
    more = [f"and {len(records) - SHOWN} more"] if len(records) > SHOWN else []
    return "; ".join([*records[:SHOWN], *more])
