import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

from jaxllm.errors import ConfigError, RequestError
from jaxllm.sampling_params import (
    DEFAULT_MAX_TOKENS,
    REMOVED,
    UNUSED,
    DefaultInt,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    limit,
)

WHOLE = ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"]
WHOLE += ["thinking_token_budget"]
NO_NUMBERS = ["0.5", None, True, math.nan, math.inf, -math.inf, [1.0], 10**400]


def test_the_defaults_are_those_of_vllm():
    params = SamplingParams()

    assert params == SamplingParams(
        n=1,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        seed=None,
        stop=None,
        stop_token_ids=None,
        ignore_eos=False,
        max_tokens=16,
        min_tokens=0,
        logprobs=None,
        prompt_logprobs=None,
        logprob_token_ids=None,
        flat_logprobs=False,
        detokenize=True,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        include_stop_str_in_output=False,
        output_kind=RequestOutputKind.CUMULATIVE,
        logit_bias=None,
        allowed_token_ids=None,
        bad_words=None,
        thinking_token_budget=None,
        repetition_detection=None,
        skip_reading_prefix_cache=None,
        extra_args=None,
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


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
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


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.0, "1", [1], math.nan, math.inf])
def test_what_must_be_an_integer_and_is_none_is_refused(name, value):
    with pytest.raises(RequestError, match=rf"{name} must be an integer, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["seed", "max_tokens", "n", "top_k", "min_tokens"])
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


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_negative_logprobs_are_refused(name):
    with pytest.raises(RequestError, match=rf"{name} must be non-negative or -1, got -2\. -1 is"):
        SamplingParams(**{name: -2})


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize(("value", "count"), [(True, 1), (False, None), (np.True_, 1), (-1, -1)])
def test_logprobs_may_be_a_claim_or_all(name, value, count):
    assert getattr(SamplingParams(**{name: value}), name) == count


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


@pytest.mark.parametrize("name", WHOLE)
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


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("presence_penalty", -2.1, r"\[-2, 2\]"),
        ("presence_penalty", 2.1, r"\[-2, 2\]"),
        ("frequency_penalty", -3, r"\[-2, 2\]"),
        ("frequency_penalty", 3, r"\[-2, 2\]"),
        ("repetition_penalty", 0, r"\(0, inf\)"),
        ("repetition_penalty", -1, r"\(0, inf\)"),
        ("top_p", 0, r"\(0, 1\]"),
        ("top_p", 1.01, r"\(0, 1\]"),
        ("min_p", -0.01, r"\[0, 1\]"),
        ("min_p", 1.01, r"\[0, 1\]"),
    ],
)
def test_number_outside_its_range_is_refused(name, value, range_):
    with pytest.raises(RequestError, match=rf"{name} must be in {range_}, got {value}\."):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name",
    ["presence_penalty", "frequency_penalty", "repetition_penalty", "top_p", "min_p"],
)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(RequestError, match=rf"{name} must be a number in .*, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("presence_penalty", [-2, 2]),
        ("frequency_penalty", [-2, 2]),
        ("repetition_penalty", [0.01, 1e6, np.float32(1.5)]),
        ("top_p", [1e-9, 1, np.float64(0.5)]),
        ("min_p", [0, 1]),
    ],
)
def test_number_at_the_end_of_its_range_is_accepted(name, values):
    for value in values:
        kept = getattr(SamplingParams(**{name: value}), name)

        assert kept == value
        assert type(kept) is float


@pytest.mark.parametrize(("value", "kept"), [(-1, 0), (0, 0), (1, 1), (np.int64(7), 7)])
def test_top_k_of_0_or_minus_1_is_off(value, kept):
    assert SamplingParams(top_k=value).top_k == kept


def test_top_k_below_minus_1_is_refused():
    with pytest.raises(RequestError, match=r"top_k must be 0 \(disable\), or at least 1, got -2"):
        SamplingParams(top_k=-2)


@pytest.mark.parametrize("name", ["n", "min_tokens"])
def test_counts_below_their_least_are_refused(name):
    with pytest.raises(RequestError, match=rf"{name} must be at least [01], got -1\."):
        SamplingParams(**{name: -1})


