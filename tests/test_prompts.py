import numpy as np
import pytest

from jaxllm.errors import RequestError
from jaxllm.prompts import Prompt, parse_prompts


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("hello", Prompt("hello", None)),
        ("", Prompt("", None)),
        ([1, 2, 3], Prompt(None, [1, 2, 3])),
        ((1, 2, 3), Prompt(None, [1, 2, 3])),
        (range(3), Prompt(None, [0, 1, 2])),
        ([np.int32(1), np.int64(2)], Prompt(None, [1, 2])),
        ({"prompt": "hello"}, Prompt("hello", None)),
        ({"prompt_token_ids": [1, 2]}, Prompt(None, [1, 2])),
        ({"prompt_token_ids": [1], "prompt": "hello"}, Prompt("hello", [1])),
        ({"prompt": "hello", "cache_salt": "mine"}, Prompt("hello", None, "mine")),
        ({"prompt": "hello", "prompt_token_ids": None, "cache_salt": None}, Prompt("hello", None)),
    ],
)
def test_one_prompt_is_read_alone_and_in_a_list(given, prompt):
    assert parse_prompts(given) == [prompt]
    assert parse_prompts([given, "other"]) == [prompt, Prompt("other", None)]


def test_token_ids_become_plain_integers():
    (prompt,) = parse_prompts([np.int32(1)])

    assert type(prompt.token_ids[0]) is int


def test_no_prompts_are_no_prompts():
    assert parse_prompts([]) == []


def test_a_list_may_mix_all_kinds():
    prompts = parse_prompts(["a", [1, 2], {"prompt": "b"}])

    assert prompts == [Prompt("a", None), Prompt(None, [1, 2]), Prompt("b", None)]


@pytest.mark.parametrize("given", [None, 5, 1.5, {1, 2}, np.array([[1, 2]]), iter(["a"])])
def test_what_is_no_prompt_and_no_list_is_refused(given):
    name = type(given).__name__

    with pytest.raises(RequestError, match=f"or a list of those; got {name}"):
        parse_prompts(given)


@pytest.mark.parametrize("strange", [None, 1.5, b"bytes"])
def test_what_is_no_prompt_in_a_list_is_refused_by_its_place(strange):
    name = type(strange).__name__

    with pytest.raises(RequestError, match=rf"or dictionary; prompts\[1\] is {name}\."):
        parse_prompts(["a", strange])


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_integer_arrays_are_token_prompts(dtype):
    array = np.arange(3, dtype=dtype)

    (alone,) = parse_prompts(array)
    in_a_list = parse_prompts([array, {"prompt_token_ids": array}])

    assert [alone, *in_a_list] == [Prompt(None, [0, 1, 2])] * 3
    assert type(alone.token_ids[0]) is int


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.array([1.5]), "holds something that is no integer"),
        (np.array([True]), "holds something that is no integer"),
        (np.array([[1, 2]]), "holds something that is no integer"),
        (np.array([], int), "is empty"),
    ],
)
def test_other_arrays_in_a_list_are_refused_by_their_place(array, what):
    with pytest.raises(RequestError, match=rf"list of integers: prompts\[0\] {what}\."):
        parse_prompts([array])


def test_a_float_in_an_array_is_no_token():
    with pytest.raises(RequestError, match=r"prompts\[0\] is ndarray\."):
        parse_prompts([np.array(1.5)])


@pytest.mark.parametrize("given", [b"hello", bytearray(b"hello")])
def test_bytes_are_refused_by_their_name(given):
    with pytest.raises(RequestError, match=f"or a list of those; got {type(given).__name__}"):
        parse_prompts(given)


def test_an_empty_list_of_tokens_is_refused():
    with pytest.raises(RequestError, match=r"list of integers: prompts\[1\] is empty\."):
        parse_prompts([[1], []])


@pytest.mark.parametrize("tokens", [[1, 1.5], [1, "a"], [True]])
def test_tokens_that_are_no_integers_are_refused(tokens):
    with pytest.raises(
        RequestError, match=r"list of integers: prompts\[0\] holds something that is no integer\."
    ):
        parse_prompts([tokens])


def test_unknown_keys_are_refused_and_the_known_ones_named():
    with pytest.raises(
        RequestError,
        match=r"prompts\[0\] has the keys \['promt', 'prumpt'\]; "
        r"jaxllm reads \['prompt', 'prompt_token_ids', 'cache_salt'\]\.",
    ):
        parse_prompts([{"prumpt": "a", "promt": "a", "multi_modal_data": None}])


def test_unknown_keys_that_are_no_text_are_refused_too():
    with pytest.raises(RequestError, match="the prompt has the keys "):
        parse_prompts({"prompt": "a", 1: None, "x": None})


@pytest.mark.parametrize("given", [{}, {"cache_salt": "a"}, {"prompt": None}])
def test_a_dictionary_without_text_and_tokens_is_refused(given):
    with pytest.raises(
        RequestError,
        match="must contain text or tokens: the prompt has neither 'prompt' nor 'prompt_token_ids'",
    ):
        parse_prompts(given)


def test_text_that_is_no_string_is_refused():
    with pytest.raises(
        RequestError, match=r"Prompt text should be a string; that of the prompt is 5\."
    ):
        parse_prompts({"prompt": 5})


@pytest.mark.parametrize("tokens", ["abc", [], [1.5], 5])
def test_tokens_of_a_dictionary_that_are_no_list_of_integers_are_refused(tokens):
    with pytest.raises(
        RequestError, match=r"list of integers; 'prompt_token_ids' of prompts\[0\] is (not|empty)\."
    ):
        parse_prompts([{"prompt_token_ids": tokens}])


@pytest.mark.parametrize("salt", ["", 5])
def test_a_salt_that_is_no_text_is_refused(salt):
    with pytest.raises(
        RequestError, match=rf"cache_salt of the prompt must be a non-empty string, got {salt!r}\."
    ):
        parse_prompts({"prompt": "a", "cache_salt": salt})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("multi_modal_data", "this model reads text only. Leave it out"),
        ("multi_modal_uuids", "this model reads text only. Leave it out"),
        ("mm_processor_kwargs", "this model reads text only. Leave it out"),
        ("prompt_embeds", "embeddings as prompts are not implemented. Pass 'prompt' or"),
        ("encoder_prompt", "Cannot pass encoder-decoder prompt to decoder-only models. Pass"),
        ("decoder_prompt", "Cannot pass encoder-decoder prompt to decoder-only models. Pass"),
    ],
)
def test_what_the_models_cannot_read_is_refused_unless_it_is_nothing(key, message):
    with pytest.raises(RequestError, match=rf"prompts\[1\] has '{key}': {message}"):
        parse_prompts(["a", {"prompt": "a", key: np.zeros((2, 2))}])

    assert parse_prompts({"prompt": "a", key: None}) == [Prompt("a", None)]
