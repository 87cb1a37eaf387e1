"""Prompts become tokens as their options say, and single tokens become text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxllm.errors import CheckpointError, ConfigError, RequestError
from jaxllm.hub import DEMO
from jaxllm.tokenizer import (
    Detokenizer,
    bad_word_ids,
    certainly_too_long,
    decoded_token,
    encode,
    load_tokenizer,
    truncate_tokens,
)
from tests.test_text_stream import TOKENIZERS, byte_token

TEXTS = [
    "plain words, and more",
    "naïve café — déjà vu",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧‍👦 and 🇫🇷 flags",
    "  leading and trailing spaces  ",
    "tabs\tand\n\nlines\r\n",
    "mixed: é日👍x",
]


@pytest.fixture(scope="module")
def tokenizer():
    """The demo's: byte-level, so that a character may be cut between tokens."""
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer that drops the space of the first token, as SentencePiece models do."""
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "▁Paris": 3, ".": 4, "<end>": 5}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_pieces_join_to_the_text(tokenizer, text, step):
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("def f"))

    pieces = [detokenizer.extend(ids[i : i + step]) for i in range(0, len(ids), step)]

    assert "".join(pieces) == detokenizer.text == text
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_every_prefix_is_a_prefix_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    for stop in range(len(ids)):
        detokenizer = Detokenizer(tokenizer, [])
        detokenizer.extend(ids[:stop])
        assert text.startswith(detokenizer.text)


def test_half_a_character_at_the_end_is_dropped(tokenizer):
    ids = tokenizer.encode("ok 👍")
    detokenizer = Detokenizer(tokenizer, [])

    detokenizer.extend(ids[:-1])

    assert detokenizer.text == "ok "


def test_space_of_the_first_token_survives_behind_a_prompt(spaced):
    detokenizer = Detokenizer(spaced, [1, 2])

    detokenizer.extend([3])
    detokenizer.extend([4])

    assert detokenizer.text == " Paris."


def test_special_tokens_are_left_out_or_shown(spaced):
    left_out, shown = Detokenizer(spaced, [1]), Detokenizer(spaced, [1], skip_special_tokens=False)

    for detokenizer in (left_out, shown):
        detokenizer.extend([3, 5])

    assert left_out.text == " Paris"
    assert "<end>" in shown.text


def test_folder_without_a_tokenizer_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        load_tokenizer(checkpoints("llama"))


@pytest.mark.parametrize("mode", ["auto", "hf", "slow"])
def test_every_mode_reads_the_demos(mode, tokenizer):
    assert load_tokenizer(DEMO, mode).encode("def f") == tokenizer.encode("def f")


def test_unknown_mode_is_refused_and_the_known_ones_named():
    with pytest.raises(
        ConfigError,
        match=r"tokenizer_mode='mistral' is not implemented. "
        r"Pass one of \['auto', 'hf', 'slow'\]\.",
    ):
        load_tokenizer(DEMO, "mistral")


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "tokenizer_class": "Evil"}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)

    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- text to tokens


@pytest.fixture(scope="module")
def with_bos():
    """A tokenizer that puts the beginning of the sequence in front, as Llama's do."""
    inner = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("kwargs", "ids"),
    [
        (None, [0, 1, 2, 3]),
        ({}, [0, 1, 2, 3]),
        ({"add_special_tokens": True}, [0, 1, 2, 3]),
        ({"add_special_tokens": False}, [1, 2, 3]),
        ({"truncate_prompt_tokens": 2}, [2, 3]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [2, 3]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [0, 1]),
        ({"truncate_prompt_tokens": 2, "truncation": "do_not_truncate"}, [0, 1, 2, 3]),
        ({"truncate_prompt_tokens": None, "max_length": None}, [0, 1, 2, 3]),
        ({"truncate_prompt_tokens": -1}, [0, 1, 2, 3]),
        ({"truncation": True, "max_length": 3}, [1, 2, 3]),
        ({"truncation": "longest_first", "max_length": 3}, [1, 2, 3]),
        ({"truncation": True}, [0, 1, 2, 3]),
        ({"truncation": False, "max_length": 4}, [0, 1, 2, 3]),
    ],
)
def test_options_of_tokenizing_are_honoured(with_bos, kwargs, ids):
    assert encode(with_bos, "a b c", kwargs, 10) == ids


