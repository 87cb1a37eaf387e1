"""The engine's programs as XLA compiles them for GPUs that are not here.

Two layers of the size of Llama-3.1-8B; more change neither temporaries nor what
is done a layer. What is checked is structure, which no autotuning changes.
"""

import dataclasses
import functools
import math

import jax
import pytest

from jaxllm.buckets import Buckets
from jaxllm.cache.memory import temp_bound
from jaxllm.config import EngineConfig
from jaxllm.flags import SamplingFlags
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.config import ModelConfig, RopeConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.program_report import ProgramReport, report
from jaxllm.programs import ProgramBuilder, ProgramKey
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.gpu_topology import compile_only, gpu_devices, is_installed
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not is_installed(), reason="needs the CUDA plugin of JAX: extra `aot`"),
]

MIB = 1 << 20
NUM_PAGES = 4096
CONFIG = ModelConfig(
    family="llama",
    vocab_size=128256,
    embed_dim=4096,
    mlp_dim=14336,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=131072,
    norm_eps=1e-5,
    activation="silu",
    rope=RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_position=8192),
    tie_embeddings=False,
)
ENGINE = EngineConfig(
    max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=2048, dtype="bfloat16"
)
BUCKETS = Buckets(ENGINE)

DECODE = ProgramKey(BUCKETS.decode(16, 128))
DECODE_8 = ProgramKey(BUCKETS.decode(16, 128), steps=8)
# So wide that rows are attended to in groups.
WIDE_DECODE = ProgramKey(BUCKETS.decode(64, 512))
MIXED = ProgramKey(BUCKETS.mixed(512, 8, 128, with_decodes=True))
EVERY = pytest.mark.parametrize("key", [DECODE, DECODE_8, WIDE_DECODE, MIXED], ids=str)

CUBLAS = (("xla_gpu_enable_triton_gemm", False),)
"""Without a card nothing is timed and Triton multiplies; on one, cuBLASLt often wins."""


@functools.cache
def builder(
    num_devices: int = 1, num_layers: int = CONFIG.num_layers, engine: EngineConfig = ENGINE
) -> ProgramBuilder:
    layout = preset("replicated") if num_devices == 1 else preset("tensor", tensor=num_devices)
    sharder = Sharder(layout, make_mesh(layout, gpu_devices("h200", num_devices)))
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    model = abstract_model(config, Decoder, engine.dtype, sharder)
    return ProgramBuilder(model, engine, sharder, NUM_PAGES)


@functools.cache
def compiled(
    key: ProgramKey,
    *,
    num_devices: int = 1,
    num_layers: int = CONFIG.num_layers,
    engine: EngineConfig = ENGINE,
    options: tuple = (),
) -> ProgramReport:
    lowered = builder(num_devices, num_layers, engine).lower(key)
    return report(compile_only(lowered, dict(options)))


