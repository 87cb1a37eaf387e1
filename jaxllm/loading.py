"""From a model's name to a model on its devices: the steps of a load, in order.

Everything that can be refused is refused before a weight is read: the config,
the layout, the tensors' names and shapes, the memory.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxllm.buckets import Buckets
from jaxllm.cache.kv_cache import bytes_per_token_of_a_device
from jaxllm.cache.memory import (
    GIB,
    MemoryPlan,
    autotune_bytes,
    counts_bytes,
    plan_memory,
    temp_bound,
)
from jaxllm.config import EngineConfig
from jaxllm.devices import Room, reserve_memory, resolve_dtype, room_on
from jaxllm.distributed import local_devices
from jaxllm.errors import ConfigError
from jaxllm.huge_pages import HugePages
from jaxllm.logs import shows_progress
from jaxllm.modeling import checkpoint as saved
from jaxllm.modeling import registry, weights
from jaxllm.modeling.abstract import AbstractModel, abstract_model, init_params
from jaxllm.modeling.config import ModelConfig, with_length
from jaxllm.modeling.fitting import fit, unfit
from jaxllm.modeling.manifest import Manifest, read_manifest
from jaxllm.native.build import are_expected, why_not_compiled
from jaxllm.pallas_kernels.attention.spec import TUNING
from jaxllm.peers import peers_of
from jaxllm.sampling_params import as_integer
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import Layout

logger = logging.getLogger("jaxllm")

CPU_CACHE = 1 << 30
"""Bytes of KV cache on CPU where the caller says nothing: more if one full sequence needs it,
less if all rows together do not."""

DEFAULTS = {
    "cpu": {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "page_size": TUNING["cpu"].keys_at_once,  # so that a part of the keys is a page as it lies
        "memory_fraction": 0.9,
        "narrowest": 4096,  # attention ends with the last key, however wide the table is
        "max_decode_steps": 1,  # a launch costs little beside a step
    },
    "gpu": {
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "page_size": 16,
        "memory_fraction": 0.92,
        "narrowest": 128,
        "max_decode_steps": 32,
    },
}
"""By platform; `LLM`'s documentation states them."""

COMPILED_PAGE_SIZE = 32
"""Of compiled attention: the shortest page that it reads as it lies (`kPage` in `step.h`)."""

