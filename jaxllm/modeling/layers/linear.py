"""Linear maps, several of them fused in one array where they share an input.

A weight is stored `[*out, *in]`: XLA reads that order at memory bandwidth in a
matrix-vector product, on CPU and through cuBLASLt. The fused axis is kept apart
from the sharded one and after it (`[K, G+2, D, E]`, `[F, 2, E]`): splitting the
result then never moves data between devices, and the weight is a plain matrix
without a copy. (Given a weight of more than two axes, XLA:CPU transposes it on
every call: measured 10x the time of a decode step.)
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.modeling.layers.computed import Computed
from jaxllm.pallas_kernels.linear import linear


def normal_init(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> jax.Array:
    """Draws weights with variance `1 / fan_in`; for training and dummy weights."""
    return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)


FEW_TOKENS = 32
"""From two up to so many tokens, XLA:CPU multiplies faster with the weight on the left (2 to 32
tokens, [3072, 576] and [576, 1536]: 1.3 to 2.1 times; 64: no difference)."""


class Product(Computed):
    """What multiplies its last axes with those of a weight."""

    weight: nnx.Param
    """[*out, *in]."""

    bias: nnx.Param | None = None
    """[*out]."""

    num_in: int = 1
    """How many axes are contracted."""

    def contract(self, x: jax.Array, dtype: DTypeLike, onto: jax.Array | None = None) -> jax.Array:
        """Returns `x @ weight.T + bias`, or `onto` plus that.

        Sums are float32 and rounded once; between devices, partial sums are added in
        `dtype`, in float32 if there is a bias. float32 means float32: no TF32 on a GPU.

        Args:
            x: [..., *in], of the dtype of the weight.
            dtype: Of the result: that one, or float32.
            onto: [..., *out], of that dtype; the sum is rounded, too.

        Returns:
            [..., *out].
        """
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        lead, out = x.shape[: x.ndim - self.num_in], weight.shape[: weight.ndim - self.num_in]
        matrix = weight.reshape(math.prod(out), -1)  # [N, K]; only splits or joins whole axes
        x = x.reshape(*lead, -1)
        if self.kernel:
            added = None if bias is None else bias.reshape(-1)
            stream = None if onto is None else onto.reshape(*lead, -1)
            y = linear(x, matrix, added, dtype, self.kernel, stream, self.counted)
            return y.reshape(*lead, *out)
        y = multiplied(x, matrix, dtype if bias is None else jnp.float32).reshape(*lead, *out)
        if bias is not None:
            y = (y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)).astype(dtype)
        return y if onto is None else onto + y


def multiplied(x: jax.Array, matrix: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the product in plain XLA: x [..., K], matrix [N, K] -> [..., N] of a dtype."""
    precision = jax.lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else None

    def product(x: jax.Array, matrix: jax.Array, dtype: DTypeLike) -> jax.Array:
        return jax.lax.dot_general(
            x,
            matrix,
            (((x.ndim - 1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=dtype,
        )

    def product_on_cpu(x: jax.Array, matrix: jax.Array) -> jax.Array:
        if x.ndim == 2 and 1 < x.shape[0] <= FEW_TOKENS and matrix.dtype == jnp.float32:
            y = product(matrix, x, jnp.float32)  # [N, T]
            y = jax.lax.optimization_barrier(y).T  # or XLA would exchange the operands again
        else:
            y = product(x, matrix, jnp.float32)
        return y.astype(dtype)

    # XLA:CPU is fast with float32 results only. cuBLASLt rounds as it writes: asked for
    # float32 it writes twice the bytes, and an all-reduce sends twice as many.
    return jax.lax.platform_dependent(
        x, matrix, cpu=product_on_cpu, default=lambda x, matrix: product(x, matrix, dtype)
    )


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns `x * factor` in the dtype of `x`, rounded once."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class Linear(Product):
    """`x @ weight.T + bias` over named axes, one or several maps in one array.

    The parameters carry what the loader needs to fill them from a checkpoint:
    `axes` (axis names), `num_in` (how many trailing axes are inputs) and `parts`
    (sizes of the checkpoint's tensors along the first unnamed axis, in order).
    """

    def __init__(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        parts: tuple[int, ...] = (),
        copies: tuple[int, ...] = (),
        bias: bool = False,
        factor: float | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Declares the map.

        Args:
            inputs: Size of each input axis by name, in order.
            outputs: Size of each output axis by name, in order; the axis named
                `parts` holds the fused maps and is never sharded.
            parts: How the checkpoint's tensors divide the axis `parts`.
            copies: How often each part's rows come along the first axis (`abstract.Leaf`).
            bias: Whether there is a bias.
            factor: Of the result, which is rounded before and after; None for 1.
            dtype: Of the parameters.
            rngs: Source of the initial values.
        """
        out_shape, in_shape = tuple(outputs.values()), tuple(inputs.values())
        out_axes = tuple(None if name == "parts" else name for name in outputs)
        self.num_in, self.factor = len(in_shape), factor
        self.weight = nnx.Param(
            normal_init(rngs.params(), out_shape + in_shape, math.prod(in_shape), dtype),
            axes=(*out_axes, *inputs),
            num_in=self.num_in,
            parts=parts,
            copies=copies,
        )
        about = {"axes": out_axes, "num_in": 0, "parts": parts, "copies": copies}
        self.bias = nnx.Param(jnp.zeros(out_shape, dtype), **about) if bias else None

    def __call__(self, x: jax.Array, onto: jax.Array | None = None) -> jax.Array:
        """[..., *in] -> [..., *out], of the dtype of `x`, added to `onto`."""
        if self.factor is None:
            return self.contract(x, x.dtype, onto)
        y = scaled(self.contract(x, x.dtype), self.factor)
        return y if onto is None else onto + y
