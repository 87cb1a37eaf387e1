"""Every family's decode step, as XLA compiles it for a GPU that is not here.

Two layers of middling size; `tests/test_programs_gpu.py` looks closer at one family.
"""

import functools

import pytest

from jaxllm.buckets import Buckets
from jaxllm.cache.memory import temp_bound
from jaxllm.config import EngineConfig
from jaxllm.modeling import registry
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.registry import ARCHITECTURES
from jaxllm.program_report import report
from jaxllm.programs import ProgramBuilder, ProgramKey
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.gpu_topology import compile_only, gpu_devices, is_installed
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh
from tests.tiny import CONFIGS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not is_installed(), reason="needs the CUDA plugin of JAX: extra `aot`"),
]

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = {
    **{name: (name, {}) for name in sorted(set(ARCHITECTURES.values()))},
    "opt post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 512}),
    "gpt_neox parallel": ("gpt_neox", {"use_parallel_residual": True}),
}
SUMS = {"gpt_neox parallel": 1}
"""All-reduces a layer where they are not 2."""

ENGINE = EngineConfig(
    max_model_len=2048, max_num_seqs=16, max_num_batched_tokens=512, dtype="bfloat16"
)
KEY = ProgramKey(Buckets(ENGINE).decode(16, 128))
MIB = 1 << 20


@functools.cache
def compiled(case, num_devices=1):
    """What the compiler made of a decode step, and the model's config."""
    family, changes = CASES[case]
    make, fixed = CONFIGS[family]
    head = {"head_dim": 128} if "head_dim" in fixed else {}
    hf = make(**{**fixed, **SIZES, **head, **changes})
    _, module = registry.family_of(hf)
    config = registry.model_config(hf, module)
    layout = preset("replicated") if num_devices == 1 else preset("tensor", tensor=num_devices)
    sharder = Sharder(layout, make_mesh(layout, gpu_devices("h200", num_devices)))
    model = abstract_model(config, module.build, ENGINE.dtype, sharder)
    builder = ProgramBuilder(model, ENGINE, sharder, 1024)
    return report(compile_only(builder.lower(KEY))), config


@pytest.mark.parametrize("case", CASES)
def test_neither_a_weight_nor_the_cache_is_copied(case):
    found, config = compiled(case)

    assert found.rewritten(at_least=MIB) == []
    assert found.temp_bytes <= temp_bound(config, ENGINE, [KEY.bucket])


@pytest.mark.parametrize("case", CASES)
def test_layers_split_over_devices_sum_once_for_each_branch(case):
    found, config = compiled(case, num_devices=4)
    inside = [c for c in found.collectives if "_run_layer" in c.source]
    # XLA names no source of those it has merged; the embedding's is not of a layer.
    sums = [c for c in found.collectives if c.opcode == "all-reduce" and "_take" not in c.source]

    assert {c.opcode for c in inside} <= {"all-reduce"}
    assert len(sums) == SUMS.get(case, 2) * config.num_layers
