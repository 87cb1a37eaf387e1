"""Plans: beside what a load really takes, and what they say where nothing fits."""

import json
import resource
import time

import jax
import pytest

import jaxllm
from jaxllm import LLM, ConfigError, plan
from jaxllm.sharding.layouts import Layout
from tests.arrays import no_new_arrays
from tests.tiny import CONFIGS, SIZES

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128}
DEVICES = 8

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
"""As Llama-3.1-8B's, and the sizes in which the larger ones differ."""

LLAMA_70B = {
    **LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_405B = {
    **LLAMA,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}


def bytes_by_device(arrays):
    """What each device holds of some arrays."""
    held = dict.fromkeys(jax.devices(), 0)
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return [size for size in held.values() if size]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("layout", "devices"),
    [("replicated", 1), ("tensor:8", 8), ("tensor:2", 2), ("tensor_2d:4", 4), ("sequence:4", 4)],
)
def test_a_load_takes_what_was_planned(checkpoints, family, layout, devices):
    # More devices than KV heads, and a vocabulary that does not divide: copies and padding.
    folder = checkpoints(family, num_attention_heads=8, hidden_size=64, intermediate_size=64)
    found = plan(folder, layout=layout, hardware="cpu:8", **OPTIONS)
    tensor, name = devices, layout.partition(":")[0]

    with LLM(
        folder,
        layout=name,
        tensor_parallel_size=tensor,
        load_format="dummy",
        skip_tokenizer_init=True,
        **OPTIONS,
    ) as llm:
        runner = llm._engine.runner
        weights = bytes_by_device(runner.params)
        cache = bytes_by_device(jax.tree.leaves(runner.state.caches))
        tokens = llm.stats()["num_pages"] * llm._engine.config.page_size

    assert len(weights) == len(cache) == devices
    assert weights == pytest.approx([found.weight_bytes] * devices, rel=0.01)
    assert tokens == pytest.approx(found.kv_tokens, rel=0.02)
    assert cache == pytest.approx([found.memory.cache_bytes] * devices, rel=0.02)


@pytest.mark.parametrize(
    ("config", "layout", "billions"),
    [(LLAMA_70B, "data_tensor:2x4", 70.55), (LLAMA_405B, "tensor:16", 405.85)],
)
def test_the_largest_models_are_planned_in_seconds_and_little_memory(config, layout, billions):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()

    found = plan(config, layout=layout, hardware="h200")

    assert time.perf_counter() - start < 30  # 2 and 4 seconds on a core that is free
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: 1 GiB
    assert found.fits
    assert found.num_parameters == pytest.approx(billions * 1e9, rel=1e-3)  # copies not counted


def test_the_bytes_of_a_known_model():
    found = plan(LLAMA, layout="tensor:8", hardware="h200:8", batch=8, context=1024)

    # 8.03e9 parameters of 2 bytes, all split but the norms.
    assert found.weight_bytes == pytest.approx(8.03e9 * 2 / 8, rel=1e-3)
    assert found.token_bytes == 2 * 32 * 8 * 128 * 2 // 8
    assert found.transfers_per_layer() == {"all-reduce": 2}
    # What a decode step cannot do without: all weights but the embedding, and the cache.
    read = (8.03e9 - 128256 * 4096) * 2 / 8 + 8 * 1025 * found.token_bytes
    least = found.decode.roofline
    assert least.memory == pytest.approx(read / 4.8e12, rel=0.01)
    # Two sums a layer, the embedding's, and the best token's gather: more than the bytes take.
    assert least.latency == pytest.approx((2 * 32 + 2) * 6.6e-6)
    assert found.decode.binds == "latency"
    assert found.decode.seconds == pytest.approx(least.memory + least.latency, rel=0.02)


def test_engines_side_by_side_share_a_batch():
    one, two = (
        plan(LLAMA, layout=layout, hardware="h200:8", batch=16)
        for layout in ("tensor:4", "data_tensor:2x4")
    )
    eight = plan(LLAMA, layout="tensor:4", hardware="h200:8", batch=8)

    assert two.decode.work == eight.decode.work
    assert two.decode.tokens_per_second == pytest.approx(2 * eight.decode.tokens_per_second)
    assert two.concurrency == 2 * one.concurrency


def test_a_model_is_a_folder_a_dict_or_a_config_object(checkpoints):
    make, fixed = CONFIGS["llama"]
    config = make(**SIZES, **fixed)

    plans = [
        plan(model, hardware="h200", layout="replicated")
        for model in (checkpoints("llama"), config, config.to_dict())
    ]

    assert len({(one.weight_bytes, one.kv_tokens, one.decode.seconds) for one in plans}) == 1


def test_a_plan_is_a_table_in_words_html_and_json():
    found = plan(LLAMA, layout="tensor", hardware="h200:8", batch=8)

    text = repr(found)
    assert "layout tensor:8 on h200:8" in text
    assert "2 all-reduce" in text
    assert f"{found.kv_tokens:,} tokens" in text
    assert found._repr_html_().count("<table>") == 4
    stated = json.loads(json.dumps(found.to_dict()))
    assert stated["decode"]["binds"] == "latency"
    assert Layout.from_dict(stated["layout"]) == found.layout


