"""What XLA:CPU makes of the engine's programs, where it is slow unless it is told how."""

import re
from collections import Counter

import pytest

from jaxllm import inspect
from jaxllm.hlo import Module

STEPS = {"prefill": {"tokens": 128, "batch": 2}, "decode": {"batch": 8}}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=STEPS)
def what(request):
    return request.param


@pytest.fixture(scope="module")
def text(what, checkpoints, dtype):
    """With attention in plain XLA, as where there is no C++ compiler."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAXLLM_NATIVE", "0")
        return inspect(checkpoints("llama"), what, context=64, dtype=dtype, **STEPS[what]).hlo


def test_compiled_attention_is_one_call_a_layer_and_copies_nothing(what, checkpoints, dtype):
    found = inspect(checkpoints("llama"), what, context=64, dtype=dtype, **STEPS[what])

    calls = re.findall(r'custom_call_target="jaxllm_paged_attention_', found.hlo)
    assert len(calls) == found.num_layers == 2
    assert found.alias_bytes == found.state_bytes
    assert found.copies == ()
    if dtype == "bfloat16":  # into attention and out of it, the model's own type
        results = r"= \((\w+)\[[^)]*\) custom-call\(.*\"jaxllm_paged_attention_"
        assert re.findall(results, found.hlo) == ["bf16"] * found.num_layers


def test_the_greatest_token_is_one_call_and_nothing_else_is_as_large_as_the_logits(
    what, checkpoints, dtype
):
    found = inspect(checkpoints("llama"), what, context=64, dtype=dtype, **STEPS[what])

    calls = re.findall(r"custom-call\((.*)\), custom_call_target=\"jaxllm_greatest_", found.hlo)
    assert len(calls) == 1
    logits = re.search(rf"{re.escape(calls[0])} = f32(\[\d+,\d+\])", found.hlo)[1]
    assert re.findall(rf"(%\S+) = \w+{re.escape(logits)}", found.hlo) == calls


def test_each_product_with_a_weight_is_one_call(what, checkpoints, dtype):
    found = inspect(checkpoints("llama"), what, context=64, dtype=dtype, **STEPS[what])

    calls = re.findall(r'custom_call_target="jaxllm_linear_', found.hlo)
    assert len(calls) == 4 * found.num_layers + 1  # and the logits


def test_each_norm_is_one_call(what, checkpoints, dtype):
    found = inspect(checkpoints("llama"), what, context=64, dtype=dtype, **STEPS[what])

    calls = re.findall(r'custom_call_target="jaxllm_norm_', found.hlo)
    assert len(calls) == 2 * found.num_layers + 1  # and the last


def test_what_only_fills_a_program_up_is_not_computed(what, checkpoints, dtype):
    """The last operand of a kernel is how many tokens count, and comes from the step's inputs."""
    found = inspect(checkpoints("llama"), what, context=64, dtype=dtype, **STEPS[what])

    kernels = r"custom-call\((.*)\), custom_call_target=\"jaxllm_(?:linear|norm)_"
    counts = {operands.split(", ")[-1] for operands in re.findall(kernels, found.hlo)}
    assert len(counts) == 1
    (count,) = (re.escape(name) for name in counts)
    slices = re.findall(rf"{count} = s32\[\][^=]*?(\w+)\(", found.hlo)
    assert slices
    assert "constant" not in slices


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_between_kernels_a_layer_is_its_activation(what, family, checkpoints, dtype):
    """Heads are not cut apart, and sums of the stream not made, by operations of their own."""

    def operations(num_layers):
        layers = {"num_hidden_layers": num_layers}
        found = inspect(
            checkpoints(family), what, context=64, dtype=dtype, hf_overrides=layers, **STEPS[what]
        )
        return Counter(name.split("-")[0] for name in re.findall(r" ([\w-]+)\(%", entry(found.hlo)))

    added = operations(3) - operations(2)
    assert added.pop("custom") == 7  # two norms, four products, attention
    free = ("bitcast", "get")  # a part of a tuple
    assert {name: n for name, n in added.items() if name not in free} == {"fusion": 1}


def entry(hlo):
    """The text of what runs, without what is fused."""
    return hlo[hlo.index("\nENTRY ") :]


def test_rotations_are_worked_out_once_and_not_in_each_layer(text):
    assert len(re.findall(r" cosine\(", text)) == len(re.findall(r" sine\(", text)) == 1


def test_what_is_written_in_place_is_not_converted_for_it(text):
    module = Module(text)

    updated = [
        known[instruction.operands[0]].opcode
        for known in module.computations.values()
        for instruction in known.values()
        if instruction.opcode in ("dynamic-update-slice", "scatter")
    ]
    assert updated
    assert "convert" not in updated