def test_greedy_leaves_nothing_to_choose_from():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=7, min_p=0.1)

    assert params.is_greedy
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert not SamplingParams().is_greedy


def test_several_greedy_completions_are_refused():
    with pytest.raises(RequestError, match=r"n must be 1 when using greedy sampling, got 2: all"):
        SamplingParams(temperature=0, n=2)


def test_tiny_temperature_is_not_greedy():
    assert SamplingParams(temperature=1e-9, n=2).n == 2


@pytest.mark.parametrize(("value", "kept"), [(-1, None), (None, None), (0, 0), (9, 9)])
def test_thinking_budget_of_minus_1_is_none(value, kept):
    assert SamplingParams(thinking_token_budget=value).thinking_token_budget == kept


def test_negative_thinking_budget_is_refused():
    with pytest.raises(
        RequestError, match=r"thinking_token_budget must be non-negative, or -1.*, got -2\."
    ):
        SamplingParams(thinking_token_budget=-2)


@pytest.mark.parametrize(
    "name",
    [
        "ignore_eos",
        "flat_logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "skip_reading_prefix_cache",
    ],
)
def test_claims_are_true_or_false(name):
    assert getattr(SamplingParams(**{name: np.True_}), name) is True
    assert getattr(SamplingParams(**{name: 0}), name) is False
    for value in ("yes", 2, 1.0, [], np.array([1, 2])):
        with pytest.raises(RequestError, match=rf"{name} must be True or False, got "):
            SamplingParams(**{name: value})


# ---------------------------------------------------------------- max_tokens


def test_max_tokens_that_nobody_chose_is_marked():
    params = SamplingParams()

    copies = [params, params.clone(), dataclasses.replace(params, seed=1), copy.deepcopy(params)]
    copies.append(pickle.loads(pickle.dumps(params)))
    assert all(isinstance(one.max_tokens, DefaultInt) for one in copies)
    assert {one.max_tokens for one in copies} == {16}


def test_max_tokens_that_was_chosen_is_not_marked():
    assert not isinstance(SamplingParams(max_tokens=16).max_tokens, DefaultInt)


def test_more_min_tokens_than_the_default_max_tokens_says_so():
    with pytest.raises(
        RequestError,
        match=r"min_tokens must be less than or equal to max_tokens=16, got 17\. That is the def",
    ):
        SamplingParams(min_tokens=17)


def test_more_min_tokens_than_max_tokens_are_refused():
    with pytest.raises(
        RequestError, match=r"min_tokens must be less than or equal to max_tokens=5, got 6. Raise"
    ):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_min_tokens_may_be_many_where_max_tokens_is_open():
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("value", "kept"), [("ab", ("ab",)), (["a", "b"], ("a", "b")), (None, ()), ([], ())]
)
def test_stop_is_one_text_or_several(value, kept):
    assert SamplingParams(stop=value).stop == kept


def test_bad_words_are_kept_once_each_in_order():
    assert SamplingParams(bad_words=["b", "a", "b"]).bad_words == ("b", "a")


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_empty_texts_are_refused(name):
    with pytest.raises(RequestError, match=f"{name} cannot contain an empty string"):
        SamplingParams(**{name: ["a", ""]})


@pytest.mark.parametrize("name", ["stop", "bad_words"])
@pytest.mark.parametrize("value", [5, b"a", [5], [None], {"a": 1}, [["a"]], np.array(1)], ids=str)
def test_texts_that_are_none_are_refused(name, value):
    with pytest.raises(RequestError, match=f"{name} must be a list of strings, got "):
        SamplingParams(**{name: value})


def test_bad_words_may_not_be_one_text():
    with pytest.raises(RequestError, match="bad_words must be a list of strings, got 'ab'"):
        SamplingParams(bad_words="ab")


def test_stop_needs_text():
    with pytest.raises(
        RequestError,
        match=r"stop strings are only supported when detokenize is True, got stop=\('a',\)",
    ):
        SamplingParams(stop="a", detokenize=False)


