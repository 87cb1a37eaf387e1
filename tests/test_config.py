import dataclasses

import pytest

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError


@pytest.mark.parametrize(
    "name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_q"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_1_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value} must be at least 1\."):
        EngineConfig(**{"max_model_len": 64, name: value})


@pytest.mark.parametrize("value", [-8, 0, 3, 24])
def test_page_size_must_be_a_power_of_two(value):
    with pytest.raises(ConfigError, match=rf"block_size={value} is not a power of two\. Use 16"):
        EngineConfig(max_model_len=64, page_size=value)


@pytest.mark.parametrize("value", [1, 2, 8, 16, 64])
def test_any_power_of_two_is_a_page_size(value):
    assert EngineConfig(max_model_len=64, page_size=value).page_size == value


def test_a_step_must_hold_a_token_of_each_sequence():
    with pytest.raises(
        ConfigError,
        match=r"max_num_batched_tokens \(8\) must be greater than or equal to max_num_seqs \(9\)",
    ):
        EngineConfig(max_model_len=64, max_num_batched_tokens=8, max_num_seqs=9)


def test_without_chunked_prefill_a_step_must_hold_a_whole_sequence():
    with pytest.raises(
        ConfigError,
        match=r"max_num_batched_tokens \(63\) is smaller than max_model_len \(64\) and chunked "
        r"prefill is off\. Raise the first, or set enable_chunked_prefill=True",
    ):
        EngineConfig(
            max_model_len=64,
            max_num_seqs=8,
            max_num_batched_tokens=63,
            enable_chunked_prefill=False,
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 8, "max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 64, "enable_chunked_prefill": False},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
    ],
)
def test_the_limits_themselves_are_allowed(settings):
    config = EngineConfig(max_model_len=64, **settings)

    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(("length", "pages"), [(1, 1), (16, 1), (17, 2), (64, 4)])
def test_pages_of_a_sequence_are_rounded_up(length, pages):
    assert EngineConfig(max_model_len=length, page_size=16).pages_per_seq == pages


def test_a_config_is_a_value():
    first, second = EngineConfig(max_model_len=64), EngineConfig(max_model_len=64)

    assert first == second
    assert hash(first) == hash(second)


def test_a_config_cannot_be_changed():
    config = EngineConfig(max_model_len=64)

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_model_len = 128
