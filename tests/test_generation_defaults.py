import logging

import pytest

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.generation_defaults import KEYS, OVERRIDES, default_sampling_params
from jaxllm.sampling_params import DefaultInt, SamplingParams


def test_without_a_file_the_defaults_are_those_of_vllm():
    params = default_sampling_params(None, {})

    assert params == SamplingParams()
    assert isinstance(params.max_tokens, DefaultInt)


def test_every_key_of_the_file_is_used():
    stated = {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "temperature": 0.75,
        "top_k": 20,
        "top_p": 0.5,
        "min_p": 0.125,
        "max_new_tokens": 100,
        "skip_special_tokens": False,
    }

    params = default_sampling_params(stated, {})

    assert set(stated) == set(KEYS)
    assert params == SamplingParams(
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        temperature=0.75,
        top_k=20,
        top_p=0.5,
        min_p=0.125,
        max_tokens=100,
        skip_special_tokens=False,
    )
    assert not isinstance(params.max_tokens, DefaultInt)


def test_other_keys_of_the_file_and_nulls_are_not_read():
    stated = {"do_sample": False, "eos_token_id": [1, 2], "num_beams": 4, "temperature": None}

    assert default_sampling_params(stated, {}) == SamplingParams()


def test_caller_goes_before_the_file():
    params = default_sampling_params({"temperature": 0.5, "top_k": 5}, {"temperature": 1.5})

    assert params == SamplingParams(temperature=1.5, top_k=5)


def test_caller_may_take_a_value_of_the_file_away():
    assert default_sampling_params({"temperature": 0.5}, {"temperature": None}) == SamplingParams()


@pytest.mark.parametrize("key", ["max_tokens", "max_new_tokens"])
def test_caller_may_say_either_name_of_max_tokens(key):
    params = default_sampling_params({"max_new_tokens": 7}, {key: 9})

    assert params.max_tokens == 9


def test_both_names_of_max_tokens_are_refused():
    with pytest.raises(ConfigError, match="both 'max_tokens' and 'max_new_tokens', which are one"):
        default_sampling_params(None, {"max_tokens": 9, "max_new_tokens": 9})


def test_greedy_caller_of_a_sampling_model_gets_greedy():
    params = default_sampling_params({"top_p": 0.5, "top_k": 5}, {"temperature": 0})

    assert params == SamplingParams(temperature=0)


def test_unknown_key_of_the_caller_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError,
        match=r"override_generation_config has an unknown key 'temprature'; did you mean "
        r"'temperature'\?",
    ) as caught:
        default_sampling_params({}, {"temprature": 1})

    assert all(key in str(caught.value) for key in OVERRIDES)


@pytest.mark.parametrize("overrides", ["temperature", [("temperature", 1)], 5])
def test_changes_that_are_no_dict_are_refused(overrides):
    with pytest.raises(ConfigError, match=r"override_generation_config must be a dict such as"):
        default_sampling_params({}, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"temperature": 3}, r"override_generation_config=.* cannot be used: temperature must be"),
        ({"max_new_tokens": 0}, "cannot be used: max_tokens must be at least 1, got 0"),
        ({"skip_special_tokens": "yes"}, "cannot be used: skip_special_tokens must be True or"),
    ],
)
def test_wrong_value_of_the_caller_is_the_callers_fault(overrides, message):
    with pytest.raises(ConfigError, match=message):
        default_sampling_params({"temperature": 0.5}, overrides)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"top_p": 5}, r"top_p must be in \(0, 1\], got 5. Mend the file, pass override"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": 5.5}, "top_k must be an integer"),
    ],
)
def test_wrong_value_of_the_file_is_the_files_fault(stated, message):
    with pytest.raises(
        CheckpointError, match=f"generation_config.json of the model cannot be used: {message}"
    ):
        default_sampling_params(stated, {})


def test_wrong_value_of_the_file_may_be_overridden():
    assert default_sampling_params({"top_p": 5}, {"top_p": 0.5}) == SamplingParams(top_p=0.5)


@pytest.mark.parametrize("stated", [[], "text", 5])
def test_file_that_holds_no_object_is_refused(stated):
    with pytest.raises(CheckpointError, match=r"generation_config.json holds a \w+ and must hold"):
        default_sampling_params(stated, {})


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_what_the_file_changes_is_said(monkeypatch):
    logger, said = logging.getLogger("jaxllm"), Said()
    monkeypatch.setattr(logger, "handlers", [said])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()

    default_sampling_params({"temperature": 0.5, "max_new_tokens": 7}, {})
    default_sampling_params({"do_sample": True}, {})

    assert said.messages == [
        "sampling defaults of the model's generation_config.json: temperature=0.5, max_tokens=7; "
        "generation_config='vllm' leaves it unread"
    ]
