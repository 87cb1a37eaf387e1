"""Every wrong input gives its sentence, and the engine answers rightly afterwards."""

import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import (
    LLM,
    CheckpointError,
    ConfigError,
    JaxLLMError,
    NonFiniteError,
    RequestError,
    SamplingParams,
)
from jaxllm.demo.tokenizer import train_tokenizer
from jaxllm.loading import Wishes, plan_load
from tests.arrays import no_new_arrays
from tests.tiny import Naive, sharder, tiny_checkpoint, tiny_model

VOCAB_SIZE = 300
NAN_TOKEN = VOCAB_SIZE - 1
MAX_LEN = 32
SMALL = {
    "max_model_len": MAX_LEN,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 20,
    "use_tqdm_on_load": False,
}
PROMPT = [3, 141, 59, 26, 5]
GREEDY = SamplingParams(temperature=0, max_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in which one token's embedding is NaN."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = np.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["ab abc"], vocab_size=258, max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder, tokenizer):
    with LLM(folder, tokenizer=tokenizer, **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected():
    _, model, params = tiny_model(vocab_size=VOCAB_SIZE)
    return Naive(model, params, length=MAX_LEN).generate(PROMPT, GREEDY.max_tokens)


def answer(llm, params=GREEDY):
    return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


# ---------------------------------------------------------------- generate


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1] * MAX_LEN, "maximum context length is 32 tokens.*contains 32 input tokens.*Shorten"),
        ("a b " * 40, "maximum context length is 32 tokens.*contains .* input tokens"),
        ("", "The decoder prompt cannot be empty"),
        ([[]], "prompts.0. is empty"),
        ({"prompt_token_ids": []}, "'prompt_token_ids' of the prompt is "),
        ([PROMPT, [VOCAB_SIZE]], "Token id 300 is out of vocabulary: ids go from 0 to 299"),
        ([1, -1], "Token id -1 is out of vocabulary"),
        ([1, 2**40], "Token id 1099511627776 is out of vocabulary"),
        ([1.0, 2.0], r"Prompt should be a string.*prompts\[0\] is float"),
        ([PROMPT, [1, "a"]], r"list of integers: prompts\[1\] holds something that is no integer"),
        ([PROMPT, None], r"prompts\[1\] is NoneType"),
        (None, "Prompt should be a string, list of tokens, or dictionary.*got NoneType"),
        (5, "got int"),
        (b"text", "Prompt should be a string, list of tokens, or dictionary"),
        (np.zeros((2, 2)), "got ndarray"),
        ([{"prompt": "a", "promt_token_ids": [1]}], r"prompts\[0\] has the keys \['promt_token"),
        ({}, "must contain text or tokens: the prompt has neither"),
        ({"prompt": 5}, "Prompt text should be a string; that of the prompt is 5"),
        ({"prompt_token_ids": "ab"}, "'prompt_token_ids' of the prompt is not"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt of the prompt must be a non-empty string"),
    ],
)
def test_bad_prompt_is_refused_and_the_next_is_answered(llm, expected, prompts, message):
    steps = llm.stats()["num_steps"]

    with pytest.raises(RequestError, match=f"(?s){message}"):
        llm.generate(prompts, GREEDY)

    assert llm.stats()["num_steps"] == steps
    assert answer(llm) == expected
    assert llm.stats()["num_pages_held"] == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([GREEDY], r"lengths of prompts \(2\) and params \(1\) must be the same"),
        ([GREEDY] * 3, r"lengths of prompts \(2\) and params \(3\) must be the same"),
        ([], r"lengths of prompts \(2\) and params \(0\) must be the same"),
        ([GREEDY, None], r"must be a SamplingParams.*got NoneType"),
        ({"temperature": 0, "max_tokens": 3}, "must be a SamplingParams.*got dict"),
        (SamplingParams, "must be a SamplingParams.*got the class itself"),
        (0.5, "must be a SamplingParams.*got float"),
        ("greedy", "must be a SamplingParams.*got str"),
        (
            SamplingParams(stop_token_ids=[1, 300, 301]),
            r"stop_token_ids contain out-of-vocab token ids \[300, 301\]. Vocabulary size: 300",
        ),
        (
            SamplingParams(logprobs=21),
            "logprobs of 21, which is greater than max allowed: 20. Pass max_logprobs=21 to LLM",
        ),
    ],
)
def test_bad_params_are_refused_and_the_next_call_is_answered(llm, expected, params, message):
    steps = llm.stats()["num_steps"]

    with pytest.raises(RequestError, match=message):
        llm.generate([PROMPT, [1]], params)

    assert llm.stats()["num_steps"] == steps
    assert answer(llm) == expected
    assert llm.stats()["num_pages_held"] == 0


