"""Bans, biases, bad words, masks and thinking budgets, as the host sees them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.logit_rules import ALWAYS, BAN, NO_RULES, ThinkingBudget, bitmask, rules_of
from jaxllm.sampling_params import SamplingParams

V = 40
THINK, END = 8, 9


def rules(*, prompt_len=3, stop_ids=(), bad_words=(), thinking=None, vocab_size=V, **params):
    return rules_of(
        SamplingParams(**params),
        prompt_len=prompt_len,
        stop_ids=stop_ids,
        bad_words=bad_words,
        thinking=thinking,
        vocab_size=vocab_size,
    )


def edits(rules, output=()):
    """{(token, value, until)}, after these generated tokens."""
    ids, values, until, _ = rules.now([], list(output))
    assert (ids.dtype, values.dtype, until.dtype) == (np.int32, np.float32, np.int32)
    assert len(ids) == len(values) == len(until) <= rules.num_edits
    return set(zip(ids.tolist(), values.tolist(), until.tolist(), strict=True))


def bits(words, vocab_size=V):
    """The tokens that a mask allows, bit i of word w for token 32 w + i."""
    assert words.dtype == np.uint32
    assert words.shape == (-(-vocab_size // 32),)
    return {t for t in range(32 * len(words)) if int(words[t // 32]) >> t % 32 & 1}


# -------------------------------------------------------------------- edits


def test_a_request_without_rules_has_none():
    assert rules(temperature=0.5, top_k=3, repetition_penalty=2.0, stop_ids=(1,)) is NO_RULES
    assert edits(NO_RULES, [1, 2]) == set()
    assert NO_RULES.now([1, 2], []).mask is None
    assert NO_RULES.num_edits == NO_RULES.mask_words == 0
    assert not NO_RULES.needs_host


def test_a_bias_is_added_for_ever():
    made = rules(logit_bias={5: 1.5, 30: -100.0})

    assert edits(made) == edits(made, [5] * 50) == {(5, 1.5, ALWAYS), (30, -100.0, ALWAYS)}
    assert not made.needs_host


def test_stop_tokens_are_banned_until_the_sequence_has_min_tokens():
    made = rules(prompt_len=7, stop_ids=(2, 31), min_tokens=4)

    # With four tokens after a prompt of seven it has eleven, and may stop.
    assert edits(made) == {(2, BAN, 11), (31, BAN, 11)}
    assert not made.needs_host


def test_stop_tokens_are_not_banned_without_min_tokens():
    assert rules(stop_ids=(2, 31)) is NO_RULES


def test_min_tokens_without_stop_tokens_needs_no_edit():
    assert rules(min_tokens=4) is NO_RULES


def test_a_token_may_have_several_edits():
    made = rules(logit_bias={2: 3.0}, stop_ids=(2,), min_tokens=1, bad_words=((2,),))

    assert edits(made) == {(2, 3.0, ALWAYS), (2, BAN, 4), (2, BAN, ALWAYS)}


# -------------------------------------------------------------------- bad words


def test_a_word_of_one_token_is_banned_always():
    made = rules(bad_words=((5,), (6,)))

    assert edits(made) == edits(made, [5, 6]) == {(5, BAN, ALWAYS), (6, BAN, ALWAYS)}
    assert not made.needs_host


@pytest.mark.parametrize(
    ("output", "banned"),
    [
        ([], set()),
        ([4], set()),
        ([5], {6}),
        ([1, 5], {6}),
        ([5, 1], set()),
        ([7, 5], {6, 3}),
        ([1, 7, 5], {6, 3}),
        ([7, 5, 1], set()),
        ([7], set()),
        ([5, 6], {6}),
    ],
    ids=str,
)
def test_the_last_token_of_a_word_is_banned_where_the_others_were_just_generated(output, banned):
    made = rules(bad_words=((5, 6), (7, 5, 3), (5, 6, 6)))

    assert edits(made, output) == {(token, BAN, ALWAYS) for token in banned}


def test_bad_words_are_looked_for_in_the_output_alone():
    made = rules(bad_words=((5, 6),), prompt_len=3)

    # `edits` is not even told the prompt; a prompt that ends in 5 changes nothing.
    assert edits(made, []) == set()


def test_only_words_of_several_tokens_need_the_host():
    assert rules(bad_words=((5, 6),)).needs_host
    assert not rules(bad_words=((5,),)).needs_host


def test_room_is_made_for_every_word_that_could_match_at_once():
    made = rules(bad_words=((1,), (5, 6), (5, 7), (4, 5, 8)), logit_bias={0: 1.0})

    assert made.num_edits == 5
    assert len(edits(made, [4, 5])) == 5


def test_edits_of_one_moment_do_not_change_those_of_another():
    made = rules(bad_words=((5, 6),), logit_bias={0: 1.0})

    matched, after = edits(made, [5]), edits(made, [5, 1])

    assert matched == {(0, 1.0, ALWAYS), (6, BAN, ALWAYS)}
    assert after == {(0, 1.0, ALWAYS)}


# -------------------------------------------------------------------- masks


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_bitmask_holds_the_tokens_it_was_made_of(data):
    vocab_size = data.draw(st.integers(1, 200))
    ids = data.draw(st.sets(st.integers(0, vocab_size - 1)))

    assert bits(bitmask(ids, vocab_size), vocab_size) == ids


def test_a_token_may_be_named_twice_in_a_bitmask():
    assert bits(bitmask([3, 39, 3], V)) == {3, 39}


def test_allowed_tokens_are_a_mask_that_never_changes():
    made = rules(allowed_token_ids=[0, 31, 32, 39])

    assert bits(made.now([], []).mask) == bits(made.now([1, 2], []).mask) == {0, 31, 32, 39}
    assert made.mask_words == 2
    assert made.num_edits == 0
    assert not made.needs_host


@pytest.mark.parametrize(("vocab_size", "words"), [(1, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_a_mask_has_as_many_words_as_the_vocabulary_needs(vocab_size, words):
    made = rules(allowed_token_ids=[0], vocab_size=vocab_size)

    assert made.mask_words == words == len(made.now([], []).mask)


# -------------------------------------------------------------------- thinking


@pytest.mark.parametrize(
    ("tokens", "forced"),
    [
        ([], None),
        ([1, 2, 3], None),
        ([1, THINK], None),
        ([1, THINK, 2], None),
        ([1, THINK, 2, 3], END),
        ([1, THINK, 2, 3, 4], END),
        ([1, THINK, 2, END], None),
        ([1, THINK, 2, 3, END, 4, 5, 6], None),
        ([THINK, 2, END, 1, THINK, 2, 3], END),
        ([THINK, 2, 3, THINK, 4], None),
        ([END, THINK, 1, 1], END),
        ([1, 2, 3, END], None),
    ],
    ids=str,
)
def test_thinking_is_ended_when_its_budget_is_used_up(tokens, forced):
    assert ThinkingBudget(start=THINK, end=END, budget=2).forced(tokens) == forced


def test_a_budget_of_zero_ends_thinking_at_once():
    budget = ThinkingBudget(start=THINK, end=END, budget=0)

    assert budget.forced([1, THINK]) == END
    assert budget.forced([1, THINK, END]) is None
    assert budget.forced([1]) is None


def test_a_forced_token_is_the_only_one_allowed():
    made = rules(thinking=ThinkingBudget(THINK, END, 1))

    assert made.now([THINK], []).mask is None
    assert bits(made.now([THINK, 3], []).mask) == {END}
    assert made.now([THINK, 3, END], []).mask is None
    assert made.mask_words == 2
    assert made.needs_host


def test_a_forced_token_need_not_be_among_the_allowed():
    made = rules(thinking=ThinkingBudget(THINK, END, 1), allowed_token_ids=[1, 2])

    assert bits(made.now([THINK], []).mask) == {1, 2}
    assert bits(made.now([THINK, 3], []).mask) == {END}


def test_a_forced_token_is_forced_against_every_ban():
    rules = rules_of(
        SamplingParams(logit_bias={END: -100.0}, max_tokens=9, min_tokens=4),
        prompt_len=2,
        stop_ids=[END],
        bad_words=[(END,)],
        thinking=ThinkingBudget(THINK, END, 1),
        vocab_size=40,
    )

    free, forced = rules.now([1, THINK], []), rules.now([1, THINK], [3])

    assert len(free.ids) == 3
    assert free.mask is None
    assert len(forced.ids) == 0
    assert bits(forced.mask) == {END}
