"""What a model's steps must do on each device, and the least time that this takes.

Arithmetic over shapes: nothing is compiled, so copies, padding and keys that are gathered
before they are multiplied are not in it. What the compiler made of a program is told by
`program_report`; the distance between the two is what there is to gain.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxllm.cache.kv_cache import bytes_per_token_of_a_device
from jaxllm.config import EngineConfig
from jaxllm.hardware import Hardware
from jaxllm.modeling.abstract import AbstractModel, Leaf
from jaxllm.modeling.config import ModelConfig
from jaxllm.sharding.layouts import Layout

NORMS = (".scale", ".offset")
"""How the paths of a norm's factors end."""

TABLES = ("embed.weight", "positions.weight")
"""Weights that are looked up; the first may be the output head too."""

PER_ROW = ("head", "sampler")
"""Where a step computes rows and not tokens: only what is sampled from."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a layout must send between devices, in every step."""

    opcode: str
    """XLA's name, such as `all-reduce`."""

    where: str
    """"layers", "embedding", "head", "sampler" or "model" (a map beside the layers)."""

    count: int
    """How many a step."""

    devices: int
    """That take part."""

    token_bytes: float
    """Bytes of one of them for a token (a row, in the head): of the whole array that the
    devices sum or gather."""

    def sent(self, tokens: float, rows: float) -> float:
        """Returns bytes that a device sends in a step, over all `count`."""
        size = self.token_bytes * (rows if self.where in PER_ROW else tokens)
        return self.count * sent_bytes(self.opcode, size, self.devices)


def sent_bytes(opcode: str, size: float, devices: int) -> float:
    """Returns the bytes that each of some devices sends, in the ring that sends fewest.

    Args:
        opcode: Of the transfer.
        size: Bytes of the whole array: what one device has before a reduce-scatter, and
            after anything else.
        devices: That take part.
    """
    share = (devices - 1) / devices
    return size * {"all-reduce": 2 * share, "collective-permute": 1}.get(opcode, share)


