"""How many operations a second devices can do, to say which part of that a run uses."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

# Dense bfloat16 operations a second; the first entry that a device's kind contains counts.
# Sources: NVIDIA's data sheets of each GPU (without sparsity, SXM where there are several forms);
# https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak(devices: Iterable[Any], dtype: Any = "bfloat16") -> float | None:
    """Operations a second of all devices together in 16-bit floats; None where not known.

    >>> from types import SimpleNamespace
    >>> peak([SimpleNamespace(device_kind="NVIDIA H200")] * 2) / 1e12
    1978.0
    """
    if jnp.dtype(dtype).itemsize != 2:
        return None
    found = [
        next((value for name, value in PEAKS.items() if name in device.device_kind), None)
        for device in devices
    ]
    known = [value for value in found if value is not None]
    return sum(known) if known and len(known) == len(found) else None
