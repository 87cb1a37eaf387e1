"""What a step hands to every layer: positions and the attention over the step's tokens.

It is a pytree and an argument, never a global: a layer called twice with the
same values does the same thing.
"""

from dataclasses import dataclass

import jax

from jaxllm.pallas_kernels.attention import Attend, Rope
from jaxllm.sharding.apply import Sharder


@dataclass(frozen=True)
class Context:
    """Everything of one step that layers share."""

    rope: Rope | None
    """Cosines and sines of the step's positions; None: no rotation."""

    attend: Attend
    """Attention of the step's tokens."""

    sharder: Sharder
    """Pins intermediate arrays to the layout (static)."""


jax.tree_util.register_dataclass(Context, data_fields=("rope", "attend"), meta_fields=("sharder",))
