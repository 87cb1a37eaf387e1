"""`SamplingParams` through `LLM.generate`, on the model that ships with the package."""

import random

import numpy as np
import pytest

from jaxllm import LLM, RequestError, SamplingParams
from jaxllm.sampling_params import RepetitionDetectionParams
from tests.tiny import random_prompts, tiny_checkpoint

PROMPT = "def main("


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", max_num_seqs=8, max_num_batched_tokens=128, use_tqdm_on_load=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("sampled"))


def run(llm, params, prompts=PROMPT):
    return [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]


def greedy(**params):
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params})


# ---------------------------------------------------------------- several completions


def test_completion_i_is_that_of_seed_plus_i(llm):
    params = {"temperature": 1.0, "max_tokens": 8}

    several = llm.generate(PROMPT, SamplingParams(n=3, seed=7, **params), use_tqdm=False)[0]
    alone = [run(llm, SamplingParams(seed=7 + i, **params))[0] for i in range(3)]

    assert [one.index for one in several.outputs] == [0, 1, 2]
    assert [one.token_ids for one in several.outputs] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in alone}) == 3


def test_completions_of_a_prompt_compute_it_once(tiny):
    prompt = random_prompts(1, 64, seed=1, shortest=64)[0]
    settings = {"skip_tokenizer_init": True, "block_size": 4, "max_num_batched_tokens": 512}
    with LLM(tiny, use_tqdm_on_load=False, **settings) as llm:
        llm.generate(prompt, SamplingParams(n=8, max_tokens=2), use_tqdm=False)
        num_tokens = llm.stats()["num_tokens"]

    # 8 x 4 tokens of the last page, which is not shared, and a step of 8 decodes.
    assert num_tokens <= 64 + 8 * 4 + 8


# ---------------------------------------------------------------- rules


def test_banned_words_are_not_said_in_one_token_or_several(llm):
    free = run(llm, greedy())[0]
    tokenizer = llm.get_tokenizer()
    word = tokenizer.decode(free.token_ids[2:5])

    ruled = run(llm, greedy(bad_words=[word]))[0]

    assert ruled.token_ids[:2] == free.token_ids[:2]
    assert free.token_ids[2:5] not in [ruled.token_ids[i : i + 3] for i in range(10)]


def test_bias_makes_a_token_certain_or_impossible(llm):
    first = run(llm, greedy())[0].token_ids[0]

    assert run(llm, greedy(logit_bias={17: 100}))[0].token_ids == [17] * 12
    assert first not in run(llm, greedy(logit_bias={first: -100}))[0].token_ids


def test_only_allowed_tokens_come(llm):
    allowed = [5, 9, 300]

    tokens = run(llm, SamplingParams(max_tokens=30, seed=1, allowed_token_ids=allowed))[0].token_ids

    assert set(tokens) <= set(allowed)


def test_rules_that_leave_nothing_are_an_error_and_the_engine_goes_on(llm):
    first = run(llm, greedy())[0]
    nothing = greedy(allowed_token_ids=[5], min_tokens=3, stop_token_ids=[5])

    with pytest.raises(RequestError, match=r"rules of request \d+ leave no token to choose"):
        run(llm, nothing)
    outputs = llm.generate([PROMPT] * 2, [nothing, greedy()], use_tqdm=False, on_error="return")

    assert isinstance(outputs[0].error, RequestError)
    assert outputs[1].outputs[0].token_ids == first.token_ids
    assert run(llm, greedy())[0].token_ids == first.token_ids


def test_min_tokens_holds_back_every_end(llm):
    free = run(llm, greedy())[0]
    stops = sorted(set(free.token_ids))

    ended = run(llm, greedy(stop_token_ids=stops))[0]
    later = run(llm, greedy(stop_token_ids=stops, min_tokens=6))[0]

    assert len(ended.token_ids) == 1
    assert not set(later.token_ids[:6]) & set(stops)