def test_it_reads_no_weights_and_makes_no_arrays(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    with no_new_arrays():
        plan(tmp_path, hardware="h200:8")


class TestWhatDoesNotFit:
    def test_the_plan_says_so_and_each_remedy_works(self):
        big = plan(LLAMA_70B, layout="tensor:2", hardware="a100-80:8")
        assert not big.fits
        assert "weights take 65.7" in big.problem
        assert "tensor_parallel_size=4" in big.remedies

        assert plan(LLAMA_70B, tensor_parallel_size=4, hardware="a100-80:8").fits

    def test_more_devices_than_there_are_is_said(self):
        found = plan(LLAMA_405B, layout="tensor:8", hardware="h100:8")

        assert "tensor_parallel_size=16, more than the 8 there are" in found.remedies
        assert plan(LLAMA_405B, layout="tensor:32", hardware="h100:32").fits

    def test_a_shorter_length_is_named_and_fits(self):
        found = plan(
            LLAMA, hardware="l4", layout="replicated", max_num_seqs=8, max_num_batched_tokens=256
        )
        length = next(r for r in found.remedies if r.startswith("max_model_len="))
        asked = int(length.removeprefix("max_model_len=").partition(" ")[0])

        again = plan(
            LLAMA,
            hardware="l4",
            layout="replicated",
            max_num_seqs=8,
            max_num_batched_tokens=256,
            max_model_len=asked,
        )
        assert not found.fits
        assert again.fits
        assert asked < 131072

    def test_smaller_steps_are_named_where_they_make_room(self):
        found = plan(LLAMA, hardware="l4", layout="replicated", max_model_len=8192)

        assert any("max_num_batched_tokens=2048" in remedy for remedy in found.remedies)
        assert plan(
            LLAMA,
            hardware="l4",
            layout="replicated",
            max_model_len=8192,
            max_num_batched_tokens=2048,
            max_num_seqs=64,
        ).fits

    def test_half_the_bytes_are_named_where_it_is_float32(self):
        found = plan(
            LLAMA, hardware="h100", layout="replicated", dtype="float32", max_model_len=8192
        )
        if found.fits:
            found = plan(LLAMA, hardware="a100-40", dtype="float32", max_model_len=8192)

        assert "dtype='bfloat16' with this layout" in found.remedies

    def test_nothing_is_said_of_quantization_but_that_there_is_none(self):
        found = plan(LLAMA, hardware="t4", layout="replicated")

        assert [r for r in found.remedies if "quantized" in r] == [found.remedies[-1]]
        assert found.remedies[-1].startswith("jaxllm reads no quantized weights yet")


def test_a_batch_that_waits_is_noted():
    found = plan(LLAMA, hardware="h200:8", batch=200, context=131072, layout="tensor")

    assert found.concurrency < 200
    assert any(f"holds {found.concurrency} of the 200 sequences" in note for note in found.notes)


def test_copies_and_padding_are_noted():
    found = plan({**LLAMA, "vocab_size": 128257}, layout="tensor:16", hardware="h200:16")

    assert any("each is held 2 times" in note for note in found.notes)
    assert any("is padded to 128272" in note for note in found.notes)


REFUSED = {
    "hardware": ({"hardware": "h201:8"}, r"hardware='h201:8' is not known; did you mean 'h200'\?"),
    "layout": ({"layout": "tensr"}, r"layout='tensr' is not a preset; did you mean 'tensor'\?"),
    "sizes": ({"layout": "tensor:x"}, "has sizes 'x'. Write tensor:4 for 4 devices"),
    "which sizes": ({"layout": "data_tensor"}, "Write data_tensor:2x4 for 2 engines on 4 devices"),
    "devices": (
        {"layout": "tensor:16"},
        "needs 16 devices and hardware h200:8 has 8. Use hardware=",
    ),
    "divide": ({"layout": "tensor:3"}, "does not divide over tensor=3 .*Sizes that work"),
    "batch": ({"batch": 0}, "batch=0 must be an integer of at least 1"),
    "rows": ({"batch": 1000}, "batch=1000 is more than max_num_seqs=256. Use 256 or less"),
    "engines": (
        {"batch": 1000, "layout": "data_tensor:2x4"},
        "batch=1000, 500 in each of 2 engines, is more than max_num_seqs=256. Use 512 or less",
    ),
    "context": ({"context": 10**6}, "context=1000000 is more than max_model_len=131072. Use"),
    "model": ({"model": 5}, "model=5 is none. Use a hub id, a folder with config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_to_type(case):
    changed, sentence = REFUSED[case]

    with pytest.raises(ConfigError, match=sentence):
        plan(**{"model": LLAMA, "hardware": "h200:8", **changed})


def test_the_public_names():
    assert {"plan", "sweep", "Hardware", "LayoutPlan", "Sweep", "SweepRow"} <= set(jaxllm.__all__)


def test_programs_are_compiled_when_asked_for(checkpoints):
    found = plan(checkpoints("llama"), layout="tensor:2", hardware="cpu:2", compile=True, **OPTIONS)

    assert [program.kind for program in found.programs] == ["prefill", "decode"]
    assert found.compile_seconds > 0
    for program in found.programs:
        assert program.excess == {}
        assert program.temp_bytes <= program.temp_bound
    assert "compiled, a step" in repr(found)
    assert found.program_roofline("decode").seconds > 0
    assert json.dumps(found.to_dict())
