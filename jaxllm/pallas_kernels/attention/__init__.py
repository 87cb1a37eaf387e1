"""Attention of one step's tokens: over a paged cache, or over the tokens alone.

Both forms are a pytree that is called as `attend(q, k, v, cache, spec)`, so one
definition of a model serves the engine (`PagedAttend`) and the cacheless forward
(`DenseAttend`: the oracle, training, pooling). One that `takes_fused` rotates, too.
"""

from jaxllm.pallas_kernels.attention.dense import DenseAttend
from jaxllm.pallas_kernels.attention.paged import PagedAttend, QueryBlocks
from jaxllm.pallas_kernels.attention.spec import (
    Attend,
    AttentionSpec,
    LayerCache,
    Rope,
    Tuning,
    compiled_tuning_for,
    tuning_for,
)

__all__ = [
    "Attend",
    "AttentionSpec",
    "DenseAttend",
    "LayerCache",
    "PagedAttend",
    "QueryBlocks",
    "Rope",
    "Tuning",
    "compiled_tuning_for",
    "tuning_for",
]
