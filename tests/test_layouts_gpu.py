"""Programs of every layout as XLA compiles them for eight GPUs that are not here.

Two layers of the sizes of Llama-3.1-8B and Qwen3-0.6B, and both at full depth; what is
marked `cross` has a step of its own in CI.
"""

import dataclasses
import functools
from collections import Counter

import pytest

from jaxllm.buckets import Buckets
from jaxllm.cache.memory import temp_bound
from jaxllm.config import EngineConfig
from jaxllm.flags import SamplingFlags
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.config import RopeConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.fitting import fit
from jaxllm.program_report import Collective, ProgramReport, report
from jaxllm.programs import ProgramBuilder, ProgramKey
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.gpu_topology import compile_only, gpu_devices, is_installed
from jaxllm.sharding.layouts import LAYOUTS, preset
from jaxllm.sharding.mesh import make_mesh
from tests.test_programs_gpu import CONFIG as LLAMA
from tests.test_programs_gpu import bytes_of_a_device

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not is_installed(), reason="needs the CUDA plugin of JAX: extra `aot`"),
]

QWEN3 = dataclasses.replace(
    LLAMA,
    family="qwen3",
    vocab_size=151936,
    embed_dim=1024,
    mlp_dim=3072,
    num_heads=16,
    rope=RopeConfig(theta=1e6),
    norm_eps=1e-6,
    qk_norm=True,
    tie_embeddings=True,
    max_position=40960,
)
MODELS = {"llama-3.1-8b": (LLAMA, 32), "qwen3-0.6b": (QWEN3, 28)}
"""Two layers of each, and how many there are."""

MIB = 1 << 20
NUM_PAGES = 4096
ENGINE = EngineConfig(
    max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=2048, dtype="bfloat16"
)
BUCKETS = Buckets(ENGINE)
DECODE = ProgramKey(BUCKETS.decode(16, 128))
MIXED = ProgramKey(BUCKETS.mixed(512, 8, 128, with_decodes=True))
CROSS = [pytest.mark.cross, pytest.mark.slow]
DIAGONAL = [*((name, "llama-3.1-8b") for name in LAYOUTS), ("tensor", "qwen3-0.6b")]
REST = [(name, model) for name in LAYOUTS for model in MODELS if (name, model) not in DIAGONAL]
PAIRS = pytest.mark.parametrize(
    ("name", "model"), [*DIAGONAL, *(pytest.param(*pair, marks=CROSS) for pair in REST)]
)
KEYS = pytest.mark.parametrize("key", [DECODE, MIXED], ids=str)

PAIR = {"reduce-scatter": 2, "all-gather": 2}
SUMS = {"all-reduce": 2}
# Of each branch: what it reads is summed over one half of the mesh and what it gives over the
# other; and a number a token for each norm.
TILES = {"all-reduce": 6}
IN_LAYERS = {
    "replicated": {},
    "data": {},
    "tensor": SUMS,
    "tensor_replicated_vocab": SUMS,
    "data_tensor": SUMS,
    "sequence": PAIR,
    "tensor_2d": TILES,
}
"""Collectives a layer."""


def sizes(name):
    """Engines and devices of each; the devices are eight."""
    return {"data": {"data": 8}, "data_tensor": {"data": 2, "tensor": 4}}.get(name, {"tensor": 8})


@functools.cache
def builder(name: str, model: str, num_layers: int = 2, num_kv_heads: int = 8) -> ProgramBuilder:
    layout = preset(name, **sizes(name)).replica()
    config = dataclasses.replace(MODELS[model][0], num_layers=num_layers, num_kv_heads=num_kv_heads)
    sharder = Sharder(layout, make_mesh(layout, gpu_devices("h200", layout.num_devices)))
    fitted = fit(config, Decoder, layout).config
    return ProgramBuilder(
        abstract_model(fitted, Decoder, ENGINE.dtype, sharder), ENGINE, sharder, NUM_PAGES
    )


@functools.cache
def compiled(key: ProgramKey, name: str, model: str = "llama-3.1-8b", **sizes) -> ProgramReport:
    return report(compile_only(builder(name, model, **sizes).lower(key)))


def layers_and_rest(found: ProgramReport) -> tuple[Counter, list[Collective]]:
    """Collectives by opcode in the layers, and those outside.

    XLA of jax 0.10 names no source of a reduce-scatter: it makes them of all-reduces. The first
    one is of the embedding, which is summed over the vocabulary.
    """
    inside, outside, has_scattered = Counter(), [], False
    for one in found.collectives:
        is_scatter = one.opcode == "reduce-scatter"
        if "_run_layer" in one.source or (is_scatter and has_scattered and not one.source):
            inside[one.opcode] += 1
        else:
            outside.append(one)
        has_scattered |= is_scatter
    return inside, outside


