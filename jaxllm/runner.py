"""Runs programs: holds the parameters and the device state, and nothing of the schedule."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.kv_cache import allocate
from jaxllm.inputs import DeviceState, StepOutputs
from jaxllm.programs import ProgramBuilder, ProgramCache, ProgramKey


class ModelRunner:
    """Parameters and cache on the mesh, and one call a step."""

    def __init__(
        self,
        builder: ProgramBuilder,
        params: Sequence[jax.Array],
        fill: Callable[..., jax.Array] = jnp.zeros,
    ) -> None:
        """Allocates the device state.

        Args:
            builder: Of the programs.
            params: One array for each leaf of the model, in order.
            fill: Makes the cache's first content; tests poison it.
        """
        self.builder = builder
        self.params = tuple(params)
        self.programs = ProgramCache(builder)
        self._fill = fill
        self.state = self._new_state()

    def _new_state(self) -> DeviceState:
        shapes = self.builder.state_shapes()
        last_token = jax.device_put(
            np.zeros(shapes.last_token.shape, np.int32), shapes.last_token.sharding
        )
        return DeviceState(allocate(shapes.caches, self._fill), last_token)

    def run(self, key: ProgramKey, buffer: np.ndarray) -> StepOutputs:
        """Runs one step.

        Args:
            key: Of the program.
            buffer: int32, of `batch.pack_plan`.

        Returns:
            The outputs, as NumPy arrays.
        """
        program = self.programs.get(key)
        sent = jax.device_put(buffer, self.builder.sharder.sharding())
        # The old state is donated: until it is rebound, the cache exists only in `outputs`.
        self.state, outputs = program(self.params, self.state, sent)
        return jax.device_get(outputs)

    def is_lost(self) -> bool:
        """Whether an interrupt fell between a launch and the rebinding of its state."""
        return self.state.last_token.is_deleted()

    def recover(self) -> None:
        """Makes a new cache in place of a lost one; its content is gone."""
        if self.is_lost():
            self.state = self._new_state()

    def close(self) -> None:
        """Frees every array and program."""
        for leaf in jax.tree.leaves((self.params, self.state)):
            if not leaf.is_deleted():
                leaf.delete()
        self.programs.clear()
