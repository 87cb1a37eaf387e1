"""Compile-only GPUs: devices of a named card, on a machine that has none.

A program lowered for such a device goes through XLA's whole GPU pipeline, ptxas
included; what comes out cannot run here but can be read (`program_report`). The
CUDA plugin of JAX is needed, a card or a driver is not, and the process must run
with JAX_PLATFORMS=cpu.

This file is the one place that knows how JAX makes a topology. It uses
`jax.experimental.topologies` and two arguments of the plugin that no page
documents; checked with jax 0.10.2, 0.11.2 and 0.12.0.1. Look here first when the
range of jax in pyproject.toml grows.

Nothing is autotuned without a card: structure, copies, collectives and memory
are those of a real run, the choice of tiles and of the library for a matrix
product is not.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jaxllm.errors import ConfigError, nearest

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What XLA's cost model and code generation ask about a GPU."""

    name: str
    """The driver's name: it becomes `device_kind`, which Pallas maps to a capability."""

    capability: tuple[int, int]
    """Compute capability."""

    num_cores: int
    """Streaming multiprocessors."""

    lanes_per_core: int
    """float32 units of a multiprocessor."""

    threads_per_core: int
    """Most resident threads of a multiprocessor."""

    shared_per_core: int
    """Bytes of shared memory of a multiprocessor."""

    shared_per_block: int
    """Most bytes of it that one block may ask for."""

    memory_bytes: int
    memory_bandwidth: int
    """Bytes a second."""

    l2_bytes: int
    clock_ghz: float
    num_links: int = 0
    """NVLinks of a card."""


# a100, h100, h200 and b200: openxla/xla, xla/backends/gpu/target_config/specs/
# {a100_sxm_80,h100_sxm,h200,b200}.txtpb, read off real cards; links of the a100: its
# data sheet (12 of NVLink 3). t4 and l4 have no file there: cores, memory, bandwidth
# and clock from NVIDIA's data sheets "Tesla T4" (2019) and "L4" (2023), limits of a
# multiprocessor from the CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability" (7.5 and 8.9); memory is what the driver leaves of 16 and 24 GB.
CARDS = {
    "t4": Card(
        name="Tesla T4",
        capability=(7, 5),
        num_cores=40,
        lanes_per_core=64,
        threads_per_core=1024,
        shared_per_core=65536,
        shared_per_block=65536,
        memory_bytes=15_600_000_000,
        memory_bandwidth=320_000_000_000,
        l2_bytes=4 << 20,
        clock_ghz=1.59,
    ),
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        num_cores=108,
        lanes_per_core=64,
        threads_per_core=2048,
        shared_per_core=167936,
        shared_per_block=166912,
        memory_bytes=85_100_068_864,
        memory_bandwidth=2_039_040_000_000,
        l2_bytes=40 << 20,
        clock_ghz=1.41,
        num_links=12,
    ),
    "l4": Card(
        name="NVIDIA L4",
        capability=(8, 9),
        num_cores=58,
        lanes_per_core=128,
        threads_per_core=1536,
        shared_per_core=102400,
        shared_per_block=101376,
        memory_bytes=23_600_000_000,
        memory_bandwidth=300_000_000_000,
        l2_bytes=48 << 20,
        clock_ghz=2.04,
    ),
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        num_cores=132,
        lanes_per_core=128,
        threads_per_core=2048,
        shared_per_core=233472,
        shared_per_block=232448,
        memory_bytes=84_942_979_072,
        memory_bandwidth=3_352_320_000_000,
        l2_bytes=50 << 20,
        clock_ghz=1.98,
        num_links=18,
    ),
    "h200": Card(
        name="NVIDIA H200",
        capability=(9, 0),
        num_cores=132,
        lanes_per_core=128,
        threads_per_core=2048,
        shared_per_core=233472,
        shared_per_block=232448,
        memory_bytes=151_397_597_184,
        memory_bandwidth=4_800_000_000_000,
        l2_bytes=50 << 20,
        clock_ghz=1.98,
        num_links=18,
    ),
    "b200": Card(
        name="NVIDIA B200",
        capability=(10, 0),
        num_cores=148,
        lanes_per_core=128,
        threads_per_core=2048,
        shared_per_core=233472,
        shared_per_block=232448,
        memory_bytes=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
        l2_bytes=132_644_864,
        clock_ghz=1.965,
        num_links=18,
    ),
}


