import pytest

from jaxllm.sampling_params import SamplingParams
from jaxllm.sequence import PlannedRow, Request, StepPlan
from tests.fake import make_sequence


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 2), (1, 3), (0, 5), (2, 4), (3, 5), (3, 3), (4, 5)]
)
def test_tokens_reads_prompt_and_output_as_one(start, stop):
    seq = make_sequence(prompt=[1, 2, 3])
    seq.output_token_ids += [4, 5]

    assert seq.tokens(start, stop) == [1, 2, 3, 4, 5][start:stop]


def test_pending_tokens_are_those_known_and_not_computed():
    seq = make_sequence(prompt=[1, 2, 3])
    seq.output_token_ids.append(4)
    seq.num_computed = 3

    assert (seq.num_tokens, seq.num_pending) == (4, 1)


def test_a_token_that_a_launch_will_bring_is_pending():
    seq = make_sequence(prompt=[1, 2, 3])
    seq.num_computed, seq.num_expected = 3, 1

    assert (seq.num_tokens, seq.num_pending) == (3, 1)


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "remaining"), [(5, 100, 4), (None, 10, 6), (100, 10, 6)]
)
def test_what_remains_is_bounded_by_max_tokens_and_max_model_len(
    max_tokens, max_model_len, remaining
):
    seq = make_sequence(prompt=[1, 2, 3], max_tokens=max_tokens)
    seq.output_token_ids.append(4)

    assert seq.remaining(max_model_len) == remaining


def test_stop_ids_are_the_eos_tokens_and_the_requests_own_each_once():
    seq = make_sequence(eos=(7, 8), stop_token_ids=[9, 8])

    assert seq.stop_ids() == (7, 8, 9)


def test_ignored_eos_tokens_are_no_stop_ids():
    seq = make_sequence(eos=(7, 8), stop_token_ids=[9, 8], ignore_eos=True)

    assert seq.stop_ids() == (9, 8)


def test_equal_sequences_are_not_the_same_sequence():
    assert make_sequence() != make_sequence()


def test_a_plan_counts_its_tokens_and_tells_chunks_from_decodes():
    decode = PlannedRow(make_sequence("a"), 0, 1, limit=1)
    chunk = PlannedRow(make_sequence("b"), 0, 3, limit=1)

    plan = StepPlan(rows=(decode, chunk), num_decodes=1)

    assert plan.num_tokens == 4
    assert plan.chunks == (chunk,)


def test_a_request_is_finished_when_all_its_sequences_are():
    seqs = [make_sequence(index=i) for i in range(2)]
    request = Request("a", None, [1], SamplingParams(), seqs)

    finished = []
    for seq in seqs:
        finished.append(request.is_finished)
        seq.finish_reason = "length"

    assert finished == [False, False]
    assert request.is_finished
