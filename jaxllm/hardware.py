"""What a machine can do, in numbers: for plans, with none of it here.

Rates are peaks of the vendor's data sheets, dense (no structured sparsity), of one
device. A CPU has no such sheet: its numbers are measured in this process, or given.
A user's own numbers are a `Hardware`, or a dict of what differs from a known one.

Each entry names its sheet, and where its figures were read: the vendor's files themselves
were not to be had, but pages and results that quote them were. Two checks need no quotation
and are tests: float32 rates and memory bandwidths are those of cores, clocks and buses, which
XLA reads off cards (`gpu_topology.CARDS`; t4 and l4 are not among those it has). Not checked:
the links of t4 and l4, of which only PCIe 3.0 and 4.0 with 16 lanes was found, the rest is
arithmetic; and the latency of a transfer on any but the h100 (`NCCL_SECONDS`).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax

from jaxllm.devices import memory_limit
from jaxllm.errors import ConfigError, nearest
from jaxllm.machine import Machine, measure_machine
from jaxllm.sampling_params import as_integer
from jaxllm.sharding.gpu_topology import CARDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of device, and how many of it. Rates are of one device."""

    name: str
    platform: str
    """"cpu" or "gpu"."""

    memory_bytes: int
    """Bytes that a program sees."""

    memory_bandwidth: float
    """Bytes a second, reading or writing."""

    matmul: Mapping[str, float] | tuple[tuple[str, float], ...]
    """Pairs of element type and FLOP a second of a matrix product; or a dict, which becomes
    pairs. float32 means float32 (no TF32), as everywhere here."""

    link_bandwidth: float
    """Bytes a second that a device sends to the others of its host, and receives at once."""

    link_seconds: float = 0.0
    """What a transfer between devices takes however small it is: `NCCL_SECONDS` on cards of the
    table, 0 where nobody says."""

    is_shared: bool = False
    """Whether memory and rates are those of all devices together: virtual ones of one CPU."""

    capability: tuple[int, int] | None = None
    """CUDA's compute capability."""

    target: str | None = None
    """Key of `gpu_topology.CARDS`: what programs are compiled for; None where that cannot be."""

    count: int | None = None
    """Devices; None: as many as the layout needs."""

    source: str = "given by the user"
    """Where the numbers are from."""

    def __post_init__(self) -> None:
        """Makes pairs of a dict and checks the numbers.

        Raises:
            ConfigError: One of them is no such number.
        """
        if isinstance(self.matmul, Mapping):
            object.__setattr__(self, "matmul", tuple(self.matmul.items()))
        if self.platform not in ("cpu", "gpu"):
            raise ConfigError(
                f"hardware {self.name!r} has platform={self.platform!r}. Use 'cpu' or 'gpu'."
            )
        positive = {
            "memory_bytes": self.memory_bytes,
            "memory_bandwidth": self.memory_bandwidth,
            "link_bandwidth": self.link_bandwidth,
            **{f"matmul[{dtype!r}]": rate for dtype, rate in self.matmul},
        }
        for name, value in positive.items():
            if not isinstance(value, int | float) or not value > 0:
                raise ConfigError(
                    f"hardware {self.name!r} has {name}={value!r}, and it must be a number "
                    "greater than 0: bytes, bytes a second, or FLOP a second."
                )
        if self.count is not None and (as_integer(self.count) is None or self.count < 1):
            raise ConfigError(
                f"hardware {self.name!r} has count={self.count!r}. Use the number of devices, as "
                "in 'h200:8'."
            )

    @property
    def device_kind(self) -> str:
        """The name, as `jax.Device` calls it."""
        return self.name

    @property
    def compute_capability(self) -> str:
        """As `jax.Device` spells it."""
        return ".".join(map(str, self.capability or (8, 0)))

    def rate(self, dtype: str) -> float:
        """Returns FLOP a second of a matrix product of an element type.

        Raises:
            ConfigError: It is not known.
        """
        rates = dict(self.matmul)
        if dtype not in rates:
            raise ConfigError(
                f"hardware {self.name!r} has no rate for {dtype}; it has {sorted(rates)}. Pass "
                f"hardware={{'like': ..., 'matmul': {{{dtype!r}: FLOP a second}}}}."
            )
        return rates[dtype]

    def among(self, devices: int) -> "Hardware":
        """Returns memory and rates of each of some devices that work at once."""
        if not self.is_shared:
            return self
        return replace(
            self,
            memory_bytes=self.memory_bytes // devices,
            memory_bandwidth=self.memory_bandwidth / devices,
            matmul={dtype: rate / devices for dtype, rate in dict(self.matmul).items()},
            link_bandwidth=self.link_bandwidth / devices,
            is_shared=False,
        )

    def __str__(self) -> str:
        """Such as `8 x h200`."""
        return f"{self.count or 1} x {self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Returns what `parse` takes; JSON can hold it."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        capability = None if self.capability is None else list(self.capability)
        return {**found, "matmul": dict(self.matmul), "capability": capability}