def times(counts: dict[str, int], num_layers: int) -> dict[str, int]:
    return {opcode: count * num_layers for opcode, count in counts.items()}


@KEYS
@PAIRS
def test_layers_have_the_collectives_of_their_layout_and_no_other(key, name, model):
    inside, _ = layers_and_rest(compiled(key, name, model))

    assert inside == times(IN_LAYERS[name], 2)


@KEYS
@PAIRS
def test_no_weight_cache_or_row_of_logits_is_gathered_or_copied(key, name, model):
    found, held = compiled(key, name, model), builder(name, model)
    stream = key.bucket.tokens * MODELS[model][0].embed_dim * 2

    # The largest thing that is sent is the residual stream; under two dimensions, what a
    # branch makes of it, and the logits of a device, are summed and not gathered.
    gathered = [c for c in found.collectives if c.opcode != "all-reduce"]
    assert all(array.num_bytes <= stream for c in gathered for array in c.arrays)
    assert found.rewritten(at_least=MIB) == []
    assert found.alias_bytes == bytes_of_a_device(held.state_shapes())
    layout = held.sharder.layout
    config = fit(MODELS[model][0], Decoder, layout).config
    assert found.temp_bytes <= temp_bound(config, ENGINE, [key.bucket], layout)


def test_the_bound_of_a_device_covers_a_long_context_and_is_no_waste():
    long = EngineConfig(
        max_model_len=131072, max_num_seqs=256, max_num_batched_tokens=8192, dtype="bfloat16"
    )
    held = dataclasses.replace(builder("tensor", "llama-3.1-8b"), engine=long)
    layout = held.sharder.layout
    bucket = Buckets(long).largest()[1]

    temp = report(compile_only(held.lower(ProgramKey(bucket)))).temp_bytes

    config = fit(LLAMA, Decoder, layout).config
    assert temp <= temp_bound(config, long, [bucket], layout) <= 5 * temp


EVERYTHING = SamplingFlags(
    sampled=True,
    min_p=True,
    top_k=True,
    top_p=True,
    penalties=True,
    edits=16,
    mask_words=-(-LLAMA.vocab_size // 32),
    logprobs=20,
    logprob_ids=16,
)


@pytest.mark.parametrize("name", ["tensor", "sequence", "tensor_2d"])
@pytest.mark.parametrize(
    "key",
    [
        ProgramKey(DECODE.bucket, 8, EVERYTHING),
        ProgramKey(MIXED.bucket, flags=dataclasses.replace(EVERYTHING, scored=20)),
    ],
    ids=["decode", "mixed"],
)
def test_sampling_gathers_a_few_numbers_a_row(key, name):
    found = compiled(key, name)
    _, outside = layers_and_rest(found)
    vocabulary = [a for c in outside for a in c.arrays if c.opcode != "all-reduce"]
    # What is found of the vocabulary is the best of each device, and its 20 likeliest.
    few = 20 * 8 * key.bucket.rows * 4

    shown = [a for a in vocabulary if a.num_bytes > few]
    stream = [(key.bucket.tokens, LLAMA.embed_dim)]
    if name == "sequence":  # its part of the embedding's sum
        stream.append((key.bucket.tokens // 8, LLAMA.embed_dim))
    assert [a for a in shown if a.shape not in stream] == []
    counts = bytes_of_a_device(builder(name, "llama-3.1-8b").counts_shape())
    state = bytes_of_a_device(builder(name, "llama-3.1-8b").state_shapes())
    assert found.alias_bytes == state + counts
    assert found.rewritten(at_least=MIB) == []


@KEYS
def test_devices_with_copies_of_kv_heads_send_no_more(key):
    found = compiled(key, "tensor", num_kv_heads=2)
    inside, _ = layers_and_rest(found)

    assert inside == times(SUMS, 2)
    # A device has one head of eight, and with two heads in the model one as well.
    assert found.alias_bytes == bytes_of_a_device(builder("tensor", "llama-3.1-8b").state_shapes())


@pytest.mark.cross
@pytest.mark.slow
@KEYS
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["tensor", "sequence"])
def test_the_same_at_full_depth(key, name, model):
    num_layers = MODELS[model][1]
    found = compiled(key, name, model, num_layers=num_layers)
    inside, _ = layers_and_rest(found)
    held = builder(name, model, num_layers=num_layers)

    assert inside == times(IN_LAYERS[name], num_layers)
    assert found.rewritten(at_least=MIB) == []
    assert found.alias_bytes == bytes_of_a_device(held.state_shapes())