def test_penalties_follow_prompt_and_output_whatever_the_schedule(tiny):
    prompts = random_prompts(8, 40, seed=3, shortest=20)
    params = [
        SamplingParams(
            temperature=0.7,
            seed=i,
            max_tokens=24,
            ignore_eos=True,
            repetition_penalty=1.0 + 0.1 * i,
            frequency_penalty=0.3 * (i % 3),
            presence_penalty=-0.2 * (i % 2),
        )
        for i in range(8)
    ]
    settings = {"skip_tokenizer_init": True, "block_size": 4, "use_tqdm_on_load": False}
    with LLM(tiny, max_num_batched_tokens=16, max_num_seqs=8, **settings) as llm:
        together = run(llm, params, prompts)
        alone = [run(llm, one, prompt)[0] for one, prompt in zip(params, prompts, strict=True)]
    with LLM(tiny, num_gpu_blocks_override=40, max_model_len=96, **settings) as llm:
        squeezed = run(llm, params, prompts)
        assert llm.stats()["num_preemptions"] > 0

    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert [o.token_ids for o in squeezed] == [o.token_ids for o in alone]


def test_a_loop_is_noticed(llm):
    rule = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=4)

    output = run(llm, greedy(logit_bias={17: 100}, repetition_detection=rule))[0]

    assert output.token_ids == [17] * 4
    assert (output.finish_reason, output.stop_reason) == ("repetition", "repetition_detected")


def test_greedy_rows_stay_greedy_beside_rows_that_sample(llm):
    params = [greedy(), SamplingParams(temperature=2, top_k=3, top_p=0.4, min_p=0.1, seed=1)]

    together = run(llm, params, [PROMPT] * 2)

    assert together[0].token_ids == run(llm, greedy())[0].token_ids


def test_top_k_of_one_is_greedy(llm):
    sampled = run(llm, SamplingParams(top_k=1, max_tokens=12, ignore_eos=True, seed=3))[0]

    assert sampled.token_ids == run(llm, greedy())[0].token_ids


# ---------------------------------------------------------------- log-probabilities


def test_named_tokens_are_scored_beside_the_sampled_one(llm):
    whole = run(llm, greedy(logprobs=20))[0]
    named = list(whole.logprobs[0])[3:6]

    output = run(llm, greedy(logprob_token_ids=named))[0]

    first = output.logprobs[0]
    assert list(first) == [output.token_ids[0], *named]
    for token in named:
        assert first[token].logprob == pytest.approx(whole.logprobs[0][token].logprob, abs=1e-5)
        assert first[token].rank == whole.logprobs[0][token].rank


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_modes_of_logprobs(mode):
    params = SamplingParams(
        temperature=0.5, seed=1, max_tokens=4, logprobs=3, top_k=5, logit_bias={17: 3.0}
    )
    with LLM("demo", max_num_seqs=2, use_tqdm_on_load=False, max_logprobs=-1) as raw:
        every = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
        raw_row = {t: e.logprob for t, e in run(raw, every)[0].logprobs[0].items()}
    with LLM("demo", max_num_seqs=2, use_tqdm_on_load=False, logprobs_mode=mode) as llm:
        output = run(llm, params)[0]

    entry = output.logprobs[0]
    token = output.token_ids[0]
    if mode == "raw_logits":
        pairs = list(entry.items())
        gaps = [e.logprob - raw_row[t] for t, e in pairs]
        assert max(gaps) - min(gaps) < 1e-4  # the same up to the normalisation
    else:
        row = {t: (v + 3.0 * (t == 17)) / 0.5 for t, v in raw_row.items()}
        kept = dict(sorted(row.items(), key=lambda item: -item[1])[:5])
        best = max(kept.values())
        total = best + np.log(sum(np.exp(v - best) for v in kept.values()))
        assert set(entry) <= set(kept)
        if mode == "processed_logprobs":
            assert entry[token].logprob == pytest.approx(kept[token] - total, abs=1e-4)
        else:
            gaps = [e.logprob - kept[t] for t, e in entry.items()]
            assert max(gaps) - min(gaps) < 1e-4
            assert abs(entry[token].logprob - (kept[token] - total)) > 1e-2


def test_flat_logprobs_hold_the_same(llm):
    plain = run(llm, greedy(logprobs=2))[0].logprobs
    flat = run(llm, greedy(logprobs=2, flat_logprobs=True))[0].logprobs

    assert len(flat) == len(plain)
    assert [flat[i] for i in range(len(flat))] == plain


# ---------------------------------------------------------------- seeds and defaults


