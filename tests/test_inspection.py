"""`inspect` on this machine. For GPUs: tests/test_inspection_gpu.py."""

import copy
import dataclasses
import json

import pytest

import jaxllm
from jaxllm import LLM, ConfigError, inspect, loading
from jaxllm.config import EngineConfig
from jaxllm.inspection import Wanted
from jaxllm.traffic import Access

ENGINE = EngineConfig(max_model_len=512, max_num_seqs=64, max_num_batched_tokens=1024)


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llama")


@pytest.fixture(scope="module")
def decode(folder):
    return inspect(folder, "decode", batch=8, steps=8, context=64)


@pytest.fixture(scope="module")
def mixed(folder):
    return inspect(folder, "mixed", tokens=16, batch=2, context=64)


def test_a_decode_program_is_told_in_figures(decode):
    config = {"embed": 101 * 32, "head": 101 * 32, "norm": 32}
    layer = 32 * (4 * 8 + 2 * 2 * 8) + 4 * 8 * 32 + 3 * 32 * 48 + 2 * 32
    token = 2 * 2 * 2 * 8 * 4  # K and V, two layers, two heads of 8

    assert decode.alias_bytes == decode.state_bytes
    assert decode.copies == ()
    assert decode.ideal.weights == 4 * (config["head"] + config["norm"] + 2 * layer)
    assert decode.ideal.cache_read == 8 * 128 * token  # the narrowest page table: 8 pages of 16
    assert decode.ideal.cache_written == 8 * token
    assert decode.cache_written == 8 * token
    assert decode.temp_bytes <= decode.temp_bound
    assert [loop.trip_count for loop in decode.report.loops][:1] == [8]


def test_a_step_of_many_reads_no_more_than_one_alone(folder, decode):
    one = inspect(folder, "decode", batch=8, context=64)

    assert decode.weights_read <= 1.1 * one.weights_read
    assert one.ideal == decode.ideal


def test_parts_and_whole_agree(decode):
    parts = decode.weights_read + decode.cache_read + decode.cache_written + decode.other_bytes

    assert parts == decode.bytes_accessed
    assert decode.kernels_per_layer * decode.num_layers <= decode.kernels_per_step
    assert decode.kernels_per_layer >= 4  # at least its products


def test_a_mixed_program_writes_the_cache_of_its_tokens(mixed):
    token = 2 * 2 * 2 * 8 * 4

    assert (mixed.key.bucket.tokens, mixed.key.bucket.decode_rows > 0) == (16, True)
    assert mixed.cache_written == 16 * token
    assert mixed.alias_bytes == mixed.state_bytes


def test_a_prefill_has_no_rows_that_decode(folder):
    assert inspect(folder, "prefill", tokens=16, context=64).key.bucket.decode_rows == 0


def test_its_text_is_a_table_without_the_program(decode):
    text = repr(decode)

    assert text.splitlines()[0].startswith("program")
    assert "decode[8] x8" in text
    assert "all of the cache and state" in text
    assert "none of weights or cache" in text
    assert "ENTRY" in decode.hlo
    assert "ENTRY" not in text
    assert all(len(line) < 140 for line in text.splitlines())


def test_loops_of_unknown_length_are_said_to_count_once(folder, monkeypatch):
    # In plain XLA on CPU a loop over query blocks ends with the last one in use.
    monkeypatch.setenv("JAXLLM_NATIVE", "0")
    mixed = inspect(folder, "mixed", tokens=16, batch=2, context=64)

    assert "of unknown length (counted once)" in mixed.rows["loops"]


def test_plain_xla_and_the_compiled_kernel_move_the_same_cache(folder, decode, monkeypatch):
    monkeypatch.setenv("JAXLLM_NATIVE", "0")
    monkeypatch.setitem(loading.DEFAULTS["cpu"], "page_size", loading.COMPILED_PAGE_SIZE)
    plain = inspect(folder, "decode", batch=8, steps=8, context=64)

    assert decode.cache_read == decode.ideal.cache_read
    assert decode.cache_written == plain.cache_written
    assert plain.alias_bytes == decode.alias_bytes == decode.state_bytes
    assert decode.kernels_per_layer < plain.kernels_per_layer


def test_a_notebook_shows_the_same_escaped(decode):
    named = dataclasses.replace(decode, model="<b>mine</b>")

    assert named._repr_html_().startswith("<table>")
    assert "&lt;b&gt;mine&lt;/b&gt;" in named._repr_html_()
    assert "<b>mine" not in named._repr_html_()