@dataclass(frozen=True, slots=True)
class Work:
    """What one device does."""

    flops: float
    """Of matrix products."""

    memory_bytes: float
    """Read and written."""

    link_bytes: float
    """Sent to other devices."""

    num_transfers: int

    def __add__(self, other: "Work") -> "Work":
        """Returns both."""
        return Work(
            self.flops + other.flops,
            self.memory_bytes + other.memory_bytes,
            self.link_bytes + other.link_bytes,
            self.num_transfers + other.num_transfers,
        )

    def times(self, number: float) -> "Work":
        """Returns it so many times."""
        return Work(
            self.flops * number,
            self.memory_bytes * number,
            self.link_bytes * number,
            round(self.num_transfers * number),
        )


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least time of some work (Williams et al., "Roofline", 2009), in seconds."""

    compute: float
    memory: float
    link: float
    """Of the bytes that are sent."""

    latency: float
    """Of sending anything at all, once for each transfer."""

    @property
    def seconds(self) -> float:
        """Products and memory go on at once; what is sent between them waits for them."""
        return max(self.compute, self.memory) + self.link + self.latency

    @property
    def binds(self) -> str:
        """Which term is the largest: "compute", "memory", "link" or "latency"."""
        terms = {
            "compute": self.compute,
            "memory": self.memory,
            "link": self.link,
            "latency": self.latency,
        }
        return max(terms, key=lambda name: terms[name])


def roofline(work: Work, hardware: Hardware, dtype: str) -> Roofline:
    """Returns the least time of a device's work.

    Raises:
        ConfigError: The hardware has no rate for the element type.
    """
    return Roofline(
        compute=work.flops / hardware.rate(dtype),
        memory=work.memory_bytes / hardware.memory_bandwidth,
        link=work.link_bytes / hardware.link_bandwidth,
        latency=work.num_transfers * hardware.link_seconds,
    )


@dataclass(frozen=True, slots=True)
class EngineShape:
    """One engine: a model under a layout, without arrays and without devices."""

    config: ModelConfig
    engine: EngineConfig
    model: AbstractModel
    layout: Layout
    """Of this engine alone, whatever runs beside it."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the cache of one device."""
        specs = self.model.cache_specs
        return bytes_per_token_of_a_device(specs, self.engine.dtype, self.layout)

    @property
    def weights_read(self) -> int:
        """Bytes of weights that a step reads on each device; of tables, nothing."""
        return weights_read(self.model)

    def transfers(self) -> tuple[Transfer, ...]:
        """Returns the textbook's transfers of a step: what the layout's rules ask for, no more."""
        return tuple(_merged(list(_transfers(self))))

    def decode(self, rows: int, context: int) -> Work:
        """Returns the work of a step in which each row has one token.

        Args:
            rows: Sequences of this engine.
            context: Tokens of each, the new one included.
        """
        seen = sum(min(context, self._window(i)) for i in range(self.config.num_layers))
        work = self._step(tokens=rows, rows=rows)
        return work + self._attention(pairs=rows * seen, read=rows * seen, written=rows)

    def prefill(self, rows: int, context: int) -> Work:
        """Returns the work of computing prompts, over as many steps as it takes.

        Args:
            rows: Prompts of this engine.
            context: Tokens of each.
        """
        chunk = self.engine.max_num_batched_tokens
        steps = -(-rows * context // chunk)
        work = self._step(tokens=rows * context / steps, rows=rows / steps).times(steps)
        pairs = read = 0
        for i in range(self.config.num_layers):
            window = min(context, self._window(i))
            pairs += window * (window + 1) // 2 + (context - window) * window
            # Each chunk of a prompt reads what the chunks before it wrote, and itself.
            ends = [min(end, context) for end in range(chunk, context + chunk, chunk)]
            read += sum(min(end, window + chunk) for end in ends)
        return work + self._attention(pairs * rows, read * rows, written=rows * context)

    def _step(self, tokens: float, rows: float) -> Work:
        """Returns the work of a step, attention apart."""
        num_layers, num_head = self._multiplied()
        transfers = self.transfers()
        return Work(
            flops=2 * (tokens * num_layers + rows * num_head),
            memory_bytes=self.weights_read,
            link_bytes=sum(transfer.sent(tokens, rows) for transfer in transfers),
            num_transfers=sum(transfer.count for transfer in transfers),
        )

    def _attention(self, pairs: float, read: float, written: float) -> Work:
        """Returns the work of attention.

        Args:
            pairs: Of a query and a key that it sees, over all layers.
            read: Tokens whose keys and values are read, over all layers.
            written: Tokens whose keys and values are written, in every layer.
        """
        config = self.config
        heads = config.num_heads // self.layout.split("kv_heads")
        layer_bytes = self.token_bytes / config.num_layers
        flops = 4 * pairs * heads * config.head_dim  # scores, and values
        return Work(flops, read * layer_bytes + written * self.token_bytes, 0, 0)

    def _multiplied(self) -> tuple[int, int]:
        """Returns the numbers of weights that a token, and a sampled row, is multiplied with."""
        model, head = 0, 0
        for leaf in self.model.leaves:
            size = leaf.bytes_per_device() // leaf.shape.dtype.itemsize
            if is_head(self.model, leaf):
                head += size
            elif leaf.num_in and not is_table(self.model, leaf):
                model += size
        return model, head

    def _window(self, layer: int) -> int:
        window = self.config.window(layer)
        return self.engine.max_model_len if window is None else window


def is_head(model: AbstractModel, leaf: Leaf) -> bool:
    """Whether logits are products with it: the head, or the embedding where there is none."""
    untied = any(other.path == "head.weight" for other in model.leaves)
    return leaf.path == ("head.weight" if untied else "embed.weight")


def is_table(model: AbstractModel, leaf: Leaf) -> bool:
    """Whether a step reads a row a token of it, and no more."""
    return leaf.path in TABLES and not is_head(model, leaf)


def weights_read(model: AbstractModel) -> int:
    """Returns the bytes of weights that a step reads on each device; of tables, nothing."""
    return sum(leaf.bytes_per_device() for leaf in model.leaves if not is_table(model, leaf))


def _transfers(shape: EngineShape) -> Iterator[Transfer]:
    """Returns a transfer for each sum that the rules cut, one count each."""
    model, layout = shape.model, shape.layout
    size = jnp.dtype(shape.engine.dtype).itemsize
    paths = {leaf.path for leaf in model.leaves}
    vocab, tokens = layout.split("vocab"), set(layout.over("tokens"))
    for leaf in model.leaves:
        where = "layers" if leaf.path.startswith("layers.") else "model"
        out, axes = _cut(leaf)
        devices = math.prod(layout.mesh[axis] for axis in axes)
        if leaf.path == "embed.weight" and vocab > 1:
            # A device has zeros for the tokens of others.
            width = leaf.shape.shape[1] // layout.split("embed") * size
            yield from _sum("embedding", vocab, width, width, scattered=bool(tokens))
        if is_table(model, leaf):
            continue
        if is_head(model, leaf):
            if devices > 1:
                yield Transfer("all-reduce", "head", 1, devices, out * 4)
            if vocab > 1:  # of each device's best: a value and its token
                yield Transfer("all-gather", "sampler", 1, vocab, vocab * 8)
        elif leaf.path.endswith(NORMS) and devices > 1:
            has_mean = leaf.path.rpartition(".")[0] + ".bias" in paths
            yield Transfer("all-reduce", where, 2 if has_mean else 1, devices, 4)
        elif leaf.num_in and devices > 1:
            # A bias is added before the sum is rounded.
            biased = leaf.path.removesuffix("weight") + "bias" in paths
            summed = out * (4 if biased else size)
            yield from _sum(where, devices, summed, out * size, scattered=bool(tokens & axes))


def _sum(
    where: str, devices: int, summed: int, gathered: int, *, scattered: bool
) -> Iterator[Transfer]:
    """Returns a sum between devices: at once, or left split over tokens until it is read."""
    if scattered:
        yield Transfer("reduce-scatter", where, 1, devices, summed)
        yield Transfer("all-gather", where, 1, devices, gathered)
    else:
        yield Transfer("all-reduce", where, 1, devices, summed)


def _cut(leaf: Leaf) -> tuple[int, set[str]]:
    """Returns the numbers a device has of a map's result, and the mesh axes it is a sum over.

    A norm's result is one sum, over the mesh axes that split its factors.
    """
    sharding, shape = leaf.shape.sharding, leaf.shape.shape
    if not isinstance(sharding, NamedSharding):
        return math.prod(shape[: len(shape) - leaf.num_in]), set()
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    split = [(p,) if isinstance(p, str) else tuple(p or ()) for p in spec]
    num_out = len(shape) - leaf.num_in if leaf.num_in else 0
    sizes = sharding.shard_shape(shape)[:num_out]
    return math.prod(sizes), {axis for place in split[num_out:] for axis in place}


def _merged(transfers: Sequence[Transfer]) -> Iterator[Transfer]:
    """Returns equal transfers as one, with their counts added, in order of appearance."""
    counts: Counter[Transfer] = Counter()
    for transfer in transfers:
        counts[replace(transfer, count=0)] += transfer.count
    for transfer, count in counts.items():
        yield replace(transfer, count=count)