def bytes_of_a_device(tree) -> int:
    """What each device holds of a tree of shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@EVERY
def test_the_state_is_updated_in_its_own_memory(key):
    assert compiled(key).alias_bytes == bytes_of_a_device(builder().state_shapes())


@EVERY
def test_neither_a_weight_nor_the_cache_is_copied_in_any_form(key):
    found = compiled(key)

    assert found.rewritten(at_least=MIB) == []
    assert found.moves(at_least=8 * MIB) == []


@EVERY
def test_the_bound_covers_the_temporaries(key):
    assert compiled(key).temp_bytes <= temp_bound(CONFIG, ENGINE, [key.bucket])


def test_the_bound_for_the_longest_context_covers_it_and_is_no_waste():
    long = EngineConfig(
        max_model_len=131072, max_num_seqs=256, max_num_batched_tokens=8192, dtype="bfloat16"
    )
    bucket = Buckets(long).largest()[1]

    temp = compiled(ProgramKey(bucket), engine=long).temp_bytes

    assert temp <= temp_bound(CONFIG, long, [bucket]) <= 5 * temp


@pytest.mark.parametrize("key", [DECODE, MIXED], ids=str)
def test_cublas_neither_copies_nor_needs_more_than_the_bound(key):
    found = compiled(key, options=CUBLAS)

    assert found.rewritten(at_least=MIB) == []
    assert found.temp_bytes <= temp_bound(CONFIG, ENGINE, [key.bucket])


@EVERY
def test_the_compiler_knows_how_often_each_loop_runs(key):
    assert all(loop.trip_count for loop in compiled(key).loops)


def test_decode_loops_once_over_its_steps():
    one, eight = compiled(DECODE), compiled(DECODE_8)

    assert [loop.trip_count for loop in one.loops] == []
    assert [loop.trip_count for loop in eight.loops] == [8]
    assert eight.temp_bytes <= one.temp_bytes + MIB


def test_temporaries_do_not_grow_with_the_layers():
    # They would with a result that begins as zeros: XLA makes those of all layers at once.
    long = ProgramKey(BUCKETS.mixed(2048, 8, 8, with_decodes=False))

    two, four = (compiled(long, num_layers=n) for n in (2, 4))

    assert four.temp_bytes <= two.temp_bytes + MIB


CHOICES = {
    "sampled": SamplingFlags(sampled=True),
    "logprobs": SamplingFlags(logprobs=0),
    "truncated": SamplingFlags(sampled=True, min_p=True, top_k=True, top_p=True, logprobs=5),
    "ruled": SamplingFlags(edits=16, mask_words=-(-CONFIG.vocab_size // 32), logprob_ids=16),
    "penalized": SamplingFlags(penalties=True),
}


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_decode_lowers(choice, steps):
    flags = CHOICES[choice]
    logprobs = flags.logprobs

    _, outputs = builder().lower(ProgramKey(DECODE.bucket, steps, flags)).out_info

    assert outputs.tokens.shape == (16, steps)
    assert (outputs.logprobs is None) == (logprobs is None)
    assert logprobs is None or outputs.logprobs.top.shape == (16, steps, logprobs)


def test_the_mixed_program_scores_given_tokens():
    flags = SamplingFlags(sampled=True, logprobs=5, scored=1)

    _, outputs = builder().lower(ProgramKey(MIXED.bucket, flags=flags)).out_info

    assert outputs.tokens.shape == (8, 1)
    assert outputs.logprobs.top.shape == (8, 1, 5)
    assert outputs.scores.top.shape == (512, 1)


@pytest.mark.parametrize("steps", [1, 8])
def test_token_counts_are_aliased_and_cost_nothing_where_no_row_has_penalties(steps):
    plain = compiled(ProgramKey(DECODE.bucket, steps))
    counting = compiled(ProgramKey(DECODE.bucket, steps, SamplingFlags(penalties=True)))
    counts = bytes_of_a_device(builder().counts_shape())

    assert counting.alias_bytes == plain.alias_bytes + counts
    assert counting.rewritten(at_least=MIB) == []
    assert counting.temp_bytes <= temp_bound(CONFIG, ENGINE, [DECODE.bucket])


def test_the_bound_covers_every_operation_on_logits_at_once():
    flags = SamplingFlags(
        sampled=True,
        min_p=True,
        top_k=True,
        top_p=True,
        penalties=True,
        edits=16,
        mask_words=-(-CONFIG.vocab_size // 32),
        logprobs=20,
    )
    bucket = BUCKETS.decode(64, 8)

    assert compiled(ProgramKey(bucket, flags=flags)).temp_bytes <= temp_bound(
        CONFIG, ENGINE, [bucket]
    )


@pytest.mark.parametrize("key", [DECODE, DECODE_8, MIXED], ids=str)
def test_tensor_parallel_layers_reduce_twice_and_gather_nothing(key):
    found = compiled(key, num_devices=8)
    outside = [c for c in found.collectives if "_run_layer" not in c.source]

    assert found.count("all-reduce", within="_run_layer") == 2 * CONFIG.num_layers
    # The embedding is a sum of what each device has of the vocabulary; a greedy token is
    # the best of each device's best.
    assert [c.opcode for c in outside] == ["all-reduce", "all-gather"]
    assert outside[1].num_bytes < 4096
    assert found.rewritten(at_least=MIB) == []


def test_tensor_parallel_devices_hold_a_share_of_weights_and_cache():
    found = compiled(DECODE, num_devices=8)
    held = builder(8)

    assert found.alias_bytes == bytes_of_a_device(held.state_shapes())
    assert found.argument_bytes < bytes_of_a_device(held.model.shapes) * 1.01 + found.alias_bytes


def test_layers_of_a_tensor_parallel_model_send_16_bits_a_number():
    reduced = [c for c in compiled(MIXED, num_devices=8).collectives if c.opcode == "all-reduce"]

    assert {array.dtype for c in reduced for array in c.arrays} == {"bf16"}