def test_copies_and_a_state_that_is_not_aliased_are_said(decode):
    big = dataclasses.replace(
        decode.report.writes[0],
        array=dataclasses.replace(decode.report.writes[0].array, dtype="f32", shape=(512, 512)),
        rewrites="params[3]",
        opcode="transpose",
    )
    report = dataclasses.replace(decode.report, alias_bytes=0, writes=(big,))
    bad = dataclasses.replace(decode, report=report)

    assert bad.rows["copies"] == "f32[512,512] of params[3] by transpose"
    assert bad.rows["aliased"] == "0 B, NOT all of the cache and state"


def test_shares_are_of_the_ideal(decode):
    read = Access("params[0]", 8 * 2 * decode.ideal.weights, 0)
    report = dataclasses.replace(decode.report, accesses=(read,))

    assert "2.000x the ideal" in dataclasses.replace(decode, report=report).rows["weights read"]


def test_a_config_alone_will_do(folder, decode):
    config = json.loads((folder / "config.json").read_text())
    before = copy.deepcopy(config)

    found = inspect(config, "decode", batch=8, steps=8, context=64)

    assert found.ideal == decode.ideal
    assert "LlamaForCausalLM" in found.rows["program"]
    assert config == before


def test_several_devices_share_weights_and_cache(checkpoints, decode):
    even = checkpoints("llama", vocab_size=104)

    shared = inspect(even, "decode", batch=8, steps=8, context=64, devices=2)

    assert shared.ideal.cache_read * 2 == decode.ideal.cache_read
    assert shared.alias_bytes == shared.state_bytes
    assert "2 x cpu" in shared.rows["program"]
    assert "all-reduce" in shared.rows["collectives"]


def test_a_running_model_is_inspected_as_it_runs(folder):
    sizes = {"max_model_len": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 40}
    with LLM(folder, skip_tokenizer_init=True, **sizes) as llm:
        found = llm.inspect("decode", batch=3)
        programs = dict(llm.stats()["compile_seconds"])

        assert found.key.bucket.rows == 4
        assert f"{found.state_bytes / 1e3:,.2f} kB" in found.rows["aliased"]
        assert programs == llm.stats()["compile_seconds"] == {}
        with pytest.raises(ConfigError, match="batch=17 is more than max_num_seqs=16"):
            llm.inspect("decode", batch=17)
    with pytest.raises(jaxllm.JaxLLMError, match="is closed"):
        llm.inspect("decode")


SENTENCES = {
    "an unknown program": (
        {"program": "decoed"},
        r"program='decoed' is not known; did you mean 'decode'\?\. Use one of \['decode', 'mixed'",
    ),
    "tokens for decode": (
        {"program": "decode", "tokens": 5},
        "tokens=5 is for 'prefill' and 'mixed': in 'decode' each row has one token. Pass batch=",
    ),
    "steps for prefill": (
        {"program": "prefill", "steps": 8},
        "steps=8 is for 'decode': 'prefill' computes one step a launch. Leave it out",
    ),
    "no steps": ({"program": "decode", "steps": 0}, "steps=0 must be an integer of at least 1"),
    "half a row": (
        {"program": "decode", "batch": 1.5},
        "batch=1.5 must be an integer of at least 1",
    ),
    "too many rows": (
        {"program": "decode", "batch": 65},
        "batch=65 is more than max_num_seqs=64. Use 64 or less, or raise max_num_seqs",
    ),
    "too many tokens": (
        {"program": "mixed", "tokens": 2000},
        "tokens=2000 is more than max_num_batched_tokens=1024. Use 1024 or less, or raise",
    ),
    "too long": (
        {"program": "decode", "context": 600},
        "context=600 is more than max_model_len=512. Use 512 or less, or raise max_model_len",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_cannot_be_inspected_is_said(case):
    asked, sentence = SENTENCES[case]

    with pytest.raises(ConfigError, match=sentence):
        Wanted(**asked).key(ENGINE)


def test_an_unknown_target_is_refused_with_the_list(folder):
    with pytest.raises(
        ConfigError, match=r"target='h20' is not known.*Use one of \['a100', 'b200'"
    ):
        inspect(folder, "decode", target="h20")


def test_devices_that_do_not_divide_the_model_are_refused(folder):
    with pytest.raises(ConfigError, match=r"does not divide over tensor=3 .*Sizes that work"):
        inspect(folder, "decode", devices=3)


def test_no_devices_are_refused(folder):
    with pytest.raises(ConfigError, match="devices=0 must be an integer of at least 1"):
        inspect(folder, "decode", devices=0)


def test_defaults_are_cut_to_what_the_engine_has():
    small = EngineConfig(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32)

    assert Wanted(program="decode").key(small).bucket.rows == 2
    assert Wanted(program="prefill").key(small).bucket.tokens == 32
    assert Wanted(program="mixed").key(ENGINE).bucket.tokens == 512
