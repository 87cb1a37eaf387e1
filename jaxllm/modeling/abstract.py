"""A model as shapes: what programs are built from and what the loader fills.

The nnx module is split once, here. Programs take its parameters as a flat tuple
of leaves (a tenth of the dispatch time of an `nnx.State`) and merge inside.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxllm.cache.spec import CacheSpec
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.forms import bare_shape, dressed
from jaxllm.modeling.layers.computed import Computed
from jaxllm.modeling.layers.linear import normal_init
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

    copies: tuple[int, ...] = ()
    """For each part, how often a row of the checkpoint's tensor comes along the first axis, one
    copy after the other; () if each comes once."""

    padding: int = 0
    """Rows of zeros at the end of the first axis, which no tensor has."""

    axes: tuple[str | None, ...] = ()
    """Name of each axis."""

    def on(self, sharder: Sharder) -> "Leaf":
        """Returns the same parameter on other devices of the same layout."""
        there = NamedSharding(sharder.mesh, cast("NamedSharding", self.shape.sharding).spec)
        shape = jax.ShapeDtypeStruct(self.shape.shape, self.shape.dtype, sharding=there)
        return replace(self, shape=shape)

    @property
    def is_scale(self) -> bool:
        """Whether it is the factor of a norm."""
        return self.path.endswith(".scale")

    @property
    def num_bytes(self) -> int:
        """Bytes over all devices, replicas not counted."""
        return self.shape.size * self.shape.dtype.itemsize

    def bytes_per_device(self) -> int:
        """Bytes of its shard."""
        shape, sharding = self.shape.shape, self.shape.sharding
        shard = sharding.shard_shape(shape) if sharding else shape
        return math.prod(shard) * self.shape.dtype.itemsize


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """Structure and leaves of a model; no arrays."""

    graph: nnx.GraphDef[Any]
    treedef: Any
    leaves: tuple[Leaf, ...]
    cache_specs: tuple[CacheSpec, ...]
    vocab_size: int
    num_logits: int
    """Columns of the logits (V): the vocabulary and its padding."""

    def merge(
        self,
        params: Sequence[jax.Array],
        kernels: Mapping[type[Computed], str] | None = None,
        num_tokens: jax.Array | None = None,
    ) -> Decoder:
        """Returns the module over these parameters.

        Args:
            params: One for each leaf, in order.
            kernels: What computes the modules of a kind, as `native.build.target_for` names it;
                empty, or none: XLA.
            num_tokens: int32 [], how many they compute, the first ones; None: all.
        """
        model = nnx.merge(self.graph, jax.tree.unflatten(self.treedef, params))
        used = [(kind, kernel) for kind, kernel in (kernels or {}).items() if kernel]
        for _, node in list(nnx.iter_graph(model)) if used else ():
            for kind, kernel in used:
                if isinstance(node, kind):
                    node.kernel = kernel
                    node.num_tokens = None if num_tokens is None else nnx.Variable(num_tokens)
        return model

    def on(self, sharder: Sharder) -> "AbstractModel":
        """Returns the same model on other devices."""
        return replace(self, leaves=tuple(leaf.on(sharder) for leaf in self.leaves))

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
        return sum(leaf.bytes_per_device() for leaf in self.leaves)

    def largest_leaf_per_device(self) -> int:
        """Bytes of the largest parameter on a device."""
        return max(leaf.bytes_per_device() for leaf in self.leaves)


def abstract_model(
    config: ModelConfig, build: Build, dtype: DTypeLike, sharder: Sharder
) -> AbstractModel:
    """Returns the shapes, shardings and structure of a model; allocates nothing."""
    model = shapes_of(build, config, dtype)
    graph, state = nnx.split(model)
    variables = nnx.to_flat_state(state)
    leaves = tuple(
        _leaf(".".join(map(str, path)), variable, sharder) for path, variable in variables
    )
    shapes, treedef = jax.tree.flatten(state)
    if [s.shape for s in shapes] != [leaf.shape.shape for leaf in leaves]:
        raise AssertionError("flat state and pytree leaves differ in order")
    sizes = (config.vocab_size, config.num_logits)
    return AbstractModel(graph, treedef, leaves, model.cache_specs(), *sizes)


def shapes_of(build: Build, config: ModelConfig, dtype: DTypeLike) -> Decoder:
    """Returns a model with shapes in place of values."""
    return nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=cast("nnx.Rngs", OneKey())))


class OneKey:
    """Stands in for `nnx.Rngs` where nothing is drawn.

    Its counts, when they are traced, cost a text of all that was traced before them: of 80 layers
    nine tenths of the time.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        """Returns a key, always the same."""
        return self._key


def _leaf(path: str, variable: nnx.Variable, sharder: Sharder) -> Leaf:
    meta, value = variable.get_metadata(), variable.get_value()
    shape = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharder.sharding(*meta["axes"]))
    part_axis = meta["axes"].index(None) if meta["parts"] else 0
    copies, padding = meta.get("copies", ()), meta.get("padding", 0)
    names = tuple(meta["axes"])
    return Leaf(path, shape, meta["num_in"], meta["parts"], part_axis, copies, padding, names)


def init_params(
    model: AbstractModel, seed: int, move: Callable[[jax.Array], jax.Array] | None = None
) -> tuple[jax.Array, ...]:
    """Returns random parameters, made on the devices: for training and dummy loads.

    Weights have a variance of one over the inputs, norms begin as the identity, biases
    at zero. They depend on the seed and on each leaf's place, not on the devices: copies
    and padding are as they would be read from a checkpoint. `move` says where each shall lie.
    """
    key = jax.random.key(seed)
    draws: dict[Leaf, Callable[..., jax.Array]] = {}
    params = []
    for i, leaf in enumerate(model.leaves):
        # A program for each kind of leaf and not for each: layers are alike. One program of the
        # whole model takes minutes to compile for tens of layers.
        kind = replace(leaf, path=leaf.path.rpartition(".")[2])
        if kind not in draws:
            draws[kind] = jax.jit(functools.partial(_draw, leaf), out_shardings=leaf.shape.sharding)
        value = draws[kind](key, np.int32(i))
        params.append(value if move is None else move(value))
    return tuple(params)


def _draw(leaf: Leaf, key: jax.Array, number: jax.Array) -> jax.Array:
    """Returns the first value of the leaf of this number, and of those like it."""
    shape, dtype = leaf.shape.shape, leaf.shape.dtype
    if not leaf.num_in:
        return jnp.full(shape, 1 if leaf.is_scale else 0, dtype)
    fan_in, key = math.prod(shape[-leaf.num_in :]), jax.random.fold_in(key, number)
    # Drawn as if there were no copies, of which each row's queries are then divided.
    return dressed(leaf, normal_init(key, bare_shape(leaf), fan_in, dtype))
