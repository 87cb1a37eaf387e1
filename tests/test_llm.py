"""`LLM.generate` as its callers see it, on the model that ships with the package."""

import random

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", max_num_seqs=8, max_num_batched_tokens=128) as llm:
        yield llm


def one(outputs):
    assert len(outputs) == 1
    return outputs[0].outputs[0]


def test_every_kind_of_prompt_gives_the_same(llm):
    ids = llm.get_tokenizer().encode("def main(")
    kinds = [
        "def main(",
        ids,
        {"prompt": "def main("},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": "def main("},
    ]

    alone = [one(llm.generate(kind, GREEDY, use_tqdm=False)).token_ids for kind in kinds]
    together = llm.generate(kinds, GREEDY, use_tqdm=False)

    assert all(tokens == alone[0] for tokens in alone)
    assert [o.outputs[0].token_ids for o in together] == alone
    assert [o.prompt for o in together] == ["def main(", None, "def main(", None, "def main("]
    assert all(o.prompt_token_ids == ids for o in together)
    assert all(o.finished for o in together)


def test_results_come_in_order_whatever_their_length(llm):
    lengths = [9, 1, 5, 12, 3, 7, 2, 10, 4, 6]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    prompts = [f"x{i} = " for i in range(len(lengths))]

    outputs = llm.generate(prompts, params, use_tqdm=False)

    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    assert [int(o.request_id) for o in outputs] == sorted(int(o.request_id) for o in outputs)
    assert all(o.outputs[0].finish_reason == "length" for o in outputs)


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([], GREEDY) == []


def test_text_is_that_of_the_tokens(llm):
    tokenizer = llm.get_tokenizer()

    output = one(
        llm.generate("import os\n", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    )

    assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_stop_token_ends_the_request_and_is_not_in_the_text(llm):
    free = one(llm.generate("def main(", GREEDY, use_tqdm=False))
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)

    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])
    output = one(llm.generate("def main(", params, use_tqdm=False))

    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == llm.get_tokenizer().decode(free.token_ids[:first])


@pytest.fixture
def eos(llm):
    """Makes a token that the model soon gives the end of a sequence, for one test."""
    tokenizer, builder = llm.get_tokenizer(), llm._builder
    before = tokenizer.eos_token, builder.eos_token_ids
    token = one(llm.generate("def main(", GREEDY, use_tqdm=False)).token_ids[2]
    tokenizer.eos_token, builder.eos_token_ids = tokenizer.convert_ids_to_tokens(token), (token,)
    yield token
    tokenizer.eos_token, builder.eos_token_ids = before


def test_end_of_sequence_ends_the_request_unless_ignored(llm, eos):
    ignoring = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    stopped = one(llm.generate("def main(", GREEDY, use_tqdm=False))
    ignored = one(llm.generate("def main(", ignoring, use_tqdm=False))

    assert stopped.token_ids == ignored.token_ids[: ignored.token_ids.index(eos) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert (len(ignored.token_ids), ignored.finish_reason) == (12, "length")


def test_max_tokens_none_goes_on_to_the_models_length():
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with LLM("demo", max_num_seqs=2, max_model_len=40, use_tqdm_on_load=False) as llm:
        output = llm.generate("x = ", params, use_tqdm=False)[0]

    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40
    assert output.outputs[0].finish_reason == "length"


def test_same_seed_gives_the_same_tokens_and_another_gives_others(llm):
    def sampled(seed):
        params = SamplingParams(temperature=1.0, max_tokens=12, seed=seed)
        return one(llm.generate("class A", params, use_tqdm=False))

    first, again, other = sampled(1), sampled(1), sampled(2)

    assert first.token_ids == again.token_ids != other.token_ids
    assert first.seed == 1


def test_seed_of_an_unseeded_request_replays_it(llm):
    params = SamplingParams(temperature=1.0, max_tokens=12)
    drawn, other = (o.outputs[0] for o in llm.generate(["class A"] * 2, params, use_tqdm=False))

    params = SamplingParams(temperature=1.0, max_tokens=12, seed=drawn.seed)
    again = one(llm.generate("class A", params, use_tqdm=False))

    assert drawn.token_ids == again.token_ids != other.token_ids


def test_random_generators_of_the_caller_are_not_touched(llm):
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    llm.generate("x", SamplingParams(temperature=1.0), use_tqdm=False)

    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_second_time_the_prompt_is_found_in_the_cache(llm):
    prompt = list(range(10, 85))

    first = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    second = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    salted = llm.generate({"prompt_token_ids": prompt, "cache_salt": "x"}, GREEDY, use_tqdm=False)[
        0
    ]

    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 64)
    assert salted.num_cached_tokens == 0
    assert first.outputs[0].token_ids == second.outputs[0].token_ids == salted.outputs[0].token_ids


def test_logprobs_hold_the_token_first_and_the_likeliest_in_order(llm):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, logprobs=3)

    output = one(llm.generate("def ", params, use_tqdm=False))

    assert output.logprobs is not None
    for token, found in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(found)) == token
        ranks = [entry.rank for other, entry in found.items() if other != token]
        assert ranks == [r for r in (1, 2, 3) if r != found[token].rank]
        assert found[token].decoded_token == llm.get_tokenizer().decode([token])
    total = sum(
        found[t].logprob for t, found in zip(output.token_ids, output.logprobs, strict=True)
    )
    assert output.cumulative_logprob == pytest.approx(total)


def test_progress_counts_requests_and_may_be_replaced(llm, capsys):
    bars = []

    class Bar:
        def __init__(self, **kwargs):
            self.kwargs, self.count, self.closed, self.said = kwargs, 0, False, ""
            bars.append(self)

        def set_postfix_str(self, text, refresh):
            self.said = text

        def update(self, count):
            self.count += count

        def close(self):
            self.closed = True

    llm.generate(["a", "b", "c"], GREEDY, use_tqdm=Bar)
    quiet = capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err

    assert (bars[0].kwargs["total"], bars[0].count, bars[0].closed) == (3, 3, True)
    assert "output:" in bars[0].said
    assert "toks/s" in bars[0].said
    assert quiet == ""
    assert "Processed prompts" in shown
    assert "2/2" in shown


def test_parameters_of_the_caller_are_not_changed(llm):
    params = SamplingParams(temperature=0.5, max_tokens=3)
    before = params.clone()

    llm.generate("x", params, use_tqdm=False)

    assert params == before


def test_detokenize_off_gives_no_text(llm):
    params = SamplingParams(temperature=0, max_tokens=3, detokenize=False)

    output = one(llm.generate("x", params, use_tqdm=False))

    assert output.text == ""
    assert len(output.token_ids) == 3


def test_summary_and_repr_say_what_was_loaded(llm):
    assert repr(llm) == "LLM('demo', LlamaForCausalLM, 6 layers, float32, max_model_len=512)"
    assert "512 tokens per request" in llm._plan.memory.summary()


@pytest.mark.parametrize("dtype", ["bfloat16", "half"])
def test_16_bit_types_run_on_cpu(dtype, llm):
    with LLM("demo", dtype=dtype, max_num_seqs=2, use_tqdm_on_load=False) as small:
        tokens = one(small.generate("import os", GREEDY, use_tqdm=False)).token_ids

    assert len(tokens) == 12


def test_a_model_for_one_sequence_gives_what_one_for_many_gives(llm):
    with LLM("demo", max_num_seqs=1, use_tqdm_on_load=False) as one_by_one:
        alone = one_by_one.generate(["def main(", "import os"], GREEDY, use_tqdm=False)

    together = llm.generate(["def main(", "import os"], GREEDY, use_tqdm=False)

    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in together]