def test_two_runs_of_a_script_are_the_same_and_leave_other_generators_alone():
    before = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002

    def script():
        with LLM("demo", max_num_seqs=4, use_tqdm_on_load=False) as llm:
            first = run(llm, SamplingParams(max_tokens=6), [PROMPT, "import os"])
            second = run(llm, SamplingParams(max_tokens=6, n=2), [PROMPT])
            return [one.token_ids for one in (*first, *second)]

    assert script() == script()
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_calls_without_parameters_use_the_authors(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 4, "max_new_tokens": 9, "eos_token_id": [3, 4]}'
    )
    settings = {"skip_tokenizer_init": True, "use_tqdm_on_load": False}
    with LLM(folder, override_generation_config={"top_k": 6}, **settings) as llm:
        params = llm.get_default_sampling_params()
        output = llm.generate([1, 2, 3], use_tqdm=False)[0].outputs[0]
    with LLM(folder, generation_config="vllm", **settings) as llm:
        neutral = llm.get_default_sampling_params()
        stops = llm.generate([1, 2, 3], SamplingParams(logit_bias={4: 100}), use_tqdm=False)[0]

    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 6, 9)
    assert len(output.token_ids) <= 9
    assert neutral == SamplingParams()
    # Extra EOS ids hold whatever the defaults are.
    assert (stops.outputs[0].token_ids, stops.outputs[0].stop_reason) == ([4], 4)


def test_the_default_length_is_warned_of_once(llm, caplog):
    llm._warned_length = False
    with caplog.at_level("WARNING", logger="jaxllm"):
        llm.generate(PROMPT, SamplingParams(max_tokens=16, ignore_eos=True), use_tqdm=False)
        assert "max_tokens" not in caplog.text
        for _ in range(2):
            llm.generate(PROMPT, SamplingParams(ignore_eos=True), use_tqdm=False)

    assert caplog.text.count("A completion ended at the default max_tokens=16") == 1


# ---------------------------------------------------------------- stop strings


def test_a_stop_string_may_lie_across_tokens(llm):
    free = run(llm, greedy(max_tokens=30))[0]
    stop = free.text[5:9]
    end = free.text.index(stop)

    cut = run(llm, greedy(max_tokens=30, stop=[stop]))[0]
    kept = run(llm, greedy(max_tokens=30, stop=stop, include_stop_str_in_output=True))[0]

    assert cut.text == free.text[:end]
    assert kept.text == free.text[:end] + stop
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < 30


# ---------------------------------------------------------------- prompts


def test_a_long_prompt_can_be_cut_on_either_side(llm):
    ids = llm.get_tokenizer().encode("x = 1\n" * 300)
    assert len(ids) > llm.max_model_len

    def cut(**kwargs):
        return llm.generate(
            "x = 1\n" * 300, greedy(max_tokens=1), use_tqdm=False, tokenization_kwargs=kwargs
        )[0].prompt_token_ids

    assert cut(truncate_prompt_tokens=7) == ids[-7:]
    assert cut(truncate_prompt_tokens=7, truncation_side="right") == ids[:7]
    assert len(cut(truncate_prompt_tokens=-1)) == llm.max_model_len - 1


def test_two_bos_tokens_in_front_are_warned_of_once(llm, caplog):
    tokenizer = llm.get_tokenizer()
    before, text = tokenizer.bos_token, "~~"
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode(text)[0])
    try:
        with caplog.at_level("WARNING", logger="jaxllm"):
            for _ in range(2):
                llm.generate(text, greedy(max_tokens=1), use_tqdm=False)
    finally:
        tokenizer.bos_token = before

    assert caplog.text.count("begins with two BOS tokens") == 1


# ---------------------------------------------------------------- errors in a batch


def test_997_outputs_and_3_errors_in_order(tiny):
    prompts = random_prompts(1000, 6, seed=4)
    for i in (0, 500, 999):
        prompts[i] = [1] * 500
    params = SamplingParams(temperature=0, max_tokens=2)
    settings = {"skip_tokenizer_init": True, "use_tqdm_on_load": False}
    with LLM(tiny, max_num_seqs=64, max_num_batched_tokens=512, **settings) as llm:
        with pytest.raises(RequestError, match="maximum context length is 128 tokens"):
            llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats()["num_steps"] == 0
        outputs = llm.generate(prompts, params, use_tqdm=False, on_error="return")

    assert [i for i, o in enumerate(outputs) if o.error] == [0, 500, 999]
    assert all(isinstance(outputs[i].error, RequestError) for i in (0, 500, 999))
    assert all(o.finished for o in outputs)
    good = [o for o in outputs if not o.error]
    assert len(good) == 997
    assert all(len(o.outputs[0].token_ids) == 2 for o in good)
    assert [o.prompt_token_ids for o in good] == [p for p in prompts if len(p) < 500]


