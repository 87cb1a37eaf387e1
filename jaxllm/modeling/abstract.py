"""A model as shapes: what programs are built from and what the loader fills.

The nnx module is split once, here. Programs take its parameters as a flat tuple
of leaves (a tenth of the dispatch time of an `nnx.State`) and merge inside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.cache.spec import CacheSpec
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.sharding.apply import Sharder

Build = Callable[..., Decoder]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One parameter before it has a value."""

    path: str
    """Dotted, such as `layers.0.attn.qkv.weight`."""

    shape: jax.ShapeDtypeStruct
    """Global shape and dtype, with its sharding."""

    num_in: int
    """Trailing axes that are inputs of the map; 0 for biases and norms."""

    parts: tuple[int, ...]
    """Sizes of the checkpoint's tensors along `part_axis`; () if it is one tensor."""

    part_axis: int
    """The axis that holds the parts; 0 if there are none."""

    @property
    def num_bytes(self) -> int:
        """Bytes over all devices, replicas not counted."""
        return self.shape.size * self.shape.dtype.itemsize


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """Structure and leaves of a model; no arrays."""

    graph: nnx.GraphDef[Any]
    treedef: Any
    leaves: tuple[Leaf, ...]
    cache_specs: tuple[CacheSpec, ...]
    vocab_size: int

    def merge(self, params: Sequence[jax.Array]) -> Decoder:
        """Returns the module over these parameters, one for each leaf, in order."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, params))

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the leaves, in order."""
        return tuple(leaf.shape for leaf in self.leaves)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, replicas not counted."""
        return sum(leaf.num_bytes for leaf in self.leaves)

    def bytes_per_device(self) -> int:
        """Bytes of the parameters on the fullest device."""
        total = 0
        for leaf in self.leaves:
            sharding = leaf.shape.sharding
            shard = sharding.shard_shape(leaf.shape.shape) if sharding else leaf.shape.shape
            size = leaf.shape.dtype.itemsize
            for dim in shard:
                size *= dim
            total += size
        return total


def abstract_model(
    config: ModelConfig, build: Build, dtype: DTypeLike, sharder: Sharder
) -> AbstractModel:
    """Returns the shapes, shardings and structure of a model; allocates nothing."""
    model = nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    variables = nnx.to_flat_state(state)
    leaves = tuple(
        _leaf(".".join(map(str, path)), variable, sharder) for path, variable in variables
    )
    shapes, treedef = jax.tree.flatten(state)
    if [s.shape for s in shapes] != [leaf.shape.shape for leaf in leaves]:
        raise AssertionError("flat state and pytree leaves differ in order")
    return AbstractModel(graph, treedef, leaves, model.cache_specs(), config.vocab_size)


def _leaf(path: str, variable: nnx.Variable, sharder: Sharder) -> Leaf:
    meta, value = variable.get_metadata(), variable.get_value()
    shape = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharder.sharding(*meta["axes"]))
    part_axis = meta["axes"].index(None) if meta["parts"] else 0
    return Leaf(path, shape, meta["num_in"], meta["parts"], part_axis)


def init_params(
    model: AbstractModel, config: ModelConfig, build: Build, dtype: DTypeLike, seed: int
) -> tuple[jax.Array, ...]:
    """Returns random parameters, made on the devices: for training and dummy loads."""

    def make() -> tuple[jax.Array, ...]:
        state = nnx.state(build(config, dtype=dtype, rngs=nnx.Rngs(seed)))
        return tuple(jax.tree.leaves(state))

    return jax.jit(make, out_shardings=tuple(s.sharding for s in model.shapes))()
