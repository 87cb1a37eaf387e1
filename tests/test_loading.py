"""What is decided before weights are read: lengths, element types, dummy weights."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm import LLM, ConfigError, SamplingParams, inspect, loading, plan, sweep
from jaxllm.buckets import Buckets
from jaxllm.devices import memory_in_use, memory_limit, resolve_dtype
from jaxllm.loading import (
    Wishes,
    derived_length,
    engine_config,
    load_params,
    max_model_len,
    plan_load,
)
from jaxllm.modeling.abstract import abstract_model, init_params
from jaxllm.modeling.config import RopeConfig
from jaxllm.modeling.families import llama
from jaxllm.native import build
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh
from tests.arrays import no_new_arrays
from tests.tiny import sharder, tiny_checkpoint, tiny_model

CPU = jax.devices()[0]
AMPERE = SimpleNamespace(platform="gpu", device_kind="A100", compute_capability="8.0")
TURING = SimpleNamespace(platform="gpu", device_kind="T4", compute_capability="7.5")
SMALL = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 16,
    "use_tqdm_on_load": False,
}


@pytest.fixture(scope="module")
def config():
    return tiny_model()[0]


@pytest.fixture
def lines():
    """The lines that the library logs."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("jaxllm")
    former = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(former)


def stated(**fields):
    return SimpleNamespace(**{"max_position_embeddings": 128, **fields})


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("max_position_embeddings", 128)),
        ({"seq_length": 64}, ("seq_length", 64)),
        ({"max_seq_len": 256}, ("max_position_embeddings", 128)),
        ({"max_seq_length": 100, "seq_len": 50}, ("seq_len", 50)),
        ({"seq_length": None, "max_sequence_length": "64"}, ("max_position_embeddings", 128)),
        ({"model_max_length": 4096, "seq_length": 64}, ("model_max_length", 4096)),
        ({"model_max_length": None}, ("max_position_embeddings", 128)),
        ({"seq_length": 0}, ("max_position_embeddings", 128)),
    ],
)
def test_least_of_the_keys_that_bound_the_length_wins(config, fields, expected):
    assert derived_length(config, stated(**fields)) == expected


def test_scaled_rotation_scales_every_key(config):
    config = replace(config, max_position=512)  # 128 positions by a factor of 4

    assert derived_length(config, stated(seq_length=64)) == ("seq_length", 256)


def test_learned_positions_bound_the_length_whatever_is_stated(config):
    config = replace(config, position_offset=0)

    assert derived_length(config, stated(model_max_length=4096)) == (
        "max_position_embeddings",
        128,
    )


@pytest.mark.parametrize("asked", [None, -1, "auto"])
def test_longrope_begins_with_its_original_length(config, asked):
    rope = RopeConfig(kind="longrope", original_max_position=32)
    config = replace(config, rope=rope)

    assert max_model_len(asked, config, stated()) == 32
    assert max_model_len(128, config, stated()) == 128


def test_key_that_bounds_the_length_is_named_where_it_is_exceeded(config):
    with pytest.raises(ConfigError, match=r"max_model_len \(65\) is greater .*\(seq_length=64\)"):
        max_model_len(65, config, stated(seq_length=64))


@pytest.mark.parametrize("prefix", ["JAXLLM", "VLLM"])
def test_longer_than_derived_is_allowed_with_a_warning(checkpoints, monkeypatch, lines, prefix):
    monkeypatch.setenv(f"{prefix}_ALLOW_LONG_MAX_MODEL_LEN", "1")

    with LLM(checkpoints(), **SMALL, max_model_len=160) as llm:
        output = llm.generate([[1] * 140], SamplingParams(temperature=0, max_tokens=4))[0]

    assert len(output.outputs[0].token_ids) == 4
    assert any("max_model_len (160) is greater" in line for line in lines)


def test_no_setting_allows_positions_that_no_table_has(checkpoints, monkeypatch):
    monkeypatch.setenv("JAXLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")

    with pytest.raises(ConfigError, match=r"Use 128 or less: the model has learned positions"):
        LLM(checkpoints("gpt2"), **SMALL, max_model_len=129)


@pytest.mark.filterwarnings("error")
def test_keys_that_bound_the_length_are_not_called_ignored(tmp_path):
    folder = tiny_checkpoint(tmp_path, max_seq_len=48)

    assert plan_load(folder, Wishes(), sharder(), "auto").engine.max_model_len == 48


