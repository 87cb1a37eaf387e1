"""Streams, queued requests and chats: what comes while a call runs, and in what order."""

import gc

import pytest

from jaxllm import LLM, RequestError, SamplingParams
from jaxllm.errors import JaxLLMError
from jaxllm.sampling_params import RequestOutputKind
from jaxllm.terminal_chat import TerminalChat

PROMPT = "def main("
TEMPLATE = (
    "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def llm():
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "use_tqdm_on_load": False}
    with LLM("demo", chat_template=TEMPLATE, **settings) as llm:
        yield llm


def greedy(**params):
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **params})


def whole(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("stop", [None, ["self", "\n\n", "return"]])
def test_every_text_of_a_stream_is_a_beginning_of_the_last(llm, stop):
    prompts = [PROMPT, "import os\n", "class A"]
    params = greedy(stop=stop, max_tokens=30)
    final = whole(llm, prompts, params)

    texts, last = {}, {}
    for output in llm.stream(prompts, params):
        texts.setdefault(output.request_id, []).append(output.outputs[0].text)
        last[output.request_id] = output

    for want, (name, pieces) in zip(final, texts.items(), strict=True):
        one = last[name].outputs[0]
        assert last[name].finished
        assert all(pieces[-1].startswith(piece) for piece in pieces)
        assert (one.text, one.token_ids) == (want.outputs[0].text, want.outputs[0].token_ids)
        assert one.stop_reason == want.outputs[0].stop_reason
        assert len(pieces) > 3


def test_deltas_add_up_to_the_whole(llm):
    params = greedy(output_kind=RequestOutputKind.DELTA, logprobs=1)

    parts = [output.outputs[0] for output in llm.stream(PROMPT, params)]

    want = whole(llm, PROMPT, params)[0].outputs[0]
    assert "".join(part.text for part in parts) == want.text
    assert [token for part in parts for token in part.token_ids] == want.token_ids
    assert [entry for part in parts for entry in part.logprobs] == want.logprobs


def test_final_only_gives_one_output_a_prompt(llm):
    params = greedy(output_kind=RequestOutputKind.FINAL_ONLY)

    outputs = list(llm.stream([PROMPT, "x = 1"], params))

    assert [output.finished for output in outputs] == [True, True]


def test_leaving_a_stream_ends_its_request(llm):
    for output in llm.stream(PROMPT, greedy(max_tokens=100)):
        if len(output.outputs[0].token_ids) == 3:
            break
    del output
    gc.collect()

    want = whole(llm, PROMPT, greedy())

    assert len(want[0].outputs[0].token_ids) == 20
    assert not llm._engine.requests
    llm._engine.scheduler.check_invariants()
    assert llm.stats()["num_pages_held"] == 0


def test_other_calls_may_come_between_two_outputs(llm):
    want = [o.outputs[0].token_ids for o in whole(llm, [PROMPT, "class B"], greedy())]
    stream = llm.stream(PROMPT, greedy())

    first = next(stream)
    between = whole(llm, "class B", greedy(max_tokens=8))[0].outputs[0].token_ids
    last = list(stream)[-1]

    assert len(first.outputs[0].token_ids) == 1
    assert between == want[1][:8]
    assert last.outputs[0].token_ids == want[0]


def test_two_streams_take_turns(llm):
    want = [o.outputs[0].text for o in whole(llm, [PROMPT, "class B"], greedy())]

    streams = [llm.stream(PROMPT, greedy()), llm.stream("class B", greedy())]
    last = [None, None]
    while any(streams):
        for i, stream in enumerate(streams):
            output = next(stream, None) if stream else None
            last[i], streams[i] = output or last[i], stream if output else None

    assert [output.outputs[0].text for output in last] == want


def test_a_stream_refuses_at_once_and_not_in_the_loop(llm):
    with pytest.raises(RequestError, match="cannot be empty"):
        llm.stream("")


def test_a_stream_hands_out_errors_where_they_are_wanted(llm):
    outputs = list(llm.stream(["", PROMPT], greedy(max_tokens=2), on_error="return"))

    errors = [output for output in outputs if output.error is not None]
    assert len(errors) == 1
    assert outputs[-1].outputs[0].finish_reason == "length"


def test_a_stream_of_a_closed_model_says_so():
    llm = LLM("demo", max_num_seqs=2, use_tqdm_on_load=False)
    stream = llm.stream(PROMPT, greedy())
    next(stream)
    llm.close()

    with pytest.raises(JaxLLMError, match="is closed"):
        next(stream)


# ---------------------------------------------------------------- queued requests


def test_queued_requests_run_when_waited_for(llm):
    want = [o.outputs[0].token_ids for o in whole(llm, [PROMPT, "x = "], greedy())]
    before = llm.stats()["num_steps"]

    ids = llm.enqueue(PROMPT, greedy()) + llm.enqueue(["x = "], greedy())
    assert llm.stats()["num_steps"] == before
    outputs = llm.wait_for_completion(use_tqdm=False)

    assert [output.request_id for output in outputs] == ids
    assert [output.outputs[0].token_ids for output in outputs] == want
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_an_output_type_that_cannot_come_is_refused_and_loses_nothing(llm):
    llm.enqueue(PROMPT, greedy(max_tokens=1))

    with pytest.raises(RequestError, match="output_type=int was asked for"):
        llm.wait_for_completion(int)

    assert len(llm.wait_for_completion(use_tqdm=False)) == 1


# ---------------------------------------------------------------- chats


TALK = [{"role": "user", "content": "Hello"}]


def test_a_chat_is_its_rendered_prompt(llm):
    rendered = llm.render(TALK)

    output = llm.chat(TALK, greedy(), use_tqdm=False)[0]

    assert rendered["prompt"] == "# user: Hello\n# assistant:"
    assert output.prompt == rendered["prompt"]
    assert output.prompt_token_ids == rendered["prompt_token_ids"]
    want = whole(llm, rendered, greedy())[0].outputs[0]
    assert output.outputs[0].token_ids == want.token_ids


def test_several_conversations_give_an_output_each(llm):
    talks = [TALK, [*TALK, {"role": "assistant", "content": "Hi"}, *TALK]]

    outputs = llm.chat(talks, greedy(max_tokens=2), use_tqdm=False)

    assert [output.prompt.count("# user") for output in outputs] == [1, 2]
    assert len(llm.enqueue_chat(talks, greedy(max_tokens=1))) == 2
    assert len(llm.wait_for_completion(use_tqdm=False)) == 2


def test_a_model_without_a_template_says_so():
    with LLM("demo", max_num_seqs=2, use_tqdm_on_load=False) as llm:
        llm.get_tokenizer().chat_template = None

        with pytest.raises(RequestError, match="chat_template"):
            llm.chat(TALK)


def test_a_chat_without_a_tokenizer_says_so(checkpoints):
    settings = {"skip_tokenizer_init": True, "use_tqdm_on_load": False}
    with (
        LLM(checkpoints(), **settings) as llm,
        pytest.raises(RequestError, match="needs the tokenizer's template"),
    ):
        llm.chat(TALK)


# ---------------------------------------------------------------- in the terminal


def talk(llm, *lines):
    said, waiting = [], list(lines)

    def read():
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    chat = TerminalChat(llm, greedy(max_tokens=6), said.append, system=None)
    chat.run(read)
    return chat, "".join(said)


def test_a_conversation_in_the_terminal_remembers_its_turns(llm):
    chat, said = talk(llm, "Hello", "", "And then?", "/exit", "never read")

    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    want = llm.chat(chat.turns[:1], greedy(max_tokens=6), use_tqdm=False)[0].outputs[0].text
    assert chat.turns[1]["content"] == want
    assert want in said


def test_commands_of_the_terminal(llm):
    chat, said = talk(llm, "/system Be brief.", "Hello", "/reset", "/what", "Again")

    assert "/what is no command" in said
    assert len(chat.turns) == 2
    assert chat.turns[0]["content"] == "Again"


def test_a_refused_turn_is_taken_back(llm):
    chat, said = talk(llm, "word " * 5000, "Hello")

    assert "maximum context length" in said
    assert [turn["content"] for turn in chat.turns[:1]] == ["Hello"]
