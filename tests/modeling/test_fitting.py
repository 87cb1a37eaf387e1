"""What is done to a model so that a layout can hold it."""

import dataclasses
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm import ConfigError, Layout
from jaxllm.demo.export import to_checkpoint
from jaxllm.modeling import registry
from jaxllm.modeling.abstract import abstract_model, init_params
from jaxllm.modeling.fitting import Fit, fit
from jaxllm.sharding.choice import sharders
from jaxllm.sharding.layouts import preset
from tests.layouts import load
from tests.tiny import sharder, tiny_model


def fitted(layout, family="llama", **changes):
    config, _, _ = tiny_model(family, **changes)
    return fit(config, registry.family(family).build, layout)


def test_a_model_that_divides_is_left_alone():
    config, _, _ = tiny_model(vocab_size=104)

    assert fitted(preset("tensor", tensor=2), vocab_size=104) == Fit(config, ())


def test_kv_heads_fewer_than_devices_are_copied_and_this_is_said():
    found = fitted(preset("tensor", tensor=4), vocab_size=104)

    assert (found.config.num_kv_heads, found.config.kv_copies) == (4, 2)
    assert found.config.group_size == 1
    assert found.notes == (
        "The model's 2 KV heads are fewer than tensor=4 can share evenly: each is held 2 times, "
        "in the cache too",
    )


def test_kv_heads_that_do_not_divide_are_copied_until_they_do():
    found = fitted(preset("tensor", tensor=4), num_attention_heads=12, num_key_value_heads=6,
                   hidden_size=48, vocab_size=104)  # fmt: skip

    assert (found.config.num_kv_heads, found.config.kv_copies) == (12, 2)


def test_a_vocabulary_is_padded_and_this_is_said():
    found = fitted(preset("tensor", tensor=2))

    assert (found.config.vocab_size, found.config.num_logits) == (101, 102)
    assert found.notes == (
        "The vocabulary of 101 tokens is padded to 102 for tensor=2; padding is never sampled",
    )


def test_a_mesh_axis_of_no_use_is_named():
    assert fitted(preset("data", tensor=4)).notes == ("Layout 'data' splits nothing over tensor=4",)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            preset("tensor", tensor=3),
            {},
            "num_attention_heads=4 does not divide over tensor=3 of layout 'tensor'. Sizes that "
            "work with the model: tensor=1, 2, 4.",
        ),
        (
            preset("tensor", tensor=4),
            {"intermediate_size": 50},
            "intermediate_size=50 does not divide over tensor=4 of layout 'tensor'. Sizes that "
            "work with the model: tensor=1, 2.",
        ),
        (
            Layout("wide", {"a": 2, "b": 5}, {"mlp": ("a", "b"), "q_heads": "a"}),
            {},
            "intermediate_size=48 does not divide over a=2 x b=5 of layout 'wide'. Sizes that "
            "work with the model: a=none; b=1, 2, 3, 4, 6, 8, 12, 24.",
        ),
        (
            Layout("embed", {"a": 5}, {"embed": "a"}),
            {},
            "hidden_size=32 does not divide over a=5 of layout 'embed'. Sizes that work with the "
            "model: a=1, 2, 4, 8, 16, 32.",
        ),
        (
            Layout("narrow", {"a": 5}, {"token_embed": "a"}),
            {"family": "opt"},
            "token_embed=24 does not divide over a=5",
        ),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(layout, changes, message):
    with pytest.raises(ConfigError) as caught:
        fitted(layout, **changes)

    assert str(caught.value).startswith(message)


def test_a_refusal_takes_less_than_a_second_for_a_hundred_layers():
    config, _, _ = tiny_model()
    large = dataclasses.replace(
        config, num_layers=126, embed_dim=16384, mlp_dim=53248, num_heads=128, head_dim=128
    )
    start = time.perf_counter()

    with pytest.raises(ConfigError, match="tensor=3"):
        fit(large, registry.family("llama").build, preset("tensor", tensor=3))

    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_each_device_has_the_kv_head_that_its_queries_need(checkpoints, family):
    folder = checkpoints(family)
    whole, params = load(folder, sharder())
    (on_four,) = sharders("tensor", 4)
    plan, split = load(folder, on_four)
    axis = {leaf.path: i for i, leaf in enumerate(plan.model.leaves)}
    group = whole.config.group_size

    for path in (p for p in axis if ".qkv." in p):
        want, got = np.asarray(params[axis[path]]), split[axis[path]]
        for device, shard in enumerate(got.addressable_shards):
            head = np.asarray(shard.data)[0]  # [1 + 2, D, ...]
            np.testing.assert_array_equal(head[0], want[device // group, device % group])
            np.testing.assert_array_equal(head[1:], want[device // group, group:])


def test_padding_is_zeros_behind_the_vocabulary(checkpoints):
    folder = checkpoints("llama")
    whole, params = load(folder, sharder())
    plan, split = load(folder, *sharders("tensor", 4))

    for leaf, want, got in zip(plan.model.leaves, params, split, strict=True):
        if leaf.padding:
            np.testing.assert_array_equal(got[: want.shape[0]], want)
            assert got.shape[0] == 104
            assert not np.asarray(got[want.shape[0] :]).any()
    assert sum(leaf.padding > 0 for leaf in plan.model.leaves) == 2
    assert whole.model.num_logits == 101


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_what_was_read_into_a_layout_is_written_as_it_was(checkpoints, family):
    folder = checkpoints(family)
    plan, params = load(folder, *sharders("tensor", 4))

    written = to_checkpoint(plan.model, params, plan.family.WEIGHTS)

    wanted = load_file(folder / "model.safetensors")
    assert written.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(written[name], value)


def test_dummy_weights_do_not_depend_on_the_layout():
    config, model, _ = tiny_model()
    build = registry.family("llama").build
    (on_four,) = sharders("tensor", 4)
    split = abstract_model(fit(config, build, on_four.layout).config, build, "float32", on_four)

    for leaf, one, four in zip(
        split.leaves, init_params(model, 7), init_params(split, 7), strict=True
    ):
        one, four = np.asarray(one), np.asarray(four)
        if leaf.copies:
            one = np.concatenate(
                [one[:, :2].reshape(4, 1, *one.shape[2:]), np.repeat(one[:, 2:], 2, axis=0)], axis=1
            )
        np.testing.assert_array_equal(four[: one.shape[0]], one)