# ---------------------------------------------------------------- tokens


def test_biases_come_from_json_too_and_are_bounded():
    params = SamplingParams(logit_bias={"5": 1, 6: -500, np.int32(7): np.float32(0.5), 8: 101})

    assert params.logit_bias == {5: 1.0, 6: -100.0, 7: 0.5, 8: 100.0}
    assert {type(token) for token in params.logit_bias} == {int}
    assert {type(bias) for bias in params.logit_bias.values()} == {float}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"logit_bias must be a dict .* such as \{42: -100\}, got \[1, 2\]"),
        ("a", "logit_bias must be a dict"),
        ({"a": 1}, "each token of logit_bias must be an integer, got 'a'"),
        ({"9" * 5000: 1}, "each token of logit_bias must be an integer, got '99"),
        ({1.0: 1}, "each token of logit_bias must be an integer, got 1.0"),
        ({-1: 1}, "each token of logit_bias must be at least 0, got -1"),
        ({3: "x"}, r"logit_bias of token 3 must be a number in \[-100, 100\], got 'x'"),
        ({3: math.nan}, "logit_bias of token 3 must be a number in .*, got nan"),
        ({3: -math.inf}, "logit_bias of token 3 must be a number in .*, got -inf"),
        (dict.fromkeys(range(1025), 1), "logit_bias must be of at most 1024 tokens, got 1025"),
    ],
)
def test_wrong_biases_are_refused(value, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(logit_bias=value)


def test_allowed_tokens_are_kept_once_each():
    assert SamplingParams(allowed_token_ids=[3, 1, 3]).allowed_token_ids == (3, 1)


def test_no_allowed_tokens_are_refused():
    with pytest.raises(RequestError, match="allowed_token_ids is not None and empty! Name the"):
        SamplingParams(allowed_token_ids=[])


@pytest.mark.parametrize("name", ["allowed_token_ids", "logprob_token_ids"])
@pytest.mark.parametrize("value", ["12", 5, {1: 2}, np.array(5)], ids=str)
def test_token_ids_that_are_no_list_are_refused(name, value):
    with pytest.raises(RequestError, match=f"{name} must be a list of token ids, got "):
        SamplingParams(**{name: value})


def test_tokens_to_score_may_come_with_their_number():
    assert SamplingParams(logprob_token_ids=[3, 1]).logprob_token_ids == (3, 1)
    assert SamplingParams(logprob_token_ids=[3, 1], logprobs=2).logprobs == 2


def test_tokens_to_score_with_another_number_are_refused():
    with pytest.raises(RequestError, match=r"logprobs must equal the number .* which is 2, got 3"):
        SamplingParams(logprob_token_ids=[3, 1], logprobs=3)


def test_too_many_tokens_to_score_are_refused():
    with pytest.raises(RequestError, match="logprob_token_ids must be at most 128 tokens, got 129"):
        SamplingParams(logprob_token_ids=range(129))


# ---------------------------------------------------------------- the others


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_output_kind_may_be_its_number(kind):
    assert SamplingParams(output_kind=kind.value).output_kind is kind
    assert SamplingParams(output_kind=kind).output_kind is kind


@pytest.mark.parametrize("value", [3, "DELTA", None, True, [1]])
def test_unknown_output_kind_is_refused(value):
    with pytest.raises(
        RequestError, match=r"output_kind must be one of RequestOutputKind\.CUMULATIVE, .*, got "
    ):
        SamplingParams(output_kind=value)


def test_repetition_detection_may_be_a_dict():
    params = SamplingParams(repetition_detection={"max_pattern_size": 9, "min_count": 3})

    assert params.repetition_detection == RepetitionDetectionParams(9, 0, 3)
    assert params.clone() == params


@pytest.mark.parametrize("value", [5, "a", {"max_size": 3}, [("min_count", 2)]])
def test_repetition_detection_of_another_kind_is_refused(value):
    with pytest.raises(
        RequestError, match=r"repetition_detection must be a .* keys of \['max_pattern_size'"
    ):
        SamplingParams(repetition_detection=value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 0, 2), "max_pattern_size must be at least 0, got -1"),
        ((2, 3, 2), "min_pattern_size must be less than or equal to max_pattern_size=2, got 3"),
        ((2, 1, 1), "min_count must be at least 2, got 1: one is no repetition"),
        ((2.0, 1, 2), "max_pattern_size must be an integer, got 2.0"),
    ],
)
def test_wrong_sizes_of_repetitions_are_refused(values, message):
    with pytest.raises(RequestError, match=message):
        RepetitionDetectionParams(*values)