def gpu_devices(card: str, count: int = 1) -> list[jax.Device]:
    """Returns compile-only devices of one host, for `make_mesh`.

    Args:
        card: Key of `CARDS`.
        count: How many.

    Raises:
        ConfigError: There is no such card, no device is asked for, or the CUDA
            plugin is not there or not loaded.
    """
    if card not in CARDS:
        raise ConfigError(
            f"card={card!r} is not known{nearest(card, CARDS)}. Use one of {sorted(CARDS)}."
        )
    if count < 1:
        raise ConfigError(f"count={count} must be at least 1. Use the number of GPUs of a host.")
    if not is_installed():
        raise ConfigError(
            f"Compiling for card={card!r} without one needs the CUDA plugin of JAX, and none of "
            f"{PLUGINS} can be imported. Type `pip install 'jaxllm[aot]'`."
        )
    try:
        # Both arguments are needed: without the first XLA looks for a GPU, without
        # the second (partitions x hosts x devices of a host) there are no devices.
        topology = topologies.get_topology_desc(
            "", "cuda", target_config=target_config(CARDS[card]), topology=f"1x1x{count}"
        )
    except NotImplementedError as error:
        # Where JAX_PLATFORMS is unset and no driver is found, the plugin leaves again.
        raise ConfigError(
            "The CUDA plugin of JAX is installed but did not load, as this machine has no GPU. "
            "Start Python with JAX_PLATFORMS=cpu in its environment."
        ) from error
    return list(topology.devices)


def compile_only(
    lowered: jax.stages.Lowered, options: Mapping[str, str | bool] | None = None
) -> jax.stages.Compiled:
    """Compiles a program that was lowered for devices of `gpu_devices`.

    JAX's persistent cache is off meanwhile: it stores such a program, but cannot
    read it again and warns each time.

    Args:
        lowered: The program.
        options: Of XLA, such as `{"xla_gpu_enable_triton_gemm": False}`.
    """
    name = "jax_enable_compilation_cache"
    enabled = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # which had decided at the first compilation
    try:
        return lowered.compile(compiler_options=dict(options) if options else None)
    finally:
        jax.config.update(name, enabled)
        compilation_cache.reset_cache()


def is_installed() -> bool:
    """Returns whether the CUDA plugin of JAX can be imported."""
    # The parent is a namespace package, itself absent where there is no plugin at all.
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(name) is not None for name in PLUGINS)


def target_config(card: Card) -> str:
    """Returns a card as XLA's `GpuTargetConfigProto`, in text format."""
    major, minor = card.capability
    # Instructions of one architecture only (wgmma, tcgen05): sm_90a, sm_100a.
    accelerated = major >= 9
    extension = "ACCELERATED_FEATURES" if accelerated else "NONE"
    version = f"{major}.{minor}{'a' if accelerated else ''}"
    return f"""
        gpu_device_info {{
          name: "{card.name}"
          device_vendor: "NVIDIA Corporation"
          platform_version: "Compute Capability {version}"
          cuda_compute_capability {{
            major: {major} minor: {minor} feature_extension: {extension}
          }}
          core_count: {card.num_cores}
          fpus_per_core: {card.lanes_per_core}
          clock_rate_ghz: {card.clock_ghz}
          device_memory_size: {card.memory_bytes}
          memory_bandwidth: {card.memory_bandwidth}
          l2_cache_size: {card.l2_bytes}
          shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {card.shared_per_block}
          shared_memory_per_core: {card.shared_per_core}
          registers_per_block_limit: {64 << 10}
          registers_per_core_limit: {64 << 10}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: {card.threads_per_core}
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          device_address_bits: 64
          ecc_enabled: true
          pcie_bandwidth: {32 << 30}
          device_interconnect_info {{ active_links: {card.num_links} }}
          driver_version: "13.0.0"
          runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.12.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
        device_description_str: "{card.name}"
    """
