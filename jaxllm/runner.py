"""Runs programs: holds the parameters and the device state, and nothing of the schedule."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.kv_cache import allocate
from jaxllm.inputs import DeviceState, StepOutputs
from jaxllm.program_cache import ProgramCache
from jaxllm.programs import ProgramBuilder, ProgramKey, count_key


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
        self._counts: jax.Array | None = None
        """Of `DeviceState.token_counts`; made when the first request with penalties comes."""

    def _new_state(self) -> DeviceState:
        shapes = self.builder.state_shapes()
        last_token = jax.device_put(
            np.zeros(shapes.last_token.shape, np.int32), shapes.last_token.sharding
        )
        return DeviceState(allocate(shapes.caches, self._fill), last_token)

    def launch(self, key: ProgramKey, buffer: np.ndarray) -> StepOutputs:
        """Starts one step, and does not wait for it.

        Args:
            key: Of the program.
            buffer: int32, of `batch.pack_plan`.

        Returns:
            The outputs, on the device and on their way to the host; for `fetch`.
        """
        program = self.programs.get(key)
        sent = jax.device_put(buffer, self.builder.sharder.sharding())
        state = self.state
        if key.flags.penalties:
            state = replace(state, token_counts=self._live_counts())
        # The old state is donated: until it is rebound, the cache exists only in `outputs`.
        state, outputs = program(self.params, state, sent)
        if key.flags.penalties:
            self._counts = state.token_counts
            state = replace(state, token_counts=None)
        self.state = state
        for leaf in jax.tree.leaves(outputs):
            leaf.copy_to_host_async()
        return outputs

    def fetch(self, outputs: StepOutputs) -> StepOutputs:
        """Waits for a step's outputs, and returns them as NumPy arrays."""
        return jax.device_get(outputs)

    def count_tokens(self, row: int, tokens: Sequence[int], num_prompt: int) -> None:
        """Sets the counts that the penalties of a row follow.

        Args:
            row: Of the device state.
            tokens: Prompt and output so far.
            num_prompt: How many are the prompt's.
        """
        key = count_key(len(tokens))
        padded = np.zeros(key.tokens, np.int32)
        padded[: len(tokens)] = tokens
        numbers = (np.int32(row), padded, np.int32(num_prompt), np.int32(len(tokens)))
        self._counts = self.programs.get(key)(self._live_counts(), *numbers)

    def _live_counts(self) -> jax.Array:
        if self._counts is None or self._counts.is_deleted():
            shape = self.builder.counts_shape()
            counts = jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)
            self._counts = counts
            return counts
        return self._counts

    def is_lost(self) -> bool:
        """Whether an interrupt fell between a launch and its rebinding, or a launch failed."""
        if self.state.last_token.is_deleted():
            return True
        try:
            self.state.last_token.block_until_ready()
        except jax.errors.JaxRuntimeError:
            return True
        return False

    def recover(self) -> None:
        """Makes a new cache in place of a lost one; its content is gone."""
        if self.is_lost():
            self.state = self._new_state()

    def close(self) -> None:
        """Frees every array and program."""
        for leaf in jax.tree.leaves((self.params, self.state, self._counts)):
            if not leaf.is_deleted():
                leaf.delete()
        self.programs.clear()
