"""The environment of processes in which one CPU plays several devices."""

import os


def xla_flags(devices: int) -> str:
    return " ".join([
        f"--xla_force_host_platform_device_count={devices}",
        # Devices of a busy machine with two cores meet late; by default XLA aborts after 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        # Most of a test's time went to LLVM, which need not make these small programs fast.
        "--xla_backend_optimization_level=0",
    ])  # fmt: skip


def with_devices(devices: int) -> dict[str, str]:
    """This process's environment, for one that sees so many."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices)}