@pytest.mark.parametrize("kwargs", [{"truncate_prompt_tokens": -1}, {"truncation": True}])
def test_truncation_without_a_length_is_to_the_models(with_bos, kwargs):
    assert encode(with_bos, "a b c", kwargs, 2) == truncate_tokens([0, 1, 2, 3], kwargs, 2)
    assert truncate_tokens([0, 1, 2, 3], kwargs, 2) == [2, 3]


@pytest.mark.parametrize("kwargs", [{"truncate_prompt_tokens": -1}, {"truncation": True}])
def test_truncation_to_the_models_length_leaves_room_for_the_output(with_bos, kwargs):
    assert encode(with_bos, "a b c", kwargs, 4, room=1) == [1, 2, 3]
    assert truncate_tokens([0, 1, 2, 3], kwargs, 4, room=1) == [1, 2, 3]
    assert truncate_tokens([1, 2, 3], kwargs, 4, room=1) == [1, 2, 3]


def test_text_is_made_lower_case_if_asked(with_bos):
    assert encode(with_bos, "A b", {"do_lower_case": True}, 10) == [0, 1, 2]
    assert encode(with_bos, "A b", None, 10) == [0, 4, 2]


def test_token_prompts_are_cut_as_texts_are():
    assert truncate_tokens(range(5), None, 10) == [0, 1, 2, 3, 4]
    assert truncate_tokens(range(5), {"truncate_prompt_tokens": 2}, 10) == [3, 4]


def test_longer_than_max_length_is_refused_without_truncation(with_bos):
    with pytest.raises(
        RequestError,
        match=r"contains 4 input tokens, more than max_length=3. Pass truncation=True too",
    ):
        encode(with_bos, "a b c", {"max_length": 3}, 10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"truncation": "only_first"}, r"truncation='only_first' .* one of \[None, False, True, "),
        ({"truncation": 1.5}, r"truncation=1.5 in tokenization_kwargs must be one of"),
        ({"truncation_side": "both"}, r"must be one of \[None, 'left', 'right'\]"),
        ({"add_special_tokens": "no"}, r"add_special_tokens='no' in tokenization_kwargs must be"),
        ({"do_lower_case": [1]}, r"do_lower_case=\[1\] in tokenization_kwargs must be one of"),
        ({"max_length": 0}, r"max_length=0 in tokenization_kwargs must be an integer of at least"),
        ({"max_length": -1}, r"max_length=-1 .* an integer of at least 1\."),
        ({"truncate_prompt_tokens": 0}, r"=0 .* at least 1, or -1 for the model's maximum\."),
        ({"truncate_prompt_tokens": -2}, r"=-2 .* at least 1, or -1 for the model's maximum\."),
        ({"truncate_prompt_tokens": 1.0}, r"=1.0 in tokenization_kwargs must be an integer"),
        ({"truncate_prompt_tokens": True}, r"=True in tokenization_kwargs must be an integer"),
        ({"truncate_prompt_tokens": 11}, r"value \(11\) is greater than max_model_len \(10\)\."),
        ({"max_length": 11}, r"max_length value \(11\) is greater than max_model_len \(10\)"),
        (["max_length"], r"tokenization_kwargs must be a dict, got \['max_length'\]"),
    ],
)
def test_wrong_options_are_refused(with_bos, kwargs, message):
    with pytest.raises(RequestError, match=message):
        encode(with_bos, "a", kwargs, 10)
    with pytest.raises(RequestError, match=message):
        truncate_tokens([1], kwargs, 10)


