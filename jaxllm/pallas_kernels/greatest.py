"""The greatest of each row as one call of a compiled kernel, on CPU (`jaxllm/native/greatest.cc`).

XLA:CPU does it in passes over integers as large as the logits (`sampler.greatest`).
"""

import jax
import jax.numpy as jnp


def compiled_greatest(logits: jax.Array, kernel: str) -> tuple[jax.Array, jax.Array]:
    """Returns the first of each row's greatest tokens, and whether it is a finite number.

    A NaN is greater than all, as in NumPy.

    Args:
        logits: float32 [B, V].
        kernel: As `native.build.target_for` names it.

    Returns:
        int32 [B] and bool [B].
    """
    rows = logits.shape[:1]
    result = jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.bool_)
    tokens, finite = jax.ffi.ffi_call(kernel, result)(logits)
    return tokens, finite