@pytest.mark.parametrize(("asked", "cache_bytes"), [(64, None), (None, None), ("auto", 20_000)])
def test_rotation_is_built_for_the_final_length(tmp_path, asked, cache_bytes):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    folder = tiny_checkpoint(tmp_path, rope_parameters=rope)
    wishes = Wishes(max_model_len=asked, cache_bytes=cache_bytes, page_size=16)

    plan = plan_load(folder, wishes, sharder(), "auto")

    length = plan.engine.max_model_len
    assert length == {64: 64, None: 512, "auto": 48}[asked]
    assert plan.config.rope.length == length
    assert plan.model.merge(load_params(plan, seed=0, show_progress=False)).config == plan.config


# ---------------------------------------------------------------- element types


@pytest.mark.parametrize(
    ("asked", "stored", "device", "overflows", "expected"),
    [
        ("auto", "bfloat16", CPU, False, "float32"),
        ("auto", "float16", CPU, True, "float32"),
        ("auto", "bfloat16", AMPERE, False, "bfloat16"),
        ("auto", "float16", AMPERE, False, "float16"),
        ("auto", "float32", AMPERE, False, "bfloat16"),
        ("auto", "float16", AMPERE, True, "bfloat16"),
        ("auto", "bfloat16", TURING, False, "float16"),
        ("auto", "bfloat16", TURING, True, "float32"),
        ("half", "bfloat16", TURING, False, "float16"),
        ("float", "bfloat16", TURING, True, "float32"),
        ("bfloat16", "float16", CPU, True, "bfloat16"),
    ],
)
def test_dtype_follows_caller_checkpoint_card_and_model(asked, stored, device, overflows, expected):
    assert resolve_dtype(asked, stored, device, overflows=overflows) == expected


@pytest.mark.parametrize(
    ("asked", "device", "overflows", "words"),
    [
        ("bfloat16", TURING, False, "compute capability 8.0, and T4 has 7.5. Use dtype='half'"),
        ("bfloat16", TURING, True, "Use dtype='float32'"),
        ("half", AMPERE, True, "larger than the 65504.*Use dtype='bfloat16'"),
        ("float16", TURING, True, "Use dtype='float32'"),
        ("float8", CPU, False, "Unknown dtype 'float8'"),
    ],
)
def test_dtype_that_cannot_be_names_one_that_can(asked, device, overflows, words):
    with pytest.raises(ConfigError, match=words):
        resolve_dtype(asked, "bfloat16", device, overflows=overflows)


@pytest.mark.parametrize("page_size", [None, 16, 256])
@pytest.mark.parametrize(("platform", "num_widths"), [("cpu", 1), ("gpu", 6)])
def test_programs_by_length_are_only_for_attention_that_pays_for_it(
    platform, num_widths, page_size
):
    wishes, device = Wishes(page_size=page_size), SimpleNamespace(platform=platform)
    engine = engine_config(wishes, 4096, "bfloat16", device, 1)
    if platform == "gpu" and page_size == 256:
        num_widths = 5  # the narrowest has one page, of twice as many tokens

    assert len(Buckets(engine).widths) == num_widths


@pytest.mark.parametrize(("platform", "size"), [("cpu", 64), ("gpu", 16)])
def test_pages_are_of_the_platform_unless_they_are_asked_for(platform, size):
    device = SimpleNamespace(platform=platform)

    assert engine_config(Wishes(), 4096, "float32", device, 2).page_size == size
    assert engine_config(Wishes(page_size=8), 4096, "float32", device, 1).page_size == 8
    with pytest.raises(ConfigError, match="block_size=0 is not a power of two"):
        engine_config(Wishes(page_size=0), 4096, "float32", device, 1)


def test_pages_are_shorter_where_attention_will_be_a_compiled_kernel(monkeypatch):
    def page_size(platform="cpu", devices=1, dtype="bfloat16"):
        device = SimpleNamespace(platform=platform)
        return engine_config(Wishes(), 4096, dtype, device, devices).page_size

    monkeypatch.setattr(build, "compiler", lambda: ("c++",))
    assert page_size() == page_size(dtype="float32") == 32
    assert (page_size("gpu"), page_size(devices=2)) == (16, 64)
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert page_size() == 64
    monkeypatch.undo()
    monkeypatch.setenv(build.SWITCH, "0")
    assert page_size() == 64