def test_padding_and_unknown_options_are_ignored_with_one_warning(with_bos, caplog):
    kwargs = {"padding": True, "stride": 2, "pad_prompt_tokens": 5}

    with caplog.at_level("WARNING", "jaxllm"):
        for _ in range(3):
            assert encode(with_bos, "a", kwargs, 10) == [0, 1]

    (record,) = caplog.records
    assert record.getMessage() == (
        "tokenization_kwargs ['pad_prompt_tokens', 'padding', 'stride'] are not supported and "
        "will be ignored"
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_half_a_surrogate_pair_is_refused(name):
    with pytest.raises(RequestError, match=r"half a surrogate pair at character 1 \('\\ud800'\)"):
        encode(TOKENIZERS[name], "a\ud800", None, 10)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "slow_bytes"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(name):
    tokenizer = TOKENIZERS[name]
    longest = max(map(len, tokenizer.get_vocab()))

    assert certainly_too_long(tokenizer, "x" * (10 * longest + 1), 10)
    assert not certainly_too_long(tokenizer, "x" * 10 * longest, 10)
    with pytest.raises(
        RequestError,
        match=rf"context length is 10 tokens\. However, your prompt contains at least 11 input "
        rf"tokens \({10 * longest + 1} characters\)\. Shorten",
    ):
        encode(tokenizer, "x" * (10 * longest + 1), None, 10)


@pytest.mark.parametrize("name", ["word_level", "word_piece", "no_decoder"])
def test_a_long_word_that_is_one_unknown_token_is_not_too_long(name):
    assert not certainly_too_long(TOKENIZERS[name], "x" * 10_000, 10)


def test_a_text_that_is_to_be_truncated_is_never_too_long():
    ids = encode(TOKENIZERS["byte_level"], "x" * 10_000, {"truncate_prompt_tokens": -1}, 10)

    assert len(ids) == 10


# ---------------------------------------------------------------- words to avoid


def ids_for(tokenizer, text):
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def test_a_bad_word_is_avoided_at_the_start_and_behind_a_space():
    tokenizer = TOKENIZERS["byte_level"]
    plain, spaced = ids_for(tokenizer, "dog"), ids_for(tokenizer, " dog")

    found = bad_word_ids(tokenizer, ["dog"])

    assert found == ((plain, spaced) if len(plain) == len(spaced) else (plain,))
    assert bad_word_ids(tokenizer, [" dog", "dog"]) == found


def test_a_form_of_another_length_or_the_same_start_is_left_out():
    tokenizer = TOKENIZERS["byte_level"]
    assert len(ids_for(tokenizer, "日")) < len(ids_for(tokenizer, " 日"))

    assert bad_word_ids(tokenizer, ["日"]) == (ids_for(tokenizer, "日"),)
    assert len(bad_word_ids(TOKENIZERS["no_decoder"], ["a", "a b"])) == 2


def test_both_forms_of_a_word_of_one_token_each_are_avoided(tokenizer):
    assert bad_word_ids(tokenizer, ["self"]) == (
        ids_for(tokenizer, "self"),
        ids_for(tokenizer, " self"),
    )


def test_a_bad_word_without_tokens_is_refused(tokenizer):
    with pytest.raises(RequestError, match="bad_words contain '  ', which gives no tokens"):
        bad_word_ids(tokenizer, ["  "])


def test_too_many_bad_words_are_refused(tokenizer):
    words = [f"{a}{b}" for a in "xyzq" for b in range(40)]

    with pytest.raises(RequestError, match="at most 128 sequences and 1024 tokens are possible"):
        bad_word_ids(tokenizer, words)
    with pytest.raises(RequestError, match="bad_words are 1 sequences of 2000 tokens in all"):
        bad_word_ids(TOKENIZERS["no_decoder"], ["a " * 2000])


def test_bad_words_that_the_model_does_not_have_are_refused():
    with pytest.raises(
        RequestError, match=r"out-of-vocab token ids \[5\]. Vocabulary size: 5. The tokenizer has"
    ):
        bad_word_ids(TOKENIZERS["no_decoder"], ["a", "b"], vocab_size=5)


# ---------------------------------------------------------------- single tokens to text


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_the_last_byte_of_a_character_has_its_text_and_the_others_none(name):
    tokenizer = TOKENIZERS[name]
    tokens = [byte_token(name, byte) for byte in "☃👍é".encode()]

    texts = [decoded_token(tokenizer, tokens[:i], token) for i, token in enumerate(tokens)]

    assert texts == ["", "", "☃", "", "", "", "👍", "", "é"]


def test_text_in_front_of_the_first_byte_is_not_repeated():
    tokenizer = TOKENIZERS["byte_level"]
    before, tokens = ids_for(tokenizer, "a b"), [byte_token("byte_level", b) for b in "é".encode()]

    assert decoded_token(tokenizer, [*before, tokens[0]], tokens[1]) == "é"
    assert decoded_token(tokenizer, before, tokens[1]) == ""


def test_special_tokens_are_shown_and_unknown_ones_have_no_text():
    tokenizer = TOKENIZERS["byte_level"]

    assert decoded_token(tokenizer, [], tokenizer.eos_token_id) == "</s>"
    assert decoded_token(tokenizer, [], len(tokenizer) + 5) == ""
    assert decoded_token(tokenizer, [], ids_for(tokenizer, " dog")[0]).startswith(" ")