def test_no_other_word_for_on_error(llm):
    with pytest.raises(RequestError, match="on_error='ignore' must be 'raise' or 'return'"):
        llm.generate(PROMPT, on_error="ignore")


def test_an_adapter_is_refused(llm):
    with pytest.raises(RequestError, match="adapters are not implemented"):
        llm.generate(PROMPT, lora_request=object())


# ---------------------------------------------------------------- anything at all


def random_params(rng):
    """Values in and out of range, of right types and wrong ones."""
    choices = {
        "n": [1, 1, 1, 2, 3, 0, "2"],
        "temperature": [0, 0.3, 1.0, 1.9, 2.5, -1, float("nan"), "warm"],
        "top_p": [1.0, 0.9, 0.3, 0.01, 0, 1.5, None],
        "top_k": [0, -1, 1, 5, 50, 10**6, -5, 1.5],
        "min_p": [0, 0.05, 0.9, 1.0, 2],
        "presence_penalty": [0, 0.5, -2, 2.1],
        "frequency_penalty": [0, 1.5, -1, -3],
        "repetition_penalty": [1.0, 1.3, 0.7, 0, float("inf")],
        "seed": [None, 0, -1, 2**70, 1.5],
        "stop": [None, "e", ["(", "\n"], [""], "zzz"],
        "stop_token_ids": [None, [3], [1, 2, 2], [10**6], "x"],
        "max_tokens": [1, 3, 8, 0, None, 5],
        "min_tokens": [0, 2, 9, -1],
        "logprobs": [None, 0, 2, 21, -1, True],
        "prompt_logprobs": [None, 0, 3, 30],
        "logit_bias": [None, {1: 2.0}, {5: -200}, {"7": 1}, {10**6: 1}, {}],
        "allowed_token_ids": [None, [1, 2, 3], [], [10**6], list(range(200))],
        "bad_words": [None, ["def"], [" self."], [""], ["a", "a"]],
        "ignore_eos": [False, True],
        "include_stop_str_in_output": [False, True],
        "detokenize": [True, True, False],
    }
    picked = rng.choice(list(choices), size=rng.integers(1, 6), replace=False)
    return {name: choices[name][rng.integers(len(choices[name]))] for name in picked}


# Flags that come in any mixture make many programs: a single bucket keeps them few.
@pytest.mark.slow
def test_two_thousand_random_parameters_are_each_a_result_or_a_sentence(llm):
    rng = np.random.default_rng(0)
    before = run(llm, greedy())[0].token_ids
    good, sentences = [], []
    while len(good) + len(sentences) < 2000:
        try:
            good.append(SamplingParams(**{"max_tokens": 4, **random_params(rng)}))
        except RequestError as error:
            sentences.append(str(error))
    for params in good:
        if params.max_tokens is None:
            params.max_tokens = 4
    prompts = [PROMPT, "import os\n", "x = 1"]
    batch = [prompts[i % 3] for i in range(len(good))]
    outputs = llm.generate(batch, good, use_tqdm=False, on_error="return")

    assert len(sentences) > 200
    assert min(map(len, sentences)) > 20
    assert len(good) > 500
    for params, output in zip(good, outputs, strict=True):
        assert output.finished
        if output.error is not None:
            assert isinstance(output.error, RequestError)
            assert len(str(output.error)) > 20
            continue
        assert len(output.outputs) == params.n
        for one in output.outputs:
            assert one.finish_reason in ("stop", "length", "repetition")
            assert len(one.token_ids) <= params.max_tokens
            assert params.allowed_token_ids is None or set(one.token_ids) <= set(
                params.allowed_token_ids
            )
    llm._engine.scheduler.check_invariants()
    assert run(llm, greedy())[0].token_ids == before