LoadFormat = Literal["auto", "safetensors", "dummy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the caller asked of the engine; None where the machine decides."""

    dtype: str = "auto"
    max_model_len: int | str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    memory_fraction: float | None = None
    cache_bytes: int | None = None
    num_pages: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    async_scheduling: bool = True

    def __post_init__(self) -> None:
        """Checks types, and what no model and no machine could give."""
        for name, value in {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_size": self.page_size,
            "kv_cache_memory_bytes": self.cache_bytes,
            "num_gpu_blocks_override": self.num_pages,
            "max_logprobs": self.max_logprobs,
        }.items():
            if value is not None and as_integer(value) is None:
                raise ConfigError(f"{name}={value!r} must be an integer.")
        if self.num_pages is not None and self.num_pages < 1:
            raise ConfigError(
                f"num_gpu_blocks_override={self.num_pages} must be at least 1, or left out."
            )
        if self.max_logprobs < -1:
            raise ConfigError(
                f"max_logprobs={self.max_logprobs} must be at least 0, or -1 for no bound."
            )
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise ConfigError(
                f"kv_cache_memory_bytes={self.cache_bytes} must be at least 1. "
                f"Use {CPU_CACHE} for one GiB, or leave it out."
            )
        fraction = self.memory_fraction
        if fraction is not None and not (isinstance(fraction, Real) and 0 < fraction <= 1):
            raise ConfigError(
                f"gpu_memory_utilization={fraction!r} must be greater than 0 and at most 1. "
                "Use 0.9 for nine tenths of the memory."
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """A model that will fit: all that is known before its weights are read."""

    folder: Path
    architecture: str
    family: registry.Family
    config: ModelConfig
    engine: EngineConfig
    model: AbstractModel
    memory: MemoryPlan
    sources: Sequence[weights.Source]
    """Where each parameter comes from; empty for dummy weights."""

    hf_config: Any
    wishes: Wishes
    manifest: Manifest | None
    """Of a folder that `LLM.save` wrote; it has no `sources`."""

    notes: tuple[str, ...] = ()
    """What was done to make the model fit its layout, a sentence each."""

    @property
    def devices(self) -> list[jax.Device]:
        """Those that hold the model."""
        sharding = self.model.leaves[0].shape.sharding
        return sorted(sharding.device_set, key=lambda device: device.id) if sharding else []


def plan_load(
    folder: Path,
    wishes: Wishes,
    sharder: Sharder,
    load_format: LoadFormat,
    overrides: registry.Overrides | None = None,
    others: Sequence[Sharder] = (),
) -> Plan:
    """Reads configs and headers, and decides everything; allocates nothing.

    Where there are kernels to compile for this processor, they are compiled at the end.

    Args:
        folder: Of the checkpoint.
        wishes: What the caller asked for.
        sharder: Of the engine.
        load_format: As for `LLM`.
        overrides: As for `LLM`.
        others: Of further engines, whose devices must have as much room.

    Raises:
        CheckpointError: The folder is no checkpoint, or does not fit its config.
        UnsupportedModelError: The architecture is not implemented.
        ConfigError: A wish cannot be had, with this model or on this machine.
        NativeBuildError: `JAXLLM_NATIVE=1`, and a kernel cannot be compiled.
    """
    hf = registry.read_hf_config(folder, overrides)
    architecture, family = registry.family_of(hf)
    config = registry.model_config(hf, family)
    if load_format not in ("auto", "safetensors", "dummy"):
        raise ConfigError(
            f"load_format={load_format!r} is not supported. Use 'auto', 'safetensors' or 'dummy'."
        )
    fitted = fit(config, family.build, sharder.layout)
    config = fitted.config
    manifest = None if load_format == "dummy" else read_manifest(folder)
    if manifest:
        manifest.check_config(architecture, unfit(config))
        wishes = replace(wishes, dtype=manifest.dtype_for(wishes.dtype))
    is_read = load_format != "dummy" and manifest is None
    checkpoint = weights.Checkpoint(folder) if is_read else None
    config, ignored = _tied_as_stored(config, family, checkpoint)
    device = local_devices(sharder.mesh)[0]
    stored = np.dtype(weights.DTYPES[checkpoint.dtype()]).name if checkpoint else stated_dtype(hf)
    config, engine = resolve(wishes, config, hf, stored, device, sharder.mesh.size)
    dtype = engine.dtype
    model = abstract_model(config, family.build, dtype, sharder)
    sources = weights.match(model, checkpoint, family.WEIGHTS, ignored) if checkpoint else []
    if manifest:
        manifest.check_parameters(model)
    room = _room(wishes, [sharder, *others])
    memory = fit_cache(wishes, config, engine, model, sharder.layout, room)
    if memory.max_model_len != engine.max_model_len:  # rotations may depend on it; no shape does
        engine = replace(engine, max_model_len=memory.max_model_len)
        config = with_length(config, memory.max_model_len)
        model = abstract_model(config, family.build, dtype, sharder)
    if wishes.dtype != "auto" and checkpoint and dtype != stored:
        logger.info("Casting %s to %s", stored, dtype)
    # Compiles the kernels, last of all: no request shall wait for them, and no refusal.
    why_not_compiled(device.platform, sharder.mesh.size, dtype)
    return Plan(
        folder,
        architecture,
        family,
        config,
        engine,
        model,
        memory,
        sources,
        hf,
        wishes,
        manifest,
        fitted.notes,
    )


def _room(wishes: Wishes, where: Sequence[Sharder]) -> Room:
    """Returns the memory of a device; of the host that has the least, where there are several."""
    peers = peers_of(*(sharder.mesh for sharder in where))
    devices = [device for sharder in where for device in local_devices(sharder.mesh)]
    room = room_on(devices, memory_fraction(wishes, devices[0].platform))
    most = peers.least("ask for memory", room.most)
    free = peers.least("ask for free memory", room.limit - room.in_use)
    return replace(room, most=most, limit=room.in_use + free)


def _tied_as_stored(
    config: ModelConfig, family: registry.Family, checkpoint: weights.Checkpoint | None
) -> tuple[ModelConfig, Sequence[str]]:
    """Returns the config with an output head if the files have one, and what to ignore in them."""
    ignored = family.IGNORED_WEIGHTS
    if checkpoint is None or not config.tie_embeddings:
        return config, ignored
    names = {line.path: line.names[0] for line in family.WEIGHTS}
    head, embedding = names["head.weight"], names["embed.weight"]
    if weights.ties_differ(checkpoint, head, embedding):
        logger.info(
            "config.json ties the output head to the embedding, but the checkpoint's differ"
        )
        return replace(config, tie_embeddings=False), ignored
    return config, (*ignored, head)  # many checkpoints hold the embedding a second time


def plan_reshard(plan: Plan, sharder: Sharder, own: Mapping[int, int]) -> Plan:
    """Returns the plan of the same model and engine under another layout; allocates nothing.

    Args:
        plan: Of the model as it is.
        sharder: The layout on its devices.
        own: Bytes that the model and its cache have now, by id of the device.

    Raises:
        ConfigError: It does not fit the layout, or the devices, with sequences as long as now.
    """
    device = sharder.mesh.devices.flat[0]
    former = plan.devices[0].platform
    if device.platform != former:
        raise ConfigError(
            f"The model is on {former} devices and {device} is one of {device.platform}. What is "
            "best differs between them: make another LLM there."
        )
    fitted = fit(unfit(plan.config), plan.family.build, sharder.layout)
    config = with_length(fitted.config, plan.engine.max_model_len)
    model = abstract_model(config, plan.family.build, plan.engine.dtype, sharder)
    wishes = replace(plan.wishes, max_model_len=plan.engine.max_model_len)
    room = room_on(list(sharder.mesh.devices.flat), memory_fraction(wishes, device.platform), own)
    memory = fit_cache(wishes, config, plan.engine, model, sharder.layout, room)
    return replace(plan, config=config, model=model, memory=memory, notes=fitted.notes)


def load_params(plan: Plan, *, seed: int, show_progress: bool) -> tuple[jax.Array, ...]:
    """Returns the parameters of a plan, on their devices."""
    start = time.perf_counter()
    room = HugePages.of_model(plan.model)
    if not plan.sources and plan.manifest is None:
        return init_params(plan.model, seed, room.moved if room else None)
    bar = tqdm(
        total=plan.model.num_bytes,
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        disable=not (show_progress and shows_progress()),
        leave=False,
    )
    with bar:
        if plan.manifest is None:
            params = weights.load(plan.sources, bar.update, room.zeros if room else np.zeros)
        else:
            peers = peers_of(cast(Mesh, plan.model.leaves[0].shape.sharding.mesh))
            move = room.moved if room else None
            params = saved.restore(plan.folder, plan.model, plan.manifest, bar.update, peers, move)
    seconds = time.perf_counter() - start
    logger.info(
        "Model loading took %.2f GiB memory and %.2f seconds (%.2f GB/s)",
        plan.model.num_bytes / GIB,
        seconds,
        plan.model.num_bytes / 1e9 / seconds,
    )
    return params


def stated_dtype(hf: Any) -> str:
    """Returns the element type that config.json states, which no file bears out."""
    name = str(getattr(hf, "dtype", None)).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else "float32"


def engine_config(
    wishes: Wishes, length: int, dtype: str, device: jax.Device, num_devices: int
) -> EngineConfig:
    """Returns what the caller asked for, and the platform's defaults for the rest."""
    defaults = DEFAULTS["cpu" if device.platform == "cpu" else "gpu"]
    seqs, tokens = wishes.max_num_seqs, wishes.max_num_batched_tokens
    page_size = wishes.page_size
    if page_size is None:
        is_compiled = are_expected(device.platform, num_devices, dtype)
        page_size = COMPILED_PAGE_SIZE if is_compiled else defaults["page_size"]
    if seqs is None:
        seqs = min(defaults["max_num_seqs"], tokens or defaults["max_num_seqs"])
    if tokens is None:
        tokens = max(defaults["max_num_batched_tokens"], seqs)
        if not wishes.enable_chunked_prefill:
            tokens = max(tokens, length)
    return EngineConfig(
        max_model_len=length,
        max_num_seqs=int(seqs),  # NumPy's integers are taken, and would overflow in sums
        max_num_batched_tokens=int(tokens),
        page_size=int(page_size),
        dtype=dtype,
        enable_prefix_caching=wishes.enable_prefix_caching,
        enable_chunked_prefill=wishes.enable_chunked_prefill,
        max_logprobs=wishes.max_logprobs,
        logprobs_mode=wishes.logprobs_mode,
        async_scheduling=wishes.async_scheduling,
        min_rows=1 if device.platform == "cpu" and dtype == "float32" else 2,
        min_width=max(1, defaults["narrowest"] // max(1, page_size)),  # of tokens, in pages
        max_decode_steps=defaults["max_decode_steps"],
    )


def resolve(
    wishes: Wishes, config: ModelConfig, hf: Any, stored: str, device: Any, num_devices: int
) -> tuple[ModelConfig, EngineConfig]:
    """Returns what was wished for as it will be: element type, length, sizes of a step.

    Args:
        wishes: Of the caller.
        config: Of the model, as it fits the layout.
        hf: The same, as Hugging Face has it.
        stored: Element type of the checkpoint.
        device: That will compute; or what stands for it in a plan.
        num_devices: Of an engine.

    Raises:
        ConfigError: A wish cannot be had.
    """
    dtype = resolve_dtype(wishes.dtype, stored, device, overflows=config.float16_overflows)
    length = max_model_len(wishes.max_model_len, config, hf)
    engine = engine_config(wishes, length, dtype, device, num_devices)
    return with_length(config, length), engine


def max_model_len(asked: int | str | None, config: ModelConfig, hf: Any) -> int:
    """Returns the longest sequence, in tokens, for now where "auto" was asked for.

    Args:
        asked: What the caller gave.
        config: Of the model.
        hf: The same, as Hugging Face has it.

    Raises:
        ConfigError: It is no number of tokens, or more than the model was made for.
    """
    key, derived = derived_length(config, hf)
    if asked is None or asked in ("auto", -1):
        # A length that longrope does better without is not chosen for the caller.
        is_cut = config.default_length < config.max_position
        return min(derived, config.default_length) if is_cut else derived
    length = as_integer(asked)
    if length is None or length < 1:
        raise ConfigError(
            f"max_model_len={asked!r} is neither a number of tokens nor 'auto'. "
            f"The model's own is {derived}."
        )
    if length <= derived:
        return length
    problem = (
        f"User-specified max_model_len ({asked}) is greater than the derived max_model_len "
        f"({key}={derived})."
    )
    if config.position_offset is not None:
        raise ConfigError(
            f"{problem} Use {derived} or less: the model has learned positions, and none beyond."
        )
    if not _allows_long():
        raise ConfigError(
            f"{problem} Use {derived} or less, or set JAXLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if text "
            "beyond it may be nonsense."
        )
    logger.warning("%s Text beyond that may be nonsense.", problem)
    return length


def derived_length(config: ModelConfig, hf: Any) -> tuple[str, int]:
    """Returns the length that a model was made for, in tokens, and the key that says so."""
    found = {
        name: value
        for name in registry.LENGTH_FIELDS
        if (value := as_integer(getattr(hf, name, None))) is not None and value > 0
    }
    own, *others = registry.LENGTH_FIELDS
    scaled = config.max_position / found[own] if found.get(own) else 1
    lengths = {name: int(found[name] * scaled) for name in others if name in found}
    lengths = {own: config.max_position, **lengths}
    stated = lengths.get("model_max_length")
    if stated is not None and config.position_offset is None:
        return "model_max_length", found["model_max_length"]
    return min(lengths.items(), key=lambda item: item[1])


def _allows_long() -> bool:
    name = "ALLOW_LONG_MAX_MODEL_LEN"
    return any(os.environ.get(f"{prefix}_{name}") == "1" for prefix in ("JAXLLM", "VLLM"))


def memory_fraction(wishes: Wishes, platform: str) -> float:
    """Returns the share of a device's memory that an engine may use."""
    default = DEFAULTS["cpu" if platform == "cpu" else "gpu"]["memory_fraction"]
    return wishes.memory_fraction or default


def reserve_device_memory(wishes: Wishes) -> None:
    """Asks for an engine's share of a GPU's memory; before the backend starts, or never.

    Whatever looks at the devices calls it first: a plan that is followed by a load, too.
    """
    reserve_memory(memory_fraction(wishes, "gpu"))


def reserved_temp(
    config: ModelConfig, engine: EngineConfig, model: AbstractModel, layout: Layout, platform: str
) -> int:
    """Returns the bytes of each device that neither weights nor cache may take."""
    temp = temp_bound(config, engine, Buckets(engine).largest(), layout)
    # Made when the first penalty is asked for.
    temp += counts_bytes(config, engine) // layout.split("vocab")
    return temp if platform == "cpu" else temp + autotune_bytes(model.largest_leaf_per_device())


def fit_cache(
    wishes: Wishes,
    config: ModelConfig,
    engine: EngineConfig,
    model: AbstractModel,
    layout: Layout,
    room: Room,
) -> MemoryPlan:
    """Returns what the memory of each device is used for; the devices need not be here.

    Args:
        wishes: Of the caller.
        config: Of the model, as it fits the layout.
        engine: Of the wishes.
        model: Under the layout.
        layout: Of one engine.
        room: On each of its devices, for `memory_fraction`.

    Raises:
        ConfigError: The model does not fit, or not one sequence beside it.
    """
    if wishes.cache_bytes is not None and wishes.cache_bytes > room.most:
        raise ConfigError(
            f"kv_cache_memory_bytes={wishes.cache_bytes} is more than the {room.most} bytes of "
            "memory that there are. Use fewer, or leave it out."
        )
    token_bytes = bytes_per_token_of_a_device(model.cache_specs, engine.dtype, layout)
    weight_bytes = model.bytes_per_device()
    if weight_bytes > room.most:  # kv_cache_memory_bytes does not ask what else there is
        raise ConfigError(
            f"The model does not fit: its weights take {weight_bytes / GIB:,.1f} GiB in "
            f"{engine.dtype}, and there are {room.most / GIB:,.1f} GiB of memory. Use a smaller "
            "model, or check the sizes in config.json."
        )
    temp = reserved_temp(config, engine, model, layout, room.platform)
    cache_bytes = wishes.cache_bytes
    if wishes.num_pages is not None:
        cache_bytes = (wishes.num_pages + 1) * engine.page_size * token_bytes  # and the trash page
    if cache_bytes is None and room.platform == "cpu":
        sequence = (engine.pages_per_seq + 1) * engine.page_size * token_bytes
        every = engine.max_num_seqs * sequence  # all rows at full length: more is of no use
        some = every if wishes.memory_fraction is not None else max(CPU_CACHE, sequence)
        cache_bytes = min(some, every, room.limit - weight_bytes - temp)
    try:
        return plan_memory(
            engine=engine,
            limit=room.limit - room.in_use,
            weights=weight_bytes,
            temp=temp,
            token_bytes=token_bytes,
            cache_bytes=cache_bytes,
            fit_length=wishes.max_model_len in ("auto", -1),
        )
    except ConfigError as error:
        if not room.in_use:
            raise
        raise ConfigError(
            f"{error} Other arrays of this process hold {room.in_use / GIB:.3f} GiB of "
            f"{room.name}: if a former LLM does, call its close() before you make the next one."
        ) from error


def eos_token_ids(plan: Plan, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a text: the tokenizer's, then the configs'.

    The list of `generation_config.json` is what makes chat models stop at the end
    of their turn; without one, config.json's counts.
    """
    found = [getattr(tokenizer, "eos_token_id", None)]
    stated = (generation_config_of(plan.folder, "auto") or {}).get("eos_token_id")
    stated = getattr(plan.hf_config, "eos_token_id", None) if stated is None else stated
    found += stated if isinstance(stated, list) else [stated]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def generation_config_of(folder: Path, given: str | Path) -> dict[str, Any] | None:
    """Returns the generation_config.json that the defaults of `generate` come from.

    Args:
        folder: Of the checkpoint.
        given: "auto" for the checkpoint's own, "vllm" for none, or another folder.

    Raises:
        ConfigError: That other folder has none.
        CheckpointError: The file is not readable.
    """
    if given == "vllm":
        return None
    path = (folder if given == "auto" else Path(given)) / "generation_config.json"
    if path.is_file():
        return registry.read_json(path)
    if given == "auto":
        return None
    raise ConfigError(
        f"generation_config={str(given)!r} is neither 'auto' nor 'vllm' nor a folder with a "
        "generation_config.json."
    )
