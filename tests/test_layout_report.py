"""`llm.layout()`: what it states is what the devices have."""

import re

import jax
import pytest

from jaxllm import LLM, ConfigError
from jaxllm.replicas import engines_of
from tests.layouts import EIGHT_HEADS

SMALL = {
    "skip_tokenizer_init": True,
    "max_model_len": 48,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 16,
    "use_tqdm_on_load": False,
}
LAYOUTS = {
    "one": {},
    "tensor": {"tensor_parallel_size": 8},
    "2d": {"tensor_parallel_size": 8, "layout": "tensor_2d"},
    "engines": {"tensor_parallel_size": 2, "data_parallel_size": 3},
    "replicated": {"tensor_parallel_size": 2, "layout": "replicated", "devices": [6, 3]},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def llm(request, checkpoints):
    with LLM(checkpoints("llama", **EIGHT_HEADS), **LAYOUTS[request.param], **SMALL) as llm:
        yield llm


def held(arrays):
    """Bytes by id of the device, counted on the devices."""
    found = {}
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            found[shard.device.id] = found.get(shard.device.id, 0) + shard.data.nbytes
    return found


def test_sums_are_what_the_devices_have(llm):
    report, runners = llm.layout(), [engine.runner for engine in engines_of(llm._engine)]

    assert report.weight_bytes == held([runner.params for runner in runners])
    assert report.cache_bytes == held([runner.state.caches for runner in runners])
    for device in report.weight_bytes:
        assert sum(one.num_bytes for one in report) == report.weight_bytes[device]


def test_each_parameter_is_described_as_it_is(llm):
    report, runner = llm.layout(), engines_of(llm._engine)[0].runner

    assert len(report) == len(runner.params)
    for one, param in zip(report, runner.params, strict=True):
        assert (one.shape, one.dtype) == (param.shape, param.dtype.name)
        assert len(one.axes) == param.ndim
        assert one.spec == param.sharding.spec
        assert one.is_replicated == param.sharding.is_fully_replicated
        assert {one.shard_shape} == {shard.data.shape for shard in param.addressable_shards}
        assert one.num_bytes == param.addressable_shards[0].data.nbytes
        assert sorted(i for ids in one.picture.pieces.values() for i in ids) == sorted(
            device.id for device in param.devices()
        )


@pytest.fixture(scope="module")
def report(checkpoints):
    folder = checkpoints("llama", **EIGHT_HEADS)
    with LLM(folder, **LAYOUTS["2d"], **SMALL) as llm:
        return llm.layout()


def test_text_has_the_layout_a_row_a_kind_and_pictures(report):
    text = repr(report)

    assert text.startswith(str(report.layout))
    for word in ("parameter", "bytes a device", "where"):
        assert word in text
    down = re.search(r"layers\.\*\.mlp\.down\.weight +2 +float32 32x48 .*", text)
    assert down, text
    assert re.search(r"embed@tensor_2, mlp@tensor .*384 +split in \d+, each on|split in 8", down[0])
    assert text.count("layers.*.attn.qkv.weight") == 2  # in the table, and above its picture
    assert "layers.0" not in text
    assert re.search(
        r"^device 0-7: [\d,]+ bytes of parameters and [\d,]+ of cache each$", text, re.M
    )


def test_parameter_is_found_by_its_path_and_draws_itself(report):
    one = report["layers.1.mlp.down.weight"]

    assert repr(one).startswith("layers.1.mlp.down.weight: float32 32x48; ")
    assert one.picture.text() in repr(one)
    assert one.picture._repr_html_() in one._repr_html_()


def test_html_has_the_same_rows_and_is_escaped(report):
    shown = report._repr_html_()

    for row in report.rows():
        for cell in row:
            assert f"<td>{cell}</td>" in shown
    assert shown.count("<table>") == 1 + len(report._pictures())


def test_unknown_path_names_the_nearest(report):
    with pytest.raises(ConfigError, match=r"no parameter 'layers.0.mlp.dwn.weight'; did you mean"):
        report["layers.0.mlp.dwn.weight"]
