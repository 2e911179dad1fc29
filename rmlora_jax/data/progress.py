"""One progress bar for everything here that takes seconds."""

import sys


def progress(total: int, desc: str, unit: str, **options):
    """tqdm on standard error; where that is a file or a pipe, a line every ten seconds at most."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    pace = {} if terminal else {"mininterval": 10, "maxinterval": 10}
    return tqdm(total=total, desc=desc, unit=unit, **pace, **options)