@pytest.mark.parametrize(
    ("options", "skips"),
    [
        ({}, None),
        ({"prompt_logprobs": 0}, True),
        ({"prompt_logprobs": 0, "skip_reading_prefix_cache": False}, False),
        ({"skip_reading_prefix_cache": True}, True),
    ],
)
def test_prompt_logprobs_are_computed_and_not_read_from_the_cache(options, skips):
    assert SamplingParams(**options).skip_reading_prefix_cache is skips


def test_extra_args_are_kept_as_a_copy():
    extra = {"a": 1}

    params = SamplingParams(extra_args=extra)

    assert params.extra_args == extra
    assert params.extra_args is not extra


def test_extra_args_that_are_no_dict_are_refused():
    with pytest.raises(RequestError, match=r"extra_args must be a dict or None, got \[1\]"):
        SamplingParams(extra_args=[1])


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        ({"n": 3}, "MAX_N_SEQUENCES", "n must be at most 2, got 3. JAXLLM_MAX_N_SEQUENCES raises"),
        ({"stop": ["a", "b", "c"]}, "MAX_STOP_STRINGS", "stop strings must be at most 2, got 3"),
        ({"bad_words": ["a", "b", "c"]}, "MAX_NUM_BAD_WORDS", "bad_words must be at most 2, got 3"),
    ],
)
def test_limits_are_those_of_the_environment(monkeypatch, options, variable, message):
    assert SamplingParams(**options)

    monkeypatch.setenv(f"VLLM_{variable}", "2")
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)

    monkeypatch.setenv(f"JAXLLM_{variable}", "3")  # ours counts before vLLM's
    assert SamplingParams(**options)


def test_limits_without_an_environment_are_those_of_vllm():
    assert limit("MAX_N_SEQUENCES") == 16384
    assert limit("MAX_STOP_STRINGS") is None
    assert limit("MAX_NUM_BAD_WORDS") == 128
    assert limit("MAX_BAD_WORDS_TOTAL_TOKENS") == 1024


@pytest.mark.parametrize("value", ["many", "-1", "0", "1.5"])
def test_limit_that_is_no_number_is_refused(monkeypatch, value):
    monkeypatch.setenv("JAXLLM_MAX_N_SEQUENCES", value)

    with pytest.raises(ConfigError, match=f"JAXLLM_MAX_N_SEQUENCES='{value}' must be an integer"):
        SamplingParams()


# ---------------------------------------------------------------- with a model


def test_what_fits_the_model_passes():
    params = SamplingParams(stop_token_ids=[9], logit_bias={9: 1}, logprobs=5, prompt_logprobs=5)

    params.check(vocab_size=10, max_logprobs=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_token_ids", [1, 10, 11]),
        ("logit_bias", {1: 1, 10: 1, 11: 1}),
        ("allowed_token_ids", [1, 10, 11]),
        ("logprob_token_ids", [1, 10, 11]),
    ],
)
def test_tokens_that_the_model_has_not_are_refused(name, value):
    params = SamplingParams(**{name: value})

    with pytest.raises(
        RequestError,
        match=rf"{name} contain out-of-vocab token ids \[10, 11\]\. Vocabulary size: 10\.",
    ):
        params.check(vocab_size=10, max_logprobs=20)


def test_many_strange_tokens_are_not_all_listed():
    with pytest.raises(RequestError, match=r"ids \[10, .* 17\] and 82 more\. Vocabulary"):
        SamplingParams(allowed_token_ids=range(100)).check(vocab_size=10, max_logprobs=20)


