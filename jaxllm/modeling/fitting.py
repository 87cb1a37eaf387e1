"""Fits a model to a layout: what is padded or copied, and what cannot be split.

Works on the config and the axis names of the layers, before a weight is read.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flax import nnx

from jaxllm.errors import ConfigError
from jaxllm.modeling.abstract import Build, shapes_of
from jaxllm.modeling.config import ModelConfig, with_length
from jaxllm.sharding.layouts import REPLICAS, Layout

FIELDS = {
    "embed": "hidden_size",
    "mlp": "intermediate_size",
    "q_heads": "num_attention_heads",
    "kv_heads": "num_attention_heads",
}
"""By axis: what most files call it."""

MOST_NAMED = 64
"""Largest mesh axis that an error proposes."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A model that a layout can hold."""

    config: ModelConfig
    notes: tuple[str, ...]
    """What was done to make it fit, a sentence each."""


def fit(config: ModelConfig, build: Build, layout: Layout) -> Fit:
    """Returns the config with KV heads copied and the vocabulary padded, where it must be.

    Args:
        config: As the checkpoint has it.
        build: Of the family.
        layout: Of one engine.

    Raises:
        ConfigError: Some axis cannot be divided as the layout says.
    """
    _check(_sizes(config, build), layout)
    config, notes = _with_copies(config, layout), []
    if config.kv_copies > 1:
        heads = config.num_kv_heads // config.kv_copies
        over = _over(layout, "kv_heads")
        notes.append(
            f"The model's {heads} KV heads are fewer than {over} can share evenly: each is held "
            f"{config.kv_copies} times, in the cache too"
        )
    config = replace(config, vocab_padding=-config.vocab_size % layout.split("vocab"))
    if config.vocab_padding:
        notes.append(
            f"The vocabulary of {config.vocab_size} tokens is padded to "
            f"{config.vocab_size + config.vocab_padding} for {_over(layout, 'vocab')}; padding is "
            "never sampled"
        )
    used = {REPLICAS, *(name for axis, _ in layout.rules for name in layout.over(axis))}
    idle = [f"{n}={size}" for n, size in layout.mesh_shape if size > 1 and n not in used]
    if idle:
        notes.append(f"Layout {layout.name!r} splits nothing over {', '.join(idle)}")
    return Fit(config, tuple(notes))


def unfit(config: ModelConfig) -> ModelConfig:
    """Returns the config as the checkpoint has it, whatever layout and length it was made for."""
    heads = config.num_kv_heads // config.kv_copies
    return with_length(replace(config, num_kv_heads=heads, kv_copies=1, vocab_padding=0), 0)


def _with_copies(config: ModelConfig, layout: Layout) -> ModelConfig:
    """Returns the config with as many copies of each KV head as give devices whole ones."""
    shards = layout.split("kv_heads")
    copies = shards // math.gcd(shards, config.num_kv_heads)
    return replace(config, num_kv_heads=config.num_kv_heads * copies, kv_copies=copies)


def _check(sizes: Mapping[str, int], layout: Layout) -> None:
    """Raises ConfigError for the first axis that does not divide."""
    for axis, size in sizes.items():
        if size % layout.split(axis):
            works = "; ".join(
                f"{name}={', '.join(map(str, _working(sizes, layout, name))) or 'none'}"
                for name in layout.over(axis)
            )
            raise ConfigError(
                f"{FIELDS.get(axis, axis)}={size} does not divide over {_over(layout, axis)} of "
                f"layout {layout.name!r}. Sizes that work with the model: {works}."
            )


def _working(sizes: Mapping[str, int], layout: Layout, name: str) -> list[int]:
    """Returns the sizes of a mesh axis over which all that is split over it divides."""
    others = {
        axis: layout.split(axis) // layout.mesh[name] for axis in sizes if name in layout.over(axis)
    }
    return [
        n
        for n in range(1, MOST_NAMED + 1)
        if all(sizes[axis] % (n * other) == 0 for axis, other in others.items())
    ]


@functools.cache
def _sizes(config: ModelConfig, build: Build) -> Mapping[str, int]:
    """Returns the size of every axis of the model that must divide as it is."""
    # Layers are alike, and a hundred of them would take seconds.
    small = replace(config, num_layers=1)
    model = shapes_of(build, small, "float32")
    found = {
        axis: size
        for _, variable in nnx.to_flat_state(nnx.state(model))
        for axis, size in zip(
            variable.get_metadata()["axes"], variable.get_value().shape, strict=True
        )
        if axis is not None and axis != "vocab"  # which is padded
    }
    # A copy of a KV head has one query head or more: there are as many as query heads at most.
    return {**found, "kv_heads": config.num_heads}


def _over(layout: Layout, axis: str) -> str:
    sizes = layout.mesh
    return " x ".join(f"{name}={sizes[name]}" for name in layout.over(axis))
