"""`temp_bound` against what XLA:CPU reports. For a GPU: tests/test_programs_gpu.py."""

import dataclasses
import functools

import pytest

from jaxllm.buckets import Bucket, Buckets
from jaxllm.cache.memory import FIXED_TEMP, temp_bound
from jaxllm.config import EngineConfig
from jaxllm.flags import SamplingFlags
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.config import ModelConfig, RopeConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.program_report import report
from jaxllm.programs import ProgramBuilder, ProgramKey
from tests.tiny import sharder

ENGINE = EngineConfig(max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=1024)
BUCKETS = Buckets(ENGINE)
ONE_ROW = ProgramKey(Bucket(1, 1, 8, decode_rows=1, query_blocks=0))
KEYS = [
    ProgramKey(BUCKETS.decode(2, 8)),
    ProgramKey(BUCKETS.decode(64, 256), steps=8),
    ProgramKey(BUCKETS.decode(64, 8), flags=SamplingFlags(sampled=True, logprobs=20)),
    ProgramKey(
        BUCKETS.decode(64, 8),
        flags=SamplingFlags(
            sampled=True, min_p=True, top_k=True, top_p=True, penalties=True, edits=16
        ),
    ),
    ProgramKey(BUCKETS.mixed(1024, 64, 256, with_decodes=True)),
    ProgramKey(BUCKETS.mixed(1024, 64, 256, with_decodes=True), flags=SamplingFlags(scored=5)),
]


def config(**sizes) -> ModelConfig:
    fixed = {
        "family": "llama",
        "num_layers": 2,
        "max_position": 4096,
        "norm_eps": 1e-5,
        "activation": "silu",
        "rope": RopeConfig(),
        "tie_embeddings": False,
    }
    return ModelConfig(**{**fixed, **sizes})


CONFIGS = {
    "tiny": config(
        vocab_size=101, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8
    ),
    "grouped": config(
        vocab_size=32000, embed_dim=512, mlp_dim=1536, num_heads=8, num_kv_heads=2, head_dim=64
    ),
    "deep, every head its own": config(
        vocab_size=1000,
        embed_dim=512,
        mlp_dim=2048,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
    ),
    "one KV head, biases, norms": config(
        vocab_size=1000,
        embed_dim=64,
        mlp_dim=256,
        num_heads=16,
        num_kv_heads=1,
        head_dim=128,
        qkv_bias=True,
        qk_norm=True,
        tie_embeddings=True,
    ),
}


@functools.cache
def builder(name: str) -> ProgramBuilder:
    on_cpu = sharder()
    model = abstract_model(CONFIGS[name], Decoder, ENGINE.dtype, on_cpu)
    return ProgramBuilder(model, ENGINE, on_cpu, num_pages=600)


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bound_covers_the_temporaries(name, key):
    found = report(builder(name).lower(key).compile())

    # What is fixed is for GPU libraries; a CPU does without.
    assert found.temp_bytes <= temp_bound(CONFIGS[name], ENGINE, [key.bucket]) - FIXED_TEMP


@pytest.mark.parametrize("key", [ONE_ROW, *KEYS[:2]], ids=str)
def test_neither_a_weight_nor_the_cache_is_copied(key):
    found = report(builder("grouped").lower(key).compile())

    assert found.rewritten(at_least=1 << 16) == []
    assert found.temp_bytes <= temp_bound(CONFIGS["grouped"], ENGINE, [key.bucket]) - FIXED_TEMP


def test_a_cache_of_16_bit_floats_is_written_in_place():
    # XLA:CPU has no scatter of them: as floats, the whole cache became float32 and back.
    engine = dataclasses.replace(ENGINE, dtype="bfloat16")
    on_cpu = sharder()
    model = abstract_model(CONFIGS["grouped"], Decoder, engine.dtype, on_cpu)
    key = KEYS[0]

    found = report(ProgramBuilder(model, engine, on_cpu, num_pages=600).lower(key).compile())

    assert found.rewritten(at_least=1 << 16) == []
    assert found.temp_bytes <= temp_bound(CONFIGS["grouped"], engine, [key.bucket]) - FIXED_TEMP