@pytest.mark.parametrize(("name", "kind"), [("logprobs", "sample"), ("prompt_logprobs", "prompt")])
def test_more_logprobs_than_the_engine_returns_are_refused(name, kind):
    with pytest.raises(
        RequestError,
        match=f"Requested {kind} logprobs of 6, which is greater than max allowed: 5. "
        "Pass max_logprobs=6 to LLM",
    ):
        SamplingParams(**{name: 6}).check(vocab_size=10, max_logprobs=5)


@pytest.mark.parametrize(("name", "kind"), [("logprobs", "sample"), ("prompt_logprobs", "prompt")])
def test_logprobs_of_all_tokens_need_the_engine_to_allow_as_many(name, kind):
    params = SamplingParams(**{name: -1})

    params.check(vocab_size=10, max_logprobs=10)
    params.check(vocab_size=10, max_logprobs=-1)
    with pytest.raises(
        RequestError, match=f"{kind} logprobs of 10, .* allowed: 9. Pass max_logprobs=-1 to LLM"
    ):
        params.check(vocab_size=10, max_logprobs=9)


def test_an_engine_without_a_bound_returns_any_number_of_logprobs():
    SamplingParams(logprobs=500).check(vocab_size=10, max_logprobs=-1)


# ---------------------------------------------------------------- making and showing


@pytest.mark.parametrize("name", REMOVED)
def test_removed_parameter_says_what_to_do_instead(name):
    with pytest.raises(TypeError, match=f"SamplingParams does not take '{name}': ") as caught:
        SamplingParams(**{name: 5})

    assert REMOVED[name] in str(caught.value)
    assert SamplingParams(**{name: None}) == SamplingParams()


def test_removed_truncation_points_to_its_new_place():
    with pytest.raises(TypeError, match="tokenization_kwargs="):
        SamplingParams(truncate_prompt_tokens=5)


@pytest.mark.parametrize("name", ["guided_decoding", "structured_outputs"])
def test_structured_outputs_are_said_to_be_missing(name):
    with pytest.raises(TypeError, match="structured outputs are not implemented yet"):
        SamplingParams(**{name: {"json": "{}"}})


@pytest.mark.parametrize("name", UNUSED)
def test_parameters_that_change_no_result_are_dropped(name):
    assert SamplingParams(**{name: 1}) == SamplingParams()


def test_no_parameter_is_in_two_tables():
    fields = {field.name for field in dataclasses.fields(SamplingParams)}

    assert not fields & set(REMOVED)
    assert not fields & set(UNUSED)
    assert not set(REMOVED) & set(UNUSED)


def test_none_stands_for_the_default_where_it_is_optional():
    params = SamplingParams.from_optional(n=None, temperature=None, top_k=5, stop=None)

    assert params == SamplingParams(top_k=5)
    assert isinstance(params.max_tokens, DefaultInt)


def test_open_max_tokens_stay_open_where_it_is_optional():
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None


def test_a_changed_copy_is_checked():
    params = SamplingParams(logprobs=5)

    params.temperature, params.top_k, params.stop = 0, 9, "x"

    assert params.clone() == SamplingParams(temperature=0, stop=["x"], logprobs=5)
    params.n = 2
    with pytest.raises(RequestError, match="n must be 1 when using greedy sampling"):
        params.clone()


def test_repr_shows_what_is_not_by_default_and_makes_it_again():
    params = SamplingParams(temperature=0, stop="a", logit_bias={"3": 1}, max_tokens=5)

    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(params) == (
        "SamplingParams(temperature=0.0, stop=('a',), max_tokens=5, logit_bias={3: 1.0})"
    )
    assert eval(repr(params)) == params


def test_a_raised_temperature_is_said_once(caplog):
    with caplog.at_level("WARNING", "jaxllm"):
        SamplingParams(temperature=0.001).clone()

    assert [record.getMessage() for record in caplog.records] == [
        "temperature=0.001 is raised to 0.01; use 0 for greedy"
    ]


def test_the_default_of_max_tokens_is_16():
    assert DEFAULT_MAX_TOKENS == 16
    assert isinstance(DEFAULT_MAX_TOKENS, DefaultInt)
