"""How the tests start XLA; imports nothing that starts it."""

import os

LEVEL = os.environ.get("JAXLLM_TESTS_XLA_LEVEL", "0")
"""How much LLVM optimises what XLA:CPU writes. At 0 tiny programs compile in half the time, from
the same optimised HLO; CI compares with transformers at 3 too, which is what users have."""


def flags(devices: int) -> str:
    """XLA_FLAGS for so many CPU devices."""
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level={LEVEL}"
    )
