"""When a sequence ends, and which reason it gives where several hold."""

from itertools import product

import pytest

from jaxllm.sampling_params import RepetitionDetectionParams
from jaxllm.stopping import end_if_done, repeats
from tests.fake import make_sequence

EOS, OTHER_EOS, STOP = 2, 3, 7


class FakeText:
    """Text that finds stop strings where it is told."""

    def __init__(self, found=None):
        self.found = found
        self.calls = []

    def append(self, token_id, *, is_stop_token=False):
        self.calls.append((token_id, is_stop_token))
        return self.found

    def finish(self):
        self.calls.append("finish")


def ended(output, *, text=None, max_model_len=100, **params):
    """A sequence with this output, after its last token was looked at."""
    seq = make_sequence(eos=(EOS, OTHER_EOS), **params)
    seq.output_token_ids += output
    seq.text = text
    end_if_done(seq, max_model_len)
    return seq


def reasons(output, **settings):
    seq = ended(output, **settings)
    return seq.finish_reason, seq.stop_reason


LOOP = RepetitionDetectionParams(max_pattern_size=2, min_count=2)

# -------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        ([5], {}, (None, None)),
        ([EOS], {}, ("stop", None)),
        ([EOS, 5], {}, (None, None)),
        ([OTHER_EOS], {}, ("stop", OTHER_EOS)),
        ([STOP], {"stop_token_ids": [STOP]}, ("stop", STOP)),
        ([EOS], {"stop_token_ids": [EOS]}, ("stop", None)),
        ([EOS], {"ignore_eos": True}, (None, None)),
        ([OTHER_EOS], {"ignore_eos": True}, (None, None)),
        ([EOS], {"ignore_eos": True, "stop_token_ids": [EOS]}, ("stop", EOS)),
        ([5, 6], {"max_tokens": 2}, ("length", None)),
        ([5, 6], {"max_tokens": 3}, (None, None)),
        ([5, 6], {"max_tokens": None}, (None, None)),
        ([5] * 7, {"max_tokens": None, "max_model_len": 10}, ("length", None)),
        ([5] * 6, {"max_tokens": None, "max_model_len": 10}, (None, None)),
        ([5, 5], {"repetition_detection": LOOP}, ("repetition", "repetition_detected")),
        ([5, 6], {"repetition_detection": LOOP}, (None, None)),
        ([5, 5], {"repetition_detection": LOOP, "min_tokens": 3}, (None, None)),
        (
            [5, 5, 5],
            {"repetition_detection": LOOP, "min_tokens": 3},
            ("repetition", "repetition_detected"),
        ),
    ],
    ids=str,
)
def test_a_sequence_ends_by_its_last_token(output, params, expected):
    assert reasons(output, **params) == expected


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        ([5, EOS], {"max_tokens": 2}, ("stop", None)),
        ([5, STOP], {"max_tokens": 2, "stop_token_ids": [STOP]}, ("stop", STOP)),
        ([EOS, EOS], {"repetition_detection": LOOP}, ("stop", None)),
        ([5, 5], {"max_tokens": 2, "repetition_detection": LOOP}, ("length", None)),
    ],
    ids=["eos and length", "stop token and length", "eos and repetition", "length and repetition"],
)
def test_the_first_reason_in_order_is_given(output, params, expected):
    assert reasons(output, **params) == expected


def test_a_sequence_without_eos_does_not_end_by_it():
    seq = make_sequence(eos=())
    seq.output_token_ids += [EOS]
    end_if_done(seq, 100)

    assert not seq.is_finished


# -------------------------------------------------------------------- stop strings


@pytest.mark.parametrize(
    ("output", "params"),
    [
        ([5], {}),
        ([EOS], {}),
        ([STOP], {"stop_token_ids": [STOP]}),
        ([5], {"max_tokens": 1}),
        ([5, 5], {"repetition_detection": LOOP}),
    ],
    ids=["nothing else", "eos", "stop token", "length", "repetition"],
)
def test_a_stop_string_replaces_every_other_reason(output, params):
    assert reasons(output, text=FakeText("###"), **params) == ("stop", "###")


def test_text_gets_each_token_and_is_told_whether_it_stops():
    texts = {name: FakeText() for name in ("plain", "eos", "stop token", "ignored")}

    ended([4, 5], text=texts["plain"])
    ended([4, EOS], text=texts["eos"])
    ended([4, STOP], text=texts["stop token"], stop_token_ids=[STOP])
    ended([4, EOS], text=texts["ignored"], ignore_eos=True)

    assert texts["plain"].calls == [(5, False)]
    assert texts["eos"].calls == [(EOS, True), "finish"]
    assert texts["stop token"].calls == [(STOP, True), "finish"]
    assert texts["ignored"].calls == [(EOS, False)]


def test_text_is_not_finished_while_the_sequence_goes_on():
    text = FakeText()

    assert reasons([5], text=text) == (None, None)
    assert text.calls == [(5, False)]


def test_text_that_found_its_stop_string_is_not_finished_again():
    text = FakeText("###")

    assert reasons([5], text=text, max_tokens=1) == ("stop", "###")
    assert text.calls == [(5, False)]


def test_text_without_stop_strings_leaves_the_reason_alone():
    assert reasons([5], text=FakeText(), max_tokens=1) == ("length", None)


# -------------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    ("tokens", "least", "most", "count", "expected"),
    [
        ([1, 1], 1, 1, 2, True),
        ([1, 1], 1, 1, 3, False),
        ([1], 1, 1, 2, False),
        ([], 1, 1, 2, False),
        ([1, 2, 1, 2], 1, 1, 2, False),
        ([1, 2, 1, 2], 1, 2, 2, True),
        ([1, 2, 1, 2], 1, 9, 2, True),
        ([1, 2, 1, 2, 3], 1, 9, 2, False),
        ([9, 1, 2, 1, 2], 2, 2, 2, True),
        ([2, 1, 2, 1, 2], 2, 2, 2, True),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 1, 3, 3, True),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 1, 3, 4, False),
        ([1, 1], 2, 2, 2, False),
        ([1, 1, 1, 1], 2, 2, 2, True),
        ([1, 1], 0, 1, 2, True),
        ([1, 1, 1], 0, 0, 2, False),
    ],
)
def test_a_pattern_at_the_end_is_found_if_it_comes_often_enough(
    tokens, least, most, count, expected
):
    rule = RepetitionDetectionParams(max_pattern_size=most, min_pattern_size=least, min_count=count)

    assert repeats(tokens, rule) == expected


def has_repetition(tokens, least, most, count):
    """By its definition."""
    sizes = range(max(least, 1), most + 1)
    return any(tokens[-size * count :] == tokens[-size:] * count for size in sizes)


@pytest.mark.parametrize(
    ("least", "most", "count"), [(1, 1, 2), (1, 4, 2), (2, 3, 2), (1, 2, 3), (1, 9, 2)]
)
def test_repetition_is_found_in_every_short_sequence_that_has_it(least, most, count):
    rule = RepetitionDetectionParams(max_pattern_size=most, min_pattern_size=least, min_count=count)

    for size in range(1, 9):
        for tokens in product((0, 1), repeat=size):
            expected = has_repetition(list(tokens), least, most, count)
            assert repeats(list(tokens), rule) == expected, tokens
