"""The cacheless forward pass: every token at once, nothing kept.

It is the oracle that the engine is tested against, and what training uses.
"""

import jax
import jax.numpy as jnp

from jaxllm.modeling.decoder import Decoder
from jaxllm.pallas_kernels.attention import DenseAttend
from jaxllm.sharding.apply import Sharder


def full_forward(
    model: Decoder,
    tokens: jax.Array,
    sharder: Sharder,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Returns the logits of every token of one or several sequences.

    Args:
        model: The decoder.
        tokens: int32 [T], one sequence, or several one after the other.
        sharder: Pins intermediate arrays to the layout.
        positions: int32 [T], of each token in its sequence; counted up by default.
        segments: int32 [T], which sequence each token belongs to; one by default.

    Returns:
        float32 [T, V].
    """
    num_tokens = tokens.shape[0]
    if positions is None:
        positions = jnp.arange(num_tokens, dtype=jnp.int32)
    if segments is None:
        segments = jnp.zeros(num_tokens, jnp.int32)
    attend = DenseAttend(positions, segments)
    caches = (None,) * model.config.num_layers
    hidden, _ = model(tokens, positions, caches, attend, sharder)
    return model.logits(hidden)
