"""Programs have what the requests of a batch ask for, and few differ."""

import itertools

import numpy as np
import pytest

from jaxllm.flags import FlagSets, SamplingFlags, edits_bucket, flags_of, logprobs_bucket
from jaxllm.logit_rules import ThinkingBudget, rules_of
from jaxllm.sequence import PlannedRow, Scoring
from tests.fake import make_sequence

V = 70


def row(*, num_tokens=1, samples=True, bad_words=(), thinking=None, scoring=None, **params):
    """A planned row of a request with these parameters."""
    seq = make_sequence(prompt=range(20), **params)
    seq.num_logprobs = seq.params.logprobs
    seq.scoring = scoring
    seq.rules = rules_of(
        seq.params,
        prompt_len=20,
        stop_ids=(1,),
        bad_words=bad_words,
        thinking=thinking,
        vocab_size=V,
    )
    return PlannedRow(seq, 0, num_tokens, limit=int(samples))


def scoring(start=0, num_top=0, count=19):
    return Scoring(targets=np.arange(count, dtype=np.int32), start=start, num_top=num_top)


# -------------------------------------------------------------------- one request


def test_a_greedy_batch_asks_for_nothing():
    assert flags_of([row(), row(seed=3)]) == SamplingFlags()


@pytest.mark.parametrize(
    ("params", "flags"),
    [
        ({"temperature": 1}, {"sampled": True}),
        ({"temperature": 0.3, "min_p": 0.1}, {"sampled": True, "min_p": True}),
        ({"temperature": 0.3, "top_k": 5}, {"sampled": True, "top_k": True}),
        ({"temperature": 0.3, "top_p": 0.9}, {"sampled": True, "top_p": True}),
        ({"temperature": 0.3, "top_p": 1.0, "top_k": -1, "min_p": 0}, {"sampled": True}),
        ({"min_p": 0.1, "top_k": 5, "top_p": 0.9}, {}),
        ({"repetition_penalty": 1.1}, {"penalties": True}),
        ({"frequency_penalty": -0.1}, {"penalties": True}),
        ({"presence_penalty": 0.1}, {"penalties": True}),
        ({"logit_bias": {3: 1.0}}, {"edits": 16}),
        ({"logit_bias": dict.fromkeys(range(17), 1.0)}, {"edits": 128}),
        ({"min_tokens": 2}, {"edits": 16}),
        ({"bad_words": ((3,), (4, 5))}, {"edits": 16}),
        ({"allowed_token_ids": [3]}, {"mask_words": 3}),
        ({"thinking": ThinkingBudget(1, 2, 3)}, {"mask_words": 3}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"logprobs": 3}, {"logprobs": 5}),
        ({"logprob_token_ids": [3, 4]}, {"logprob_ids": 16}),
        ({"scoring": scoring()}, {"scored": 0}),
        ({"scoring": scoring(num_top=2)}, {"scored": 5}),
    ],
    ids=str,
)
def test_each_parameter_asks_for_its_own_flag(params, flags):
    assert flags_of([row(**params)]) == SamplingFlags(**flags)


def test_logprobs_follow_what_the_sequence_returns_and_not_the_parameter():
    one = row(logprobs=-1)
    one.seq.num_logprobs = V

    assert flags_of([one]).logprobs == V


def test_a_row_that_scores_nothing_in_this_step_does_not_ask_for_scores():
    later = row(num_tokens=4, samples=False, scoring=scoring(start=4))

    assert flags_of([later]).scored is None


def test_a_row_that_scores_in_this_step_asks_for_scores():
    now = row(num_tokens=5, samples=False, scoring=scoring(start=4, num_top=1))

    assert flags_of([now]).scored == 1


# -------------------------------------------------------------------- batches


def test_a_batch_asks_for_what_any_of_its_rows_does():
    rows = [
        row(temperature=1, top_k=3),
        row(logprobs=1, logit_bias={3: 1.0}),
        row(temperature=1, top_p=0.5, logprobs=7),
        row(allowed_token_ids=[3]),
        row(logit_bias=dict.fromkeys(range(30), 1.0)),
    ]

    expected = SamplingFlags(
        sampled=True, top_k=True, top_p=True, edits=128, mask_words=3, logprobs=20
    )
    assert flags_of(rows) == expected
    assert flags_of(rows[::-1]) == expected


def test_rows_that_do_not_sample_yet_ask_as_if_they_did():
    params = {"temperature": 1, "top_k": 3, "logprobs": 2, "min_tokens": 1}

    waiting = flags_of([row(num_tokens=4, samples=False, **params)])

    assert waiting == flags_of([row(**params)])


