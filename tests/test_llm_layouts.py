"""`LLM` over several devices: sampling, padding, what is said, what is refused."""

import shutil
import time

import numpy as np
import pytest

from jaxllm import LLM, ConfigError, Layout, RequestOutput, SamplingParams
from tests.layouts import EIGHT_HEADS
from tests.tiny import VOCAB_SIZE, random_prompts, tiny_checkpoint

SMALL = {
    "max_model_len": 48,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 1 << 20,
    "skip_tokenizer_init": True,
    "use_tqdm_on_load": False,
}
PROMPTS = random_prompts(4, 20, seed=5, shortest=3)
CROSS = [pytest.mark.cross, pytest.mark.slow]
LAYOUTS = {
    "tensor": {"tensor_parallel_size": 8},
    "tensor_2d": {"tensor_parallel_size": 8, "layout": "tensor_2d"},
    "sequence": {"tensor_parallel_size": 4, "layout": "sequence", "devices": [7, 6, 5, 4]},
    "own": {"layout": {"mesh": {"x": 2}, "rules": {"vocab": "x", "mlp": "x"}}, "devices": [1, 3]},
}
# All in one program: compiling is what takes time here.
EVERYTHING = SamplingParams(
    seed=2,
    max_tokens=6,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    logit_bias={5: 4.0, 100: 3.0},
    allowed_token_ids=[*range(1, 90), 99, 100],
    logprobs=5,
    prompt_logprobs=3,
)
NAMED = SamplingParams(temperature=0, max_tokens=6, logprob_token_ids=[0, 31, 100])


def outputs(llm: LLM) -> list[RequestOutput]:
    """A step for all prompts, then decodes; and once more for tokens that are named."""
    return [
        *llm.generate(PROMPTS, EVERYTHING, use_tqdm=False),
        *llm.generate(PROMPTS, NAMED, use_tqdm=False),
    ]


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llama", **EIGHT_HEADS)


@pytest.fixture(scope="module")
def expected(folder):
    """By mode, what one device gives."""
    made = {}

    def of(mode):
        if mode not in made:
            with LLM(folder, logprobs_mode=mode, **SMALL) as llm:
                made[mode] = outputs(llm)
        return made[mode]

    return of