def test_model_that_gives_nan_is_named_and_poisons_nothing(llm, expected):
    long_enough_to_fill_a_page = [NAN_TOKEN] * 20

    with pytest.raises(NonFiniteError, match=r"NaN or infinite logits for request .* in float32"):
        llm.generate([PROMPT, long_enough_to_fill_a_page], GREEDY, use_tqdm=False)

    assert answer(llm) == expected
    assert llm.stats()["num_pages_held"] == 0


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([], GREEDY) == []
    assert llm.generate([], []) == []


def test_longest_prompt_that_fits_gets_one_token(llm):
    prompt = (PROMPT * 7)[: MAX_LEN - 1]

    output = llm.generate(prompt, SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0]

    assert len(output.token_ids) == 1
    assert output.finish_reason == "length"


def test_text_without_a_tokenizer_is_refused(folder, expected):
    with LLM(folder, skip_tokenizer_init=True, **SMALL) as llm:
        with pytest.raises(RequestError, match="is text and skip_tokenizer_init=True"):
            llm.generate([PROMPT, "text"], GREEDY)

        assert answer(llm, SamplingParams(temperature=0, max_tokens=1)) == expected[:1]
        assert llm.stats()["num_pages_held"] == 0


# ---------------------------------------------------------------- SamplingParams


def test_misspelt_sampling_param_names_the_nearest():
    message = "SamplingParams got an unexpected keyword argument 'temprature'; did you mean 'temper"
    with pytest.raises(TypeError, match=message):
        SamplingParams(temprature=0.5)


# ---------------------------------------------------------------- LLM(...)


def test_misspelt_keyword_names_the_nearest_and_all(folder):
    with pytest.raises(TypeError) as caught:
        LLM(folder, max_model_lenght=16)

    message = str(caught.value)
    assert "LLM got an unexpected keyword argument 'max_model_lenght'; did you mean" in message
    assert "'max_model_len'?" in message
    assert "gpu_memory_utilization" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "Unknown dtype 'float8'. Use 'auto' or one of .*'bfloat16'"),
        ({"dtype": np.float32}, "Unknown dtype .*float32"),
        (
            {"max_model_len": 129},
            r"max_model_len \(129\) is greater than .*=128\). Use 128 or less",
        ),
        ({"max_model_len": 0}, "max_model_len=0 is neither a number of tokens nor 'auto'.*is 128"),
        ({"max_model_len": -2}, "max_model_len=-2 is neither"),
        ({"max_model_len": "4k"}, "max_model_len='4k' is neither"),
        ({"max_model_len": 64.0}, "max_model_len=64.0 is neither"),
        ({"max_model_len": True}, "max_model_len=True is neither"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization=0.0 must be greater than 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5 must be .* at most 1"),
        ({"gpu_memory_utilization": 90}, "gpu_memory_utilization=90 must be .* at most 1"),
        ({"gpu_memory_utilization": -0.5}, "gpu_memory_utilization=-0.5 must be"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan must be"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9' must be"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes=0 must be at least 1"),
        ({"kv_cache_memory_bytes": "1GiB"}, "kv_cache_memory_bytes='1GiB' must be an integer"),
        ({"kv_cache_memory_bytes": 1 << 50}, "kv_cache_memory_bytes=1125899906842624 is more than"),
        ({"block_size": 24}, "block_size=24 is not a power of two. Use 16"),
        ({"block_size": 0}, "block_size=0 is not a power of two"),
        ({"block_size": 16.0}, "block_size=16.0 must be an integer"),
        ({"block_size": "16"}, "block_size='16' must be an integer"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5 must be an integer"),
        ({"max_num_seqs": "2"}, "max_num_seqs='2' must be an integer"),
        ({"max_num_seqs": True}, "max_num_seqs=True must be an integer"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens=-1 must be at least 1"),
        ({"max_num_batched_tokens": "x"}, "max_num_batched_tokens='x' must be an integer"),
        (
            {"max_num_batched_tokens": 16, "max_num_seqs": 17},
            r"max_num_batched_tokens \(16\) must be greater than or equal to max_num_seqs \(17\)",
        ),
        (
            {"max_num_batched_tokens": 16, "enable_chunked_prefill": False},
            r"max_num_batched_tokens \(16\) is smaller than max_model_len \(32\) and chunked",
        ),
        ({"max_logprobs": "many"}, "max_logprobs='many' must be an integer"),
        ({"load_format": "pt"}, "load_format='pt' is not supported. Use 'auto', 'safetensors'"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"seed": "x"}, "seed='x' must be an integer of at least 0"),
    ],
)
def test_bad_option_is_refused_and_nothing_is_left(folder, options, message):
    with no_new_arrays(), pytest.raises(ConfigError, match=message):
        LLM(folder, skip_tokenizer_init=True, **{**SMALL, **options})


def test_wrong_share_of_memory_never_reaches_the_backend(folder, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)

    with pytest.raises(ConfigError, match="gpu_memory_utilization=90 must be"):
        LLM(folder, skip_tokenizer_init=True, **SMALL, gpu_memory_utilization=90)

    assert not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ)


