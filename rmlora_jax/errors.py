"""The one exception a user of the trainer is meant to read."""


class UserError(ValueError):
    """Something the person at the terminal can put right.

    The message is one or two plain lines: what is wrong, where, and what to type next. ``run.py``
    prints it without a traceback and exits with a code other than 0.
    """