NCCL_SECONDS = 6.6e-6
"""What NCCL expects of a transfer apart from its bytes and hops, on any link: `baseLatencies` of
the ring with protocol LL in its src/graph/tuning.cc (version of June 2026).

It is the least: the fastest all-reduce of 1 to 64 KiB between 8 H100s that was found measured,
MSCCL++'s, takes 6.5 us. NCCL takes 15 to 18 us there (both: microsoft/mscclpp, docs/dsl/results.md,
"Single-Node AllReduce"), as its table has it too: 14 hops of 0.6 us come on top. XLA has
kernels of its own for small sums, of which nothing was found. For NCCL's ring between 8, say
{"like": "h200:8", "link_seconds": 1.5e-5}."""


def _gpu(name: str, card: str, sheet: str, **numbers: Any) -> Hardware:
    """Returns a card, of the memory and the capability that its driver tells."""
    told = {
        "memory_bytes": CARDS[card].memory_bytes,
        "capability": CARDS[card].capability,
        "link_seconds": NCCL_SECONDS,
    }
    return Hardware(name=name, platform="gpu", target=card, source=sheet, **{**told, **numbers})


# Bandwidth between devices is one direction: half of what data sheets print, which add both.
# With structured sparsity they print twice the matrix rates of here.
HARDWARE: dict[str, Hardware] = {
    found.name: found
    for found in (
        _gpu(
            "t4",
            "t4",
            "NVIDIA T4 data sheet (2019): 65 TFLOPS FP16, 8.1 FP32, 320 GB/s, PCIe 3.0 x16; as in "
            "sysrqmts.com/en/gpus/nvidia/tesla/t4",
            memory_bandwidth=320e9,
            matmul={"float16": 65e12, "float32": 8.1e12},
            link_bandwidth=16e9,
        ),
        _gpu(
            "l4",
            "l4",
            "NVIDIA L4 data sheet (2023): 242 TFLOPS FP16/BF16 with sparsity, 30.3 FP32, "
            "300 GB/s, PCIe 4.0 x16 of 64 GB/s; as in grokipedia.com/page/NVIDIA_L4_vs_L40S and "
            "fpsbench.com/compare/gpu/nvidia-l4-vs-nvidia-tesla-m40",
            memory_bandwidth=300e9,
            matmul={"bfloat16": 121e12, "float16": 121e12, "float32": 30.3e12},
            link_bandwidth=32e9,
        ),
        _gpu(
            "a100-40",
            "a100",
            "NVIDIA A100 data sheet (2021), SXM 40 GB: 312 TFLOPS FP16/BF16, 19.5 FP32, "
            "1,555 GB/s, NVLink of 600 GB/s; as in glennklockwood.com/garden/processors/A100; "
            "memory: 40 GiB less what the driver keeps",
            memory_bytes=42_297_786_368,
            memory_bandwidth=1555e9,
            matmul={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
            link_bandwidth=300e9,
        ),
        _gpu(
            "a100-80",
            "a100",
            "NVIDIA A100 data sheet (2021), SXM 80 GB: 312 TFLOPS FP16/BF16, 19.5 FP32, "
            "2,039 GB/s, NVLink of 600 GB/s; as in glennklockwood.com/garden/processors/A100",
            memory_bandwidth=2039e9,
            matmul={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
            link_bandwidth=300e9,
        ),
        _gpu(
            "h100",
            "h100",
            "NVIDIA H100 data sheet, SXM: 1,979 TFLOPS FP16/BF16 with sparsity, 67 FP32, "
            "3.35 TB/s, NVLink of 900 GB/s; as in lzwjava.github.io/nvidia-h200-gpu-specs-en, "
            "and openxla/xla, cuda_core_info_table.cc, which gives 989.4 dense",
            memory_bandwidth=3.35e12,
            matmul={"bfloat16": 989.5e12, "float16": 989.5e12, "float32": 67e12},
            link_bandwidth=450e9,
        ),
        _gpu(
            "h200",
            "h200",
            "NVIDIA H200 data sheet, SXM: 1,979 TFLOPS FP16/BF16 with sparsity, 67 FP32, "
            "4.8 TB/s, NVLink of 900 GB/s; as in mlcommons/inference_results_v4.1, closed/NVIDIA, "
            "and ai-hpc.github.io, 8x H200 Training & Inference",
            memory_bandwidth=4.8e12,
            matmul={"bfloat16": 989.5e12, "float16": 989.5e12, "float32": 67e12},
            link_bandwidth=450e9,
        ),
        _gpu(
            "b200",
            "b200",
            # The first brief (2024) had 80 TFLOPS and 8 TB/s, which are GB200's.
            "NVIDIA Blackwell data sheet, HGX B200: 4.5 PFLOPS FP16/BF16 with sparsity, 75 TFLOPS "
            "FP32, 7.7 TB/s, NVLink of 1.8 TB/s; as in "
            "zdszero.github.io/Computer/Artificial_Intelligence/Hardware.html; pytorch/ao#4002 "
            "has 7.672 TB/s by the driver's bus and clock",
            memory_bandwidth=7.7e12,
            matmul={"bfloat16": 2250e12, "float16": 2250e12, "float32": 75e12},
            link_bandwidth=900e9,
        ),
    )
}
"""By name; `cpu` is measured where it is asked for."""

NAMES = (*HARDWARE, "cpu")

ALIASES = {"a100": "a100-80"}


def parse(given: "str | Mapping[str, Any] | Hardware | None") -> Hardware:
    """Returns the hardware that a caller means.

    Args:
        given: "h200:8", which is eight of them; "h200", as many as a layout needs; None for
            what this machine has; a `Hardware`; or a dict of one, which may name in `like` a
            known one that it differs from, as {"like": "h200:8", "link_seconds": 1.5e-5}.

    Raises:
        ConfigError: There is none of that name, or a number is no number.
    """
    if isinstance(given, Hardware):
        return given
    if isinstance(given, Mapping):
        return _of_dict(given)
    if not isinstance(given, str | None):
        raise ConfigError(
            f"hardware={given!r} is none. Use a name such as 'h200:8', a dict, or a Hardware."
        )
    if given is None:
        return here()
    name, _, number = given.lower().partition(":")
    count = as_integer(int(number)) if number.isdecimal() else None
    if number and not count:
        raise ConfigError(
            f"hardware={given!r} has {number!r} for the number of devices. Write {name}:8, say."
        )
    name = ALIASES.get(name, name)
    if name == "cpu":
        return this_cpu(count)
    if name not in HARDWARE:
        raise ConfigError(
            f"hardware={given!r} is not known{nearest(name, NAMES)}. Use one of {list(NAMES)}, "
            "with the number of devices as in 'h200:8', or give your own numbers as a dict: "
            "{'like': 'h200', 'memory_bandwidth': 4e12}."
        )
    return replace(HARDWARE[name], count=count)


def _of_dict(given: Mapping[str, Any]) -> Hardware:
    known = [field.name for field in fields(Hardware)]
    values = dict(given)
    like = values.pop("like", None)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"hardware has no {name!r}{nearest(str(name), known)}. Use 'like' and any of "
                f"{known}."
            )
    if values.get("capability") is not None:
        values["capability"] = tuple(values["capability"])
    if like is not None:
        base = parse(like)
        if "matmul" in values:
            values["matmul"] = {**dict(base.matmul), **values["matmul"]}
        changed = ", ".join(name for name in values if name not in ("count", "source"))
        if changed:
            values.setdefault("source", f"{base.source}; by the user: {changed}")
        return replace(base, **values)
    optional = ("link_seconds", "is_shared", "capability", "target", "count", "source")
    missing = [name for name in known if name not in values and name not in optional]
    if missing:
        raise ConfigError(
            f"hardware is given as a dict without {missing}. Add them, or name in 'like' a known "
            f"one to take them from: one of {list(NAMES)}."
        )
    return Hardware(**values)


def here() -> Hardware:
    """Returns what this machine has: as many devices of the kind as JAX sees.

    Raises:
        ConfigError: It is of a kind that is not known.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return this_cpu(len(devices))
    kind = devices[0].device_kind
    kinds = {CARDS[one.target].name: one for one in HARDWARE.values() if one.target}
    kinds["NVIDIA A100-SXM4-40GB"] = HARDWARE["a100-40"]  # compiled for as the one of 80 GB
    if kind in kinds:
        return replace(kinds[kind], count=len(devices))
    raise ConfigError(
        f"This machine has {len(devices)} x {kind!r}, of which no numbers are known. Pass "
        f"hardware='h200:{len(devices)}' or another of {list(NAMES)} that is like it, or a dict of "
        "its own numbers."
    )


def this_cpu(count: int | None = None) -> Hardware:
    """Returns this machine's CPU as so many equal devices, in numbers measured here.

    Virtual devices (`--xla_force_host_platform_device_count`) share the cores and the
    memory. Takes a second, once in a process.
    """
    float32, bfloat16 = _measured("float32"), _measured("bfloat16")
    return Hardware(
        name="cpu",
        platform="cpu",
        memory_bytes=memory_limit(jax.devices("cpu")[0], 1.0),
        memory_bandwidth=float32.read_bytes_per_s,
        matmul={"float32": float32.flops_per_s, "bfloat16": bfloat16.flops_per_s},
        link_bandwidth=float32.read_bytes_per_s / 2,  # a copy reads and writes
        is_shared=True,
        count=count,
        source=f"measured in this process, over all cores: products of {SIDE} x {SIDE} and reads "
        f"of {READ_BYTES >> 20} MiB; virtual devices share them",
    )


SIDE, READ_BYTES = 1024, 64 << 20
"""Of what is measured: less than a benchmark takes, as a plan is to be quick."""


@functools.cache
def _measured(dtype: str) -> Machine:
    device = jax.devices("cpu")[0]
    return measure_machine(dtype, device=device, seconds=0.1, read_bytes=READ_BYTES, side=SIDE)
