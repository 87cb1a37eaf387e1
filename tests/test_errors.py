import pytest

from jaxllm import errors
from jaxllm.errors import JaxLLMError, nearest

CALLERS_FAULT = ["ConfigError", "UnsupportedModelError", "CheckpointError", "RequestError"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_token", "; did you mean 'max_tokens'?"),
        ("temprature", "; did you mean 'temperature'?"),
        ("xyz", ""),
    ],
)
def test_nearest_names_the_closest_known_name_or_nothing(name, hint):
    assert nearest(name, ["temperature", "max_tokens", "min_tokens"]) == hint


def test_nearest_reads_any_iterable():
    assert nearest("qwen", iter(["qwen3", "llama"])) == "; did you mean 'qwen3'?"


def test_nothing_is_nearest_among_nothing():
    assert nearest("a", []) == ""


@pytest.mark.parametrize("name", CALLERS_FAULT)
def test_what_a_caller_can_mend_is_a_value_error(name):
    assert issubclass(getattr(errors, name), ValueError)


def test_every_error_can_be_caught_as_one():
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]

    assert len(found) > len(CALLERS_FAULT)
    assert all(issubclass(error, JaxLLMError) for error in found)
