"""What paged attention computes, slow and obvious: NumPy, one token and head at a time.

Every implementation is tested against it; nothing else uses it.
"""

import numpy as np

from jaxllm.pallas_kernels.attention.spec import AttentionSpec


def attend_sequence(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """Attention of the last tokens of one sequence over all of it.

    Args:
        q: float64 [N, H, D], queries of the last N tokens.
        k: float64 [C, K, D], keys of all C tokens.
        v: float64 [C, K, D], their values.
        spec: The layer's constants.

    Returns:
        float64 [N, H, D].
    """
    num_queries, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    out = np.zeros_like(q)
    for i in range(num_queries):
        position = len(k) - num_queries + i
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for head in range(num_heads):
            scores = k[first : position + 1, head // group] @ q[i, head] * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ v[first : position + 1, head // group]
    return out