def test_numpy_integers_are_integers(folder):
    wishes = Wishes(max_model_len=np.int64(MAX_LEN), max_num_seqs=np.int32(2))

    engine = plan_load(folder, wishes, sharder(), "auto").engine

    assert (engine.max_model_len, engine.max_num_seqs) == (MAX_LEN, 2)


def test_any_seed_makes_dummy_weights(folder):
    for seed in (None, 1 << 70):
        LLM(folder, skip_tokenizer_init=True, **SMALL, load_format="dummy", seed=seed).close()


# What fails, and the numbers of its message that must work in its place.
TOO_SMALL = [
    ({"cache_bytes": 1}, "No available memory for the cache blocks", ["kv_cache_memory_bytes"]),
    (
        {"cache_bytes": 20_000, "page_size": 16},
        r"To serve at least one request with the model's max seq len \(128\)",
        ["kv_cache_memory_bytes", "max_model_len"],
    ),
    (
        {"cache_bytes": 20_000, "max_model_len": 100, "page_size": 8},
        r"max seq len \(100\)",
        ["kv_cache_memory_bytes", "max_model_len"],
    ),
    (
        {"memory_fraction": 1e-4},
        "No available memory.*Try increasing `gpu_memory_utilization`",
        ["kv_cache_memory_bytes"],
    ),
]
FIELDS = {"kv_cache_memory_bytes": "cache_bytes", "max_model_len": "max_model_len"}


@pytest.mark.parametrize(("wishes", "message", "cures"), TOO_SMALL)
def test_cache_too_small_names_numbers_that_work(folder, wishes, message, cures):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_load(folder, Wishes(**wishes), sharder(), "auto")

    for cure in cures:
        number = int(re.search(rf"{cure}=(\d+)", str(caught.value))[1])
        plan = plan_load(folder, Wishes(**{**wishes, FIELDS[cure]: number}), sharder(), "auto")
        assert plan.memory.num_tokens >= plan.engine.max_model_len
        beyond = number + 1 if cure == "max_model_len" else number - 1
        with pytest.raises(ConfigError):  # the number is no guess: the next one fails
            plan_load(folder, Wishes(**{**wishes, FIELDS[cure]: beyond}), sharder(), "auto")


def test_auto_length_takes_what_a_small_cache_holds(folder):
    plan = plan_load(
        folder, Wishes(cache_bytes=20_000, page_size=16, max_model_len="auto"), sharder(), "auto"
    )

    assert plan.engine.max_model_len == plan.memory.num_tokens == 48


def test_folder_without_a_tokenizer_says_what_to_pass(folder):
    message = "has no tokenizer that transformers can read.*tokenizer=.*skip_tokenizer_init=True"
    with no_new_arrays(), pytest.raises(CheckpointError, match=f"(?s){message}"):
        LLM(folder, **SMALL)


def test_closed_llm_says_so_and_closes_again(folder):
    llm = LLM(folder, skip_tokenizer_init=True, **SMALL)
    llm.close()
    llm.close()

    for use in (lambda: llm.generate(PROMPT, GREEDY), llm.stats):
        with pytest.raises(
            JaxLLMError, match=rf"This LLM \({re.escape(str(folder))}\) is closed\. Make"
        ):
            use()
    assert "closed" in repr(llm)