def assert_close(found, wanted):
    """The same tokens in the same order, and log-probabilities but for rounding."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        for token in theirs or ():
            assert ours[token].rank == theirs[token].rank
            np.testing.assert_allclose(ours[token].logprob, theirs[token].logprob, atol=1e-4)
        assert list(ours or ()) == list(theirs or ())


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        ("tensor", "raw_logprobs"),
        *(pytest.param(name, "raw_logprobs", marks=CROSS) for name in LAYOUTS if name != "tensor"),
        pytest.param("tensor", "processed_logprobs", marks=CROSS),
    ],
)
def test_every_way_to_sample_gives_what_one_device_does(folder, expected, layout, mode):
    with LLM(folder, logprobs_mode=mode, **LAYOUTS[layout], **SMALL) as llm:
        found = outputs(llm)

    for one, other in zip(found, expected(mode), strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert_close(one.outputs[0].logprobs, other.outputs[0].logprobs)
        assert_close(one.prompt_logprobs or [], other.prompt_logprobs or [])


@pytest.mark.parametrize("mode", ["processed_logprobs", pytest.param("raw_logprobs", marks=CROSS)])
def test_padding_is_neither_sampled_nor_in_logprobs(checkpoints, mode):
    # So flat and so hot that every column would be drawn.
    folder = checkpoints("llama", std=0.02, **EIGHT_HEADS)
    params = SamplingParams(
        temperature=2, max_tokens=24, logprobs=-1, top_k=VOCAB_SIZE, ignore_eos=True
    )
    options = {**SMALL, "max_logprobs": -1, "logprobs_mode": mode}

    with LLM(folder, tensor_parallel_size=8, **options) as llm:
        found = llm.generate(PROMPTS * 8, params, use_tqdm=False)
        banned = llm.generate(
            PROMPTS[0],
            SamplingParams(temperature=0, max_tokens=1, logprobs=-1, allowed_token_ids=[3, 4]),
            use_tqdm=False,
        )

    drawn = {token for output in found for token in output.outputs[0].token_ids}
    assert len(drawn) > VOCAB_SIZE // 2
    assert max(drawn) < VOCAB_SIZE
    for output in (*found, *banned):
        for row in output.outputs[0].logprobs:
            assert sorted(row) == list(range(VOCAB_SIZE))
            assert max(one.rank for one in row.values()) <= VOCAB_SIZE
            assert sum(np.exp(one.logprob) for one in row.values()) == pytest.approx(1, abs=1e-4)


def test_scores_are_those_of_one_device(folder):
    contexts, ends = PROMPTS[:2], [PROMPTS[2], PROMPTS[3]]
    with LLM(folder, **SMALL) as llm:
        wanted = llm.score_completions(contexts, ends, use_tqdm=False)

    with LLM(folder, tensor_parallel_size=8, **SMALL) as llm:
        found = llm.score_completions(contexts, ends, use_tqdm=False)

    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_array_equal(one.ranks, other.ranks)


def test_two_models_live_on_devices_of_their_own(checkpoints, folder):
    greedy = SamplingParams(temperature=0, max_tokens=6)
    alone = {}
    for name, place in {"one": folder, "other": checkpoints("gpt2")}.items():
        with LLM(place, **SMALL) as llm:
            alone[name] = llm.generate(PROMPTS, greedy, use_tqdm=False)

    with (
        LLM(folder, tensor_parallel_size=2, devices=[2, 3], **SMALL) as one,
        LLM(checkpoints("gpt2"), devices=[5], **SMALL) as other,
    ):
        both = {"one": one, "other": other}
        found = {name: llm.generate(PROMPTS, greedy, use_tqdm=False) for name, llm in both.items()}
        places = [
            {device.id for param in llm._engine.runner.params for device in param.devices()}
            for llm in both.values()
        ]

    assert places == [{2, 3}, {5}]
    for name, wanted in alone.items():
        tokens = [output.outputs[0].token_ids for output in found[name]]
        assert tokens == [output.outputs[0].token_ids for output in wanted]


def test_what_was_done_to_fit_is_logged(folder, caplog):
    with caplog.at_level("WARNING", "jaxllm"), LLM(folder, tensor_parallel_size=8, **SMALL):
        pass

    assert any("2 KV heads are fewer than tensor=8" in line for line in caplog.messages)
    assert any("101 tokens is padded to 104 for tensor=8" in line for line in caplog.messages)


def test_a_size_that_does_not_divide_is_refused_before_a_weight_is_looked_for(folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    start = time.perf_counter()

    with pytest.raises(ConfigError, match=r"num_attention_heads=8 .* tensor=1, 2, 4, 8\.$"):
        LLM(bare, tensor_parallel_size=3, **SMALL)

    assert time.perf_counter() - start < 1


def test_a_layout_that_splits_an_array_twice_is_refused(folder):
    layout = Layout("twice", {"x": 2}, {"embed": "x", "mlp": "x"})

    with pytest.raises(ConfigError, match=r"'twice' splits two axes of .* over one mesh axis"):
        LLM(folder, layout=layout, **SMALL)


def test_a_cache_split_over_devices_holds_as_many_tokens_more(checkpoints):
    folder = checkpoints("gpt2")
    tokens = {}
    for size in (1, 4):
        with LLM(folder, tensor_parallel_size=size, **SMALL) as llm:
            page_size = llm._live_engine().config.page_size
            tokens[size] = (llm.stats()["num_pages"] + 1) * page_size

    assert tokens[4] == 4 * tokens[1]


def test_dummy_weights_are_those_of_one_device(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    greedy = SamplingParams(temperature=0, max_tokens=6)
    found = []
    for size in (1, 4):
        with LLM(folder, load_format="dummy", tensor_parallel_size=size, **SMALL) as llm:
            found.append(llm.generate(PROMPTS, greedy, use_tqdm=False))

    one, four = ([output.outputs[0].token_ids for output in some] for some in found)
    assert one == four
