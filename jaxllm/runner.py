"""Runs programs: holds the parameters and the device state, and nothing of the schedule."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.kv_cache import allocate
from jaxllm.devices import release_freed_memory
from jaxllm.distributed import put
from jaxllm.inputs import DeviceState, StepOutputs
from jaxllm.modeling.forms import is_placed, move
from jaxllm.peers import peers_of
from jaxllm.program_cache import ProgramCache
from jaxllm.programs import Key, ProgramBuilder, ProgramKey, count_key


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
        self.params = tuple(params)
        self.programs = ProgramCache(builder)
        """Of the layout that parameters and cache have."""

        self.peers = peers_of(builder.sharder.mesh)
        self.peers.say("make an engine", builder.model.leaves, builder.engine, builder.num_pages)
        self.peers.agree()
        self._fill = fill
        self.state = self._new_state(builder)
        self._known = {builder.sharder: self.programs}
        self._moving: ProgramBuilder | None = None
        """Where a cut-off `reshard` may have left some of the parameters."""

        self._counts: jax.Array | None = None
        """Of `DeviceState.token_counts`; made when the first request with penalties comes."""

    @property
    def builder(self) -> ProgramBuilder:
        """Of the programs."""
        return self.programs.builder

    def _new_state(self, builder: ProgramBuilder) -> DeviceState:
        shapes = builder.state_shapes()
        last_token = put(np.zeros(shapes.last_token.shape, np.int32), shapes.last_token.sharding)
        huge_pages = bool(builder.tuning.target)  # pages in use lie side by side
        caches = allocate(shapes.caches, self._fill, huge_pages=huge_pages)
        return DeviceState(caches, last_token)

    def launch(self, key: ProgramKey, buffer: np.ndarray) -> StepOutputs:
        """Starts one step, and does not wait for it.

        Args:
            key: Of the program.
            buffer: int32, of `batch.pack_plan`.

        Returns:
            The outputs, on the device and on their way to the host; for `fetch`.
        """
        program = self._program(key, buffer)
        sent = put(buffer, self.builder.sharder.sharding())
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

    def _program(self, key: Key, *data: Any) -> Callable[..., Any]:
        """Returns a program that every process is about to run with the same data."""
        self.peers.say(key, *data)
        if key not in self.programs:
            self.peers.agree()  # while devices compile a program together, nobody can be stopped
        return self.programs.get(key)

    def fetch(self, outputs: StepOutputs) -> StepOutputs:
        """Waits for a step's outputs, and returns them as NumPy arrays."""
        self.peers.wait(outputs)
        try:
            return jax.device_get(outputs)
        except jax.errors.JaxRuntimeError as error:
            raise self.peers.explain(error) from error

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
        everywhere = self.builder.sharder.sharding()
        given = (np.int32(row), padded, np.int32(num_prompt), np.int32(len(tokens)))
        numbers = (put(np.asarray(x), everywhere) for x in given)
        self._counts = self._program(key, *given)(self._live_counts(), *numbers)

    def _live_counts(self) -> jax.Array:
        if self._counts is None or self._counts.is_deleted():
            shape = self.builder.counts_shape()
            counts = put(np.zeros(shape.shape, shape.dtype), shape.sharding)
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
        """Makes a new cache in place of a lost one; its content is gone.

        Parameters that a cut-off `reshard` has moved are brought back. What waits for other
        processes in vain would be waited for in vain here too.
        """
        if self.peers.problem is not None:
            return
        if self._moving is not None:
            self._free_state()
            self._place(self._moving, self.builder)
        if self.is_lost():
            self.state = self._new_state(self.builder)
        self._moving = None

    def reshard(self, builder: ProgramBuilder) -> None:
        """Moves the parameters to another layout, and makes a new cache there.

        One goes after the other, and is freed where it was; the cache goes first. Programs
        that were compiled for the layout are used again. Where this is cut off, `recover`
        brings everything back.

        Args:
            builder: For the same model under the other layout.
        """
        known = self._known.get(builder.sharder)
        if known is None or known.builder.num_pages != builder.num_pages:
            known = ProgramCache(builder)
        self._moving = known.builder
        self._free_state()
        self._place(self.builder, known.builder)
        state = self._new_state(known.builder)
        self._known[builder.sharder] = known
        # With this one line it is done; a state that is not bound any more is made anew.
        self.programs = known
        self.state = state
        self._moving = None

    def held_bytes(self) -> dict[int, int]:
        """Returns the bytes of parameters and device state, by id of the device."""
        held: dict[int, int] = {}
        for array in jax.tree.leaves((self.params, self.state, self._counts)):
            for shard in [] if array.is_deleted() else array.addressable_shards:
                held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
        return held

    def _free_state(self) -> None:
        _delete((self.state, self._counts))
        self._counts = None

    def _place(self, old: ProgramBuilder, new: ProgramBuilder) -> None:
        """Moves each parameter that is not there yet."""
        for i, leaves in enumerate(zip(old.model.leaves, new.model.leaves, strict=True)):
            if not is_placed(self.params[i], leaves[1]):
                # The old one is freed as its last name goes, but for shards that the new one has.
                moved = move(self.params[i], *leaves).block_until_ready()
                self.params = (*self.params[:i], moved, *self.params[i + 1 :])
                # On CPU the C library would keep nearly as much as all parameters until the end.
                release_freed_memory()

    def close(self) -> None:
        """Frees every array and program."""
        _delete((self.params, self.state, self._counts))
        for programs in self._known.values():
            programs.clear()


def _delete(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        if not leaf.is_deleted():
            leaf.delete()
