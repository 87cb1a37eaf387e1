"""Log-probabilities of given tokens: of prompts, and of completions behind them."""

import numpy as np
import pytest

from jaxllm import LLM, RequestError, SamplingParams
from tests.tiny import Naive, random_prompts, tiny_checkpoint, tiny_model

GAP = 1e-4
SETTINGS = {
    "skip_tokenizer_init": True,
    "use_tqdm_on_load": False,
    "block_size": 4,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,  # several chunks a prompt
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def naive():
    _, model, params = tiny_model()
    return Naive(model, params)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, **SETTINGS) as llm:
        yield llm


def log_softmax(logits):
    logits = logits.astype(np.float64)
    best = logits.max(-1, keepdims=True)
    return logits - best - np.log(np.exp(logits - best).sum(-1, keepdims=True))


def check_prompt(naive, output, count):
    """Every position against a full forward: values, ranks, the likeliest in order."""
    prompt, found = output.prompt_token_ids, output.prompt_logprobs
    assert found[0] is None
    assert len(found) == len(prompt)
    rows = log_softmax(naive.logits(prompt))
    for i, entry in enumerate(found[1:], start=1):
        row, token = rows[i - 1], prompt[i]
        assert next(iter(entry)) == token
        assert entry[token].logprob == pytest.approx(row[token], abs=GAP)
        assert entry[token].rank == (row >= row[token] - 1e-9).sum()
        best = [t for t in np.argsort(-row)[:count].tolist() if t != token]
        assert list(entry)[1:] == best
        assert all(entry[t].logprob == pytest.approx(row[t], abs=GAP) for t in best)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs_are_those_of_a_full_forward(folder, naive, caching, count):
    prompts = random_prompts(6, 60, seed=5)
    prompts += prompts[:2]  # in the prefix cache by now, and not read from it
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=count)
    with LLM(folder, enable_prefix_caching=caching, **SETTINGS) as llm:
        first = llm.generate(prompts, params, use_tqdm=False)
        again = llm.generate(prompts[::-1], params, use_tqdm=False)

    for output in (*first, *again):
        check_prompt(naive, output, count)
        assert output.num_cached_tokens == 0


def test_prompt_logprobs_survive_preemption(folder, naive):
    prompts = random_prompts(8, 50, seed=6, shortest=30)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, prompt_logprobs=1)
    with LLM(folder, num_gpu_blocks_override=48, max_model_len=96, **SETTINGS) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        preemptions = llm.stats()["num_preemptions"]

    assert preemptions > 0
    for output in outputs:
        check_prompt(naive, output, 1)


def test_a_prompt_of_one_token_has_nothing_to_score(llm):
    output = llm.generate([5], SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)[0]

    assert output.prompt_logprobs == [None]


def test_all_completions_of_a_prompt_share_its_logprobs(llm, naive):
    params = SamplingParams(n=3, temperature=1, max_tokens=2, prompt_logprobs=1)

    output = llm.generate(random_prompts(1, 20, seed=9, shortest=20), params, use_tqdm=False)[0]

    check_prompt(naive, output, 1)
    assert len(output.outputs) == 3


def test_the_whole_vocabulary_can_be_asked_for(folder, naive):
    prompt = random_prompts(1, 12, seed=2, shortest=12)[0]
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    with LLM(folder, max_logprobs=-1, **SETTINGS) as llm:
        output = llm.generate(prompt, params, use_tqdm=False)[0]

    check_prompt(naive, output, 101)
    assert all(len(entry) == 101 for entry in output.prompt_logprobs[1:])
    assert all(len(entry) == 101 for entry in output.outputs[0].logprobs)


# ---------------------------------------------------------------- completions


def check_score(naive, context, completion, score):
    rows = log_softmax(naive.logits(context + completion))[len(context) - 1 : -1]
    want = [row[token] for row, token in zip(rows, completion, strict=True)]
    ranks = [(row >= row[token] - 1e-9).sum() for row, token in zip(rows, completion, strict=True)]
    assert score.token_ids.tolist() == completion
    np.testing.assert_allclose(score.logprobs, want, atol=GAP)
    assert score.ranks.tolist() == ranks


@pytest.mark.parametrize("caching", [True, False])
def test_completions_are_scored_as_a_full_forward_does(folder, naive, caching):
    contexts = random_prompts(8, 40, seed=1)
    ends = random_prompts(8, 30, seed=2)
    with LLM(folder, enable_prefix_caching=caching, **SETTINGS) as llm:
        scores = llm.score_completions(contexts, ends, use_tqdm=False)
        again = llm.score_completions(contexts, ends, use_tqdm=False)

    for pair in zip(contexts, ends, scores, again, strict=True):
        check_score(naive, *pair[:3])
        check_score(naive, *pair[:2], pair[3])


def test_completions_of_one_context_compute_it_once(folder, naive):
    context = random_prompts(1, 40, seed=4, shortest=40)[0]
    ends = random_prompts(5, 6, seed=3)
    with LLM(folder, **SETTINGS) as llm:
        scores = llm.score_completions(context, ends, use_tqdm=False)
        hits = llm.stats()["prefix_tokens_hit"]
        num_tokens = llm.stats()["num_tokens"]

    for end, score in zip(ends, scores, strict=True):
        check_score(naive, context, end, score)
    assert hits >= 4 * 36
    assert num_tokens < 2 * len(context) + sum(map(len, ends))


def test_a_greedy_completion_is_known_as_one(llm, naive):
    context = random_prompts(1, 10, seed=8, shortest=10)[0]
    greedy = naive.generate(context, 5)
    other = [*greedy[:4], (greedy[4] + 1) % 101]

    best, worse = llm.score_completions(context, [greedy, other], use_tqdm=False)

    assert best.is_greedy
    assert not worse.is_greedy
    assert best.total == pytest.approx(best.logprobs.astype(np.float64).sum())


def test_context_and_completion_may_fill_the_model_to_its_last_token(llm, naive):
    whole = random_prompts(1, 128, seed=11, shortest=128)[0]

    score = llm.score_completions(whole[:100], [whole[100:]], use_tqdm=False)[0]

    check_score(naive, whole[:100], whole[100:], score)


def test_generation_goes_on_beside_scores(llm, naive):
    prompt = random_prompts(1, 20, seed=12, shortest=20)[0]
    llm.enqueue(prompt, SamplingParams(temperature=0, max_tokens=8))

    score = llm.score_completions(prompt, [[1, 2, 3]], use_tqdm=False)[0]
    output = llm.wait_for_completion(use_tqdm=False)[0]

    check_score(naive, prompt, [1, 2, 3], score)
    assert output.outputs[0].token_ids == naive.generate(prompt, 8)


@pytest.mark.parametrize(
    ("contexts", "ends", "message"),
    [
        ([[1, 2], [3]], [[4], [5], [6]], r"lengths of prompts \(2\) and completions \(3\)"),
        ([1, 2], [{"prompt": ""}], "skip_tokenizer_init=True"),
        ([1] * 100, [[2] * 29], "maximum context length is 128 tokens.*129 input tokens"),
        ([1, 2], [[500]], "Token id 500 is out of vocabulary"),
    ],
)
def test_what_cannot_be_scored_is_said(llm, contexts, ends, message):
    with pytest.raises(RequestError, match=message):
        llm.score_completions(contexts, ends, use_tqdm=False)
