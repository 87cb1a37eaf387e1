"""How a compiled kernel is told what is padding, on CPU (`jaxllm/native/padding.h`).

A program is made for some number of tokens, and a step may have fewer: what is computed for the
others is of no use. XLA computes all of an array.
"""

import math

import jax
import jax.numpy as jnp


def num_rows(num_tokens: jax.Array | None, lead: tuple[int, ...]) -> jax.Array:
    """Returns how many rows of an array of tokens a kernel computes.

    Args:
        num_tokens: int32 [], tokens that count, the first ones; None: all.
        lead: Sizes of the axes before the last: tokens first, then what each has.

    Returns:
        int32 [], the first so many of all rows; or int32 [0]: all.
    """
    if num_tokens is None:
        return jnp.zeros(0, jnp.int32)
    of_token = math.prod(lead[1:])
    return num_tokens if of_token == 1 else num_tokens * jnp.int32(of_token)