def test_family_that_overflows_float16_is_refused_before_it_is_loaded(checkpoints):
    folder, message = checkpoints("gemma2"), "dtype='half' is not for this model"

    with no_new_arrays(), pytest.raises(ConfigError, match=message):
        LLM(folder, **SMALL, dtype="half")


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False), ("auto", 0)])
def test_cast_that_was_asked_for_is_one_line(checkpoints, lines, dtype, said, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")  # a kernel's first compilation has lines of its own
    plan_load(checkpoints(), Wishes(dtype=dtype), sharder(), "auto")

    assert lines == ["Casting float32 to bfloat16"] * bool(said)


# ---------------------------------------------------------------- memory


def test_share_of_a_card_is_a_share_of_what_the_allocator_began_with(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    stats = {"bytes_limit": 1000, "bytes_in_use": 300}
    card = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

    assert memory_limit(card, 0.25) == 500
    assert memory_limit(card, 0.9) == 1000  # it has no more
    assert memory_in_use(card) == 300
    assert memory_in_use(CPU) == 0


def test_weights_beyond_all_memory_are_refused_whatever_the_cache_is_given(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    overrides = {"vocab_size": 2**31 - 1, "hidden_size": 4096}

    with pytest.raises(ConfigError, match=r"does not fit: its weights take .* GiB in float32"):
        LLM(folder, **SMALL, load_format="dummy", hf_overrides=overrides)


# ---------------------------------------------------------------- weights


def test_bar_and_line_state_the_speed_of_reading(checkpoints, lines, capsys):
    plan = plan_load(checkpoints(), Wishes(), sharder(), "auto")

    load_params(plan, seed=0, show_progress=True)

    assert re.search(r"Loading weights: .*B/s", capsys.readouterr().err)
    assert re.search(r"took \d+\.\d\d GiB memory and \d+\.\d\d seconds \(.* GB/s\)", lines[-1])


@pytest.fixture(scope="module")
def model():
    config, _, _ = tiny_model(num_hidden_layers=3, attention_bias=True)
    return abstract_model(config, llama.build, "float32", sharder())


def by_path(model, params):
    return {leaf.path: np.asarray(x) for leaf, x in zip(model.leaves, params, strict=True)}


def test_dummy_weights_depend_on_the_seed_alone(model):
    first, again, other = (by_path(model, init_params(model, seed)) for seed in (1, 1, 2))

    for path, value in first.items():
        np.testing.assert_array_equal(value, again[path])
        assert value.any() == ("weight" in path or "scale" in path)
        assert np.array_equal(value, other[path]) == (not path.endswith("weight"))


def test_dummy_weights_differ_from_layer_to_layer_and_keep_the_size_of_activations(model):
    params = by_path(model, init_params(model, 0))
    down = [params[f"layers.{i}.mlp.down.weight"] for i in range(3)]

    assert not np.array_equal(down[0], down[1])
    assert not np.array_equal(down[1], down[2])
    np.testing.assert_allclose(np.std(down), 48**-0.5, rtol=0.05)
    assert (params["layers.2.attn_norm.scale"] == 1).all()
    assert (params["layers.2.attn.qkv.bias"] == 0).all()


def test_dummy_weights_do_not_depend_on_the_devices():
    layout = preset("tensor", tensor=2)
    split = Sharder(layout, make_mesh(layout))
    config, whole, _ = tiny_model(vocab_size=104)
    parts = abstract_model(config, llama.build, "float32", split)

    for one, two in zip(init_params(whole, 5), init_params(parts, 5), strict=True):
        np.testing.assert_array_equal(one, two)
        assert len(two.sharding.device_set) == 2


def test_a_program_is_compiled_for_each_kind_of_parameter_and_not_for_each(model):
    compiled = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        init_params(model, 3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

    kinds = {(leaf.shape.shape, leaf.num_in, leaf.is_scale) for leaf in model.leaves}
    assert len(kinds) <= len(compiled) <= len(kinds) + 3  # and those that make the key
    assert len(kinds) < len(model.leaves) / 2


def test_dummy_load_needs_no_weights(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    answers = []

    for seed in (1, 1, 2):
        with LLM(folder, **SMALL, load_format="dummy", seed=seed) as llm:
            output = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8))[0]
            answers.append(output.outputs[0].token_ids)

    assert answers[0] == answers[1] != answers[2]


def test_a_share_of_the_machine_is_no_reason_for_pages_that_nobody_can_use(checkpoints):
    wishes = Wishes(memory_fraction=0.9, max_num_seqs=4, page_size=4)

    memory = plan_load(checkpoints(), wishes, sharder(), "auto").memory

    # 4 sequences of 128 tokens, a page of room each.
    assert memory.num_tokens <= 4 * 132


LOOKS = {
    "plan": lambda model: plan(model),
    "sweep": lambda model: sweep(model, level="measure", hardware="cpu", use_tqdm=False),
    "inspect": lambda model: inspect(model, "decode"),
    "LLM": lambda model: LLM(model, load_format="dummy"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_memory_is_asked_for_before_the_devices_are_looked_at(monkeypatch, checkpoints, name):
    model, asked = checkpoints(), []

    def devices_of(*_):
        assert asked == [0.92]
        raise StopIteration

    monkeypatch.setattr(loading, "reserve_memory", asked.append)
    monkeypatch.setattr(jax, "devices", devices_of)

    with pytest.raises(StopIteration):
        LOOKS[name](model)