def test_flags_do_not_change_as_a_sequence_grows():
    one = row(temperature=1, min_tokens=2, bad_words=((4, 5), (4, 6)), logprobs=1)
    before = flags_of([one])
    one.seq.output_token_ids += [4, 4, 4]

    assert flags_of([one]) == before


# -------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    ("most", "size"),
    [(None, None), (0, 0), (1, 1), (2, 5), (5, 5), (6, 20), (20, 20), (21, 21), (5000, 5000)],
)
def test_a_program_returns_a_few_numbers_of_alternatives(most, size):
    assert logprobs_bucket(most) == size


@pytest.mark.parametrize(
    ("most", "size"),
    [
        (0, 0),
        (1, 16),
        (16, 16),
        (17, 128),
        (128, 128),
        (129, 1024),
        (1024, 1024),
        (1025, 2048),
        (2048, 2048),
        (2049, 4096),
    ],
)
def test_a_program_takes_a_few_numbers_of_edits(most, size):
    assert edits_bucket(most) == size


# -------------------------------------------------------------------- names


def test_flags_are_named_shortly():
    assert str(SamplingFlags()) == ""
    assert str(SamplingFlags(sampled=True, top_k=True, edits=16)) == "sampled top_k edits=16"


def test_no_two_flags_have_one_name_but_masks_of_other_sizes():
    # The number of words of a mask is the model's, so that it is one in an engine.
    choices = {
        "sampled": (False, True),
        "min_p": (False, True),
        "top_k": (False, True),
        "top_p": (False, True),
        "penalties": (False, True),
        "edits": (0, 16, 128),
        "mask_words": (0, 3),
        "logprobs": (None, 0, 1),
        "logprob_ids": (0, 16),
        "scored": (None, 0),
    }
    every = [
        SamplingFlags(**dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]

    assert len({str(flags) for flags in every}) == len(every)


# -------------------------------------------------------------------- few programs


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({}, {}, {}),
        ({"sampled": True}, {"top_k": True}, {"sampled": True, "top_k": True}),
        ({"edits": 16}, {"edits": 128}, {"edits": 128}),
        ({"logprobs": None}, {"logprobs": 0}, {"logprobs": 0}),
        ({"logprobs": 5}, {"logprobs": 1, "scored": 0}, {"logprobs": 5, "scored": 0}),
        ({"mask_words": 3}, {"logprob_ids": 16}, {"mask_words": 3, "logprob_ids": 16}),
    ],
    ids=str,
)
def test_joined_flags_serve_both(one, other, both):
    one, other = SamplingFlags(**one), SamplingFlags(**other)

    joined = one.join(other)

    assert joined == other.join(one) == SamplingFlags(**both)
    assert joined.serves(one)
    assert joined.serves(other)


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ({}, {"sampled": True}),
        ({"edits": 16}, {"edits": 128}),
        ({}, {"logprobs": 0}),
        ({"logprobs": 1}, {"logprobs": 5}),
        ({"sampled": True}, {"penalties": True}),
    ],
    ids=str,
)
def test_flags_do_not_serve_what_asks_for_more(flags, more):
    assert not SamplingFlags(**flags).serves(SamplingFlags(**more))


KINDS = [
    SamplingFlags(sampled=a, top_k=b, top_p=c, logprobs=d)
    for a, b, c, d in itertools.product((False, True), (False, True), (False, True), (None, 1, 5))
]


def test_the_first_kinds_of_batches_have_their_own_programs():
    sets = FlagSets()
    first = KINDS[: FlagSets.MAX_SETS]

    assert [sets.serving(flags) for flags in first] == first
    assert [sets.serving(flags) for flags in first] == first


def test_a_later_kind_uses_a_program_that_serves_it():
    sets = FlagSets()
    first = [SamplingFlags(edits=size) for size in range(1, 8)]
    for flags in [*first, SamplingFlags(sampled=True, top_k=True)]:
        sets.serving(flags)

    assert sets.serving(SamplingFlags(top_k=True)) == SamplingFlags(sampled=True, top_k=True)


def test_a_later_kind_that_none_serves_makes_a_program_for_all_so_far():
    sets = FlagSets()
    for size in range(1, 9):
        sets.serving(SamplingFlags(edits=size))

    both = SamplingFlags(edits=8, top_p=True)
    assert sets.serving(SamplingFlags(top_p=True)) == both
    assert sets.serving(SamplingFlags(top_p=True, edits=3)) == both


def test_every_batch_is_served_by_few_programs():
    sets = FlagSets()
    rng = np.random.default_rng(0)
    used = set()
    for i in rng.integers(0, len(KINDS), 500):
        found = sets.serving(KINDS[i])
        used.add(found)
        assert found.serves(KINDS[i])

    # Each that is made later serves all before it, so few can follow.
    assert len(used) <= FlagSets.MAX_SETS + 3
