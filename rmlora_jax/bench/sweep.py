"""The same bench for several values of one thing."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rmlora_jax.bench.options import Options
from rmlora_jax.bench.run import bench


def sweep(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """``{"sweep": name, "values": [...], "benches": [what ``bench`` returned for each]}``.

    The floor is measured anew at every value, in turns with the others, although rank and modules
    do not change it: only so the ratios are of times under the same conditions.
    """
    found = []
    for value in options.values:
        say(f"{options.sweep} {value}")
        found.append(bench(dataclasses.replace(options, **{options.sweep: value}), say))
    return {"sweep": options.sweep, "values": list(options.values), "benches": found}
