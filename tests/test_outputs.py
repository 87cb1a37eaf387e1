import copy
import pickle

import numpy as np
import pytest

from jaxllm.errors import RequestError
from jaxllm.outputs import (
    CompletionOutput,
    CompletionScore,
    FlatLogprobs,
    Logprob,
    RequestOutput,
    RequestStateStats,
)

ROWS = [
    {5: Logprob(-0.5, 1, "a"), 6: Logprob(-1.5, 2, "b")},
    {},
    {7: Logprob(-0.25, 1, None)},
    {8: Logprob(-3.0, 9, "c"), 5: Logprob(-0.5, 1, "a"), 6: Logprob(-1.5, 2, "b")},
]


def flat(rows):
    container = FlatLogprobs()
    for row in rows:
        container.append(row)
    return container


# ---------------------------------------------------------------- FlatLogprobs


def test_flat_logprobs_read_like_a_list_of_dicts():
    container = flat(ROWS)

    assert len(container) == 4
    assert list(container) == ROWS
    assert [container[i] for i in (-1, -4)] == [ROWS[-1], ROWS[0]]
    assert list(container[3]) == [8, 5, 6]  # in order of insertion
    assert list(reversed(container)) == ROWS[::-1]


def test_flat_logprobs_are_flat_lists():
    container = flat(ROWS)

    assert container.start_indices == [0, 2, 2, 3]
    assert container.end_indices == [2, 2, 3, 6]
    assert container.token_ids == [5, 6, 7, 8, 5, 6]
    assert container.logprobs == [-0.5, -1.5, -0.25, -3.0, -0.5, -1.5]
    assert container.ranks == [1, 2, 1, 9, 1, 2]
    assert container.decoded_tokens == ["a", "b", None, "c", "a", "b"]


def test_position_without_logprobs_is_empty():
    container = flat([None, ROWS[0]])

    assert list(container) == [{}, ROWS[0]]


@pytest.mark.parametrize(
    "part",
    [slice(None), slice(1, 3), slice(2, None), slice(None, None, -1), slice(9, None)],
    ids=str,
)
def test_part_of_flat_logprobs_is_flat(part):
    found = flat(ROWS)[part]

    assert isinstance(found, FlatLogprobs)
    assert found == flat(ROWS[part])


@pytest.mark.parametrize("index", [4, -5])
def test_flat_logprobs_end(index):
    with pytest.raises(IndexError):
        flat(ROWS)[index]


def test_positions_of_flat_logprobs_cannot_be_set_or_deleted():
    container = flat(ROWS)

    with pytest.raises(TypeError, match="does not support item assignment"):
        container[0] = {}
    with pytest.raises(TypeError, match="doesn't support item deletion"):
        del container[0]
    assert container == flat(ROWS)


def test_flat_logprobs_can_be_copied_and_pickled():
    container = flat(ROWS)

    assert copy.deepcopy(container) == container
    assert pickle.loads(pickle.dumps(container)) == container


def test_flat_logprobs_show_how_much_they_hold():
    assert repr(flat(ROWS)) == "FlatLogprobs(4 positions, 6 entries)"


# ---------------------------------------------------------------- completions


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error", "repetition"])
def test_completion_with_a_reason_is_finished(reason):
    assert CompletionOutput(0, "", [], finish_reason=reason).finished()
    assert not CompletionOutput(0, "", []).finished()


def test_completion_shows_the_start_of_its_text():
    short = CompletionOutput(0, "a\nb", [1], finish_reason="stop", stop_reason="x")
    long = CompletionOutput(1, "c" * 100, [1, 2], cumulative_logprob=-1.23456)

    assert repr(short) == (
        "CompletionOutput(index=0, text='a\\nb', 1 token, finish_reason='stop', stop_reason='x')"
    )
    assert repr(long) == (
        f"CompletionOutput(index=1, text='{'c' * 60}…', 2 tokens, cumulative_logprob=-1.235, "
        "finish_reason=None)"
    )


def test_completion_in_a_notebook_is_escaped():
    output = CompletionOutput(0, "<b>&", [1, 2], finish_reason="stop", stop_reason="</pre><script>")

    page = output._repr_html_()

    assert "&lt;b&gt;&amp;</pre>" in page
    assert "2 tokens, stop at &#x27;&lt;/pre&gt;&lt;script&gt;&#x27;" in page
    assert "<script>" not in page


# ---------------------------------------------------------------- requests


def test_request_has_the_fields_of_vllm():
    output = RequestOutput("0", "a", [1])

    assert output.outputs == []
    assert not output.finished
    assert output.num_cached_tokens == 0
    for name in ("prompt_logprobs", "metrics", "lora_request", "error"):
        assert getattr(output, name) is None


def test_request_shows_its_prompt_and_completions():
    output = RequestOutput("7", "a", [1, 2], outputs=[CompletionOutput(0, "b", [3])], finished=True)

    assert repr(output) == (
        "RequestOutput(request_id='7', prompt='a', 2 prompt tokens, outputs=[CompletionOutput("
        "index=0, text='b', 1 token, finish_reason=None)], finished=True)"
    )


def test_request_that_could_not_be_run_shows_why():
    error = RequestError("The prompt is <empty>.")
    output = RequestOutput("7", None, None, finished=True, error=error)

    assert repr(output) == (
        "RequestOutput(request_id='7', error=RequestError('The prompt is <empty>.'), finished=True)"
    )
    assert "RequestError: The prompt is &lt;empty&gt;.</pre>" in output._repr_html_()


def test_request_in_a_notebook_is_escaped():
    output = RequestOutput(
        "<7>",
        "<script>alert(1)</script>",
        [1, 2],
        outputs=[CompletionOutput(0, "<i>x", [3]), CompletionOutput(1, "<i>y", [3])],
        num_cached_tokens=1,
    )

    page = output._repr_html_()

    assert "&lt;script&gt;alert(1)&lt;/script&gt;</pre>" in page
    assert "request &lt;7&gt;: 2 prompt tokens, 1 cached" in page
    assert page.index("&lt;i&gt;x") < page.index("&lt;i&gt;y")
    assert "<script>" not in page
    assert "<i>" not in page


def test_stats_begin_at_nothing():
    assert RequestStateStats() == RequestStateStats(
        arrival_time=0.0,
        queued_ts=0.0,
        scheduled_ts=0.0,
        first_token_ts=0.0,
        last_token_ts=0.0,
        first_token_latency=0.0,
        num_generation_tokens=0,
        num_preemptions=0,
    )


# ---------------------------------------------------------------- scores


def score(ranks):
    count = len(ranks)
    return CompletionScore(
        token_ids=np.arange(count, dtype=np.int32),
        logprobs=np.full(count, -0.1, np.float32),
        ranks=np.asarray(ranks, np.int32),
    )


def test_score_is_the_sum_in_float64():
    assert score([1] * 1000).total == pytest.approx(float(np.float32(-0.1)) * 1000, rel=1e-12)
    assert len(score([1] * 1000)) == 1000


@pytest.mark.parametrize(("ranks", "is_greedy"), [([1, 1], True), ([1, 2], False), ([3], False)])
def test_completion_of_the_likeliest_tokens_is_greedy(ranks, is_greedy):
    assert score(ranks).is_greedy is is_greedy


def test_score_shows_its_sum():
    assert repr(score([1, 2])) == "CompletionScore(2 tokens, total=-0.2, is_greedy=False)"
