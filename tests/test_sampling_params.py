import math

import numpy as np
import pytest

from jaxllm.errors import RequestError
from jaxllm.sampling_params import SamplingParams


def test_the_defaults_are_those_of_vllm():
    params = SamplingParams()

    assert params == SamplingParams(
        temperature=1.0,
        seed=None,
        max_tokens=16,
        stop_token_ids=[],
        ignore_eos=False,
        logprobs=None,
        detokenize=True,
        skip_special_tokens=True,
    )


@pytest.mark.parametrize("value", [0, 0.5, 1, 2, np.float64(0.5)])
def test_temperature_may_be_from_0_to_2(value):
    params = SamplingParams(temperature=value)

    assert params.temperature == value
    assert type(params.temperature) is float


@pytest.mark.parametrize("value", [0.001, 1e-30])
def test_a_tiny_temperature_is_raised(value):
    assert SamplingParams(temperature=value).temperature == 0.01


@pytest.mark.parametrize("value", [-0.1, 2.1, 100])
def test_temperature_outside_0_to_2_is_refused(value):
    with pytest.raises(RequestError, match=rf"temperature must be in \[0, 2\], got {value}\."):
        SamplingParams(temperature=value)


@pytest.mark.parametrize("value", ["0.5", None, True, math.nan, math.inf, [1.0]])
def test_temperature_that_is_no_number_is_refused(value):
    with pytest.raises(RequestError, match=r"temperature must be a number in \[0, 2\], got "):
        SamplingParams(temperature=value)


def test_seed_minus_one_means_none():
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize("value", [0, 7, -2, 2**64 + 1, np.int32(5)])
def test_any_other_integer_may_be_a_seed(value):
    seed = SamplingParams(seed=value).seed

    assert seed == value
    assert type(seed) is int


@pytest.mark.parametrize("name", ["seed", "max_tokens", "logprobs"])
@pytest.mark.parametrize("value", [1.0, "1", [1]])
def test_what_must_be_an_integer_and_is_none_is_refused(name, value):
    with pytest.raises(RequestError, match=rf"{name} must be an integer, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["seed", "max_tokens"])
def test_a_claim_is_no_integer(name):
    with pytest.raises(RequestError, match=rf"{name} must be an integer, got True"):
        SamplingParams(**{name: True})


@pytest.mark.parametrize("value", [0, -1])
def test_max_tokens_below_1_is_refused(value):
    with pytest.raises(RequestError, match=rf"max_tokens must be at least 1, got {value}\."):
        SamplingParams(max_tokens=value)


def test_max_tokens_may_be_left_open():
    assert SamplingParams(max_tokens=None).max_tokens is None


@pytest.mark.parametrize(("value", "count"), [(None, None), (0, 0), (5, 5), (True, 1)])
def test_logprobs_count_the_alternatives(value, count):
    logprobs = SamplingParams(logprobs=value).logprobs

    assert logprobs == count
    assert not isinstance(logprobs, bool)


def test_negative_logprobs_are_refused():
    with pytest.raises(RequestError, match=r"logprobs must be at least 0, got -2\."):
        SamplingParams(logprobs=-2)


def test_logprobs_false_is_refused():
    with pytest.raises(RequestError, match="logprobs must be an integer, got False"):
        SamplingParams(logprobs=False)


@pytest.mark.parametrize("value", [[3, 1, 3], (3, 1), np.array([3, 1, 3]), iter([3, 1])])
def test_stop_tokens_are_kept_once_each_in_order(value):
    ids = SamplingParams(stop_token_ids=value).stop_token_ids

    assert ids == (3, 1)
    assert {type(i) for i in ids} == {int}


@pytest.mark.parametrize("value", ["12", b"12", 5])
def test_stop_tokens_that_are_no_list_are_refused(value):
    with pytest.raises(RequestError, match="stop_token_ids must be a list of token ids, got "):
        SamplingParams(stop_token_ids=value)


@pytest.mark.parametrize("value", [[1, "2"], [1.5], [None], [True]])
def test_stop_tokens_that_are_no_integers_are_refused(value):
    with pytest.raises(RequestError, match="each of stop_token_ids must be an integer, got "):
        SamplingParams(stop_token_ids=value)


def test_negative_stop_tokens_are_refused():
    with pytest.raises(RequestError, match=r"each of stop_token_ids must be at least 0, got -1\."):
        SamplingParams(stop_token_ids=[-1])


def test_an_unknown_parameter_is_refused_with_the_nearest_known_one():
    with pytest.raises(
        TypeError,
        match=r"SamplingParams got an unexpected keyword argument 'max_token'; "
        r"did you mean 'max_tokens'\?",
    ):
        SamplingParams(max_token=5)


def test_stop_tokens_may_be_none():
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


@pytest.mark.parametrize("value", [np.float32(0.5), np.float16(0.5), np.int32(1)])
def test_temperature_may_be_a_number_of_numpy(value):
    assert SamplingParams(temperature=value).temperature == value


@pytest.mark.parametrize("name", ["seed", "max_tokens", "logprobs"])
@pytest.mark.parametrize("value", [np.array([1, 2]), np.array(1.5)], ids=["vector", "float"])
def test_an_array_is_no_integer(name, value):
    with pytest.raises(RequestError, match=rf"{name} must be an integer, got "):
        SamplingParams(**{name: value})


def test_a_clone_is_equal_and_independent():
    params = SamplingParams(temperature=0.5, stop_token_ids=[1], seed=3)

    clone = params.clone()
    clone.temperature = 0.0

    assert params == SamplingParams(temperature=0.5, stop_token_ids=[1], seed=3)
    assert clone == SamplingParams(temperature=0.0, stop_token_ids=[1], seed=3)
