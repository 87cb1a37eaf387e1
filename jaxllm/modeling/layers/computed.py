"""What a compiled kernel may compute in place of XLA."""

import jax
from flax import nnx


class Computed(nnx.Module):
    """A module of which `AbstractModel.merge` says what computes it."""

    kernel: str = ""
    """The compiled kernel, as `native.build.target_for` names it; empty: XLA."""

    num_tokens: nnx.Variable | None = None
    """int32 [], how many the kernel computes, the first ones; None: all."""

    @property
    def counted(self) -> jax.Array | None:
        """The value of `num_tokens`."""
        return None if self.num_tokens is None else self.num_tokens[...]
