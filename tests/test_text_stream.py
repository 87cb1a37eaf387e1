"""Text token by token equals text all at once, and stop strings are found where they end."""

import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from jaxllm.text_stream import Detokenizer, TextStream, first_match, text_of

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It was a sunny day, and all was well.",
    "naïve café — déjà vu; Ünïcödé, ¿qué? Привет, мир! Καλημέρα κόσμε",
    "日本語のテキスト。中文文本,한국어 텍스트 日本語日本語",
    "emoji 👩‍👩‍👧‍👦 and 🇫🇷🇫🇷🇫🇷 flags 👍👍👍👍",
    "def f(x):\n    return x + 1\n\n\tTabs  and   spaces",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]


def wrap(inner, **more):
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>"],
        **more,
    )


def byte_level():
    """As GPT-2's: any bytes can stand side by side, and merges cut characters anywhere."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return wrap(inner)


def byte_fallback():
    """As Llama 2's: "▁" for spaces, and single bytes for characters it does not have."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, limit_alphabet=60, show_progress=False
    )
    learned.train_from_iterator(CORPUS, trainer)
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().get)
    pieces += [f"<0x{i:02X}>" for i in range(256)]
    merges = [tuple(m) for m in json.loads(learned.to_str())["model"]["merges"]]
    inner = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(inner)


def word_level():
    """Drops the space of a first token, as SentencePiece models do; knows few words."""
    words = ["▁Hello", "▁world", "▁Paris", ".", "▁", "s"]
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return wrap(inner)


def word_piece():
    """As BERT's: spaces come from the decoder, and clean-up takes some away again."""
    words = ["a", "do", "not", "n", "'", "##s", "##ing", ".", ",", "hello"]
    inner = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return wrap(inner, clean_up_tokenization_spaces=True)


def no_decoder():
    """Joins its tokens with spaces, special ones too."""
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*SPECIAL, "a", "b"])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(inner)


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "word_level": word_level(),
    "word_piece": word_piece(),
    "no_decoder": no_decoder(),
    "slow_bytes": ByT5Tokenizer(),
}
BYTES = [name for name in TOKENIZERS if "byte" in name]


def byte_token(name, byte):
    """The token of one byte."""
    if name == "slow_bytes":
        return byte + 3
    # GPT-2 shows the bytes that are no printable character as the letters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = chr(byte) if byte in printable else chr(256 + others.index(byte))
    piece = letter if name == "byte_level" else f"<0x{byte:02X}>"
    return TOKENIZERS[name].convert_tokens_to_ids(piece)


def settings_of(**more):
    """The part of SamplingParams that is about text."""
    defaults = {
        "stop": (),
        "include_stop_str_in_output": False,
        "min_tokens": 0,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
    }
    return SimpleNamespace(**(defaults | more))


def encode(name, text):
    return TOKENIZERS[name].encode(text, add_special_tokens=False)


def stream_through(stream, tokens):
    """What is visible after each token, and the stop string that came."""
    seen = []
    for token in tokens:
        found = stream.append(token)
        seen.append(stream.visible)
        if found is not None:
            return seen, found
    stream.finish()
    return [*seen, stream.visible], None


def ids_of(tokenizer, more=3):
    """Ids that the tokenizer has, and some that only its model has."""
    return st.integers(0, len(tokenizer) + more - 1)


texts = st.lists(
    st.one_of(
        st.sampled_from(CORPUS), st.text(max_size=8), st.sampled_from(["👍", "日", "é", " ", "\n"])
    ),
    max_size=6,
).map("".join)


# ---------------------------------------------------------------- all at once


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_same_text_one_by_one_and_at_once(name, data):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer)
    if name in BYTES:
        # Mostly text, cut and joined anywhere, so that whole and broken characters meet.
        words = texts.map(lambda t: encode(name, t)).flatmap(
            lambda t: st.tuples(st.just(t), st.integers(0, 3), st.integers(0, 3))
        )
        cut = words.map(lambda w: w[0][w[1] : len(w[0]) - w[2]])
        runs = st.one_of(cut, st.lists(ids, max_size=12))
    else:
        runs = st.lists(ids, max_size=12)
    tokens = list(itertools.chain(*data.draw(st.lists(runs, max_size=4))))
    prompt = data.draw(runs)
    skip, tight, ends = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    params = settings_of(skip_special_tokens=skip, spaces_between_special_tokens=not tight)
    stream = TextStream(tokenizer, prompt, params)

    for i, token in enumerate(tokens):
        stream.append(token, is_stop_token=ends and i == len(tokens) - 1)
    stream.finish()

    assert stream.visible == stream.text == text_of(tokenizer, prompt, tokens, params, ends)


@pytest.mark.parametrize("name", BYTES)
def test_bytes_with_others_between_them_are_no_character(name):
    """The prompt ends with the first byte of U+0380; its second comes behind another."""
    prompt = [*encode(name, "x"), byte_token(name, 0xCE)]
    tokens = [byte_token(name, 0xE0), byte_token(name, 0x80), *encode(name, "日本語")]
    stream = TextStream(TOKENIZERS[name], prompt, settings_of())

    seen, _ = stream_through(stream, tokens)

    assert seen[-1] == text_of(TOKENIZERS[name], prompt, tokens, settings_of(), False)
    assert seen[-1].endswith("日本語")
    assert "\u0380" not in seen[-1]


@pytest.mark.parametrize("name", BYTES)
@settings(max_examples=150, deadline=None)
@given(before=texts, text=texts)
def test_text_comes_back_as_it_was(name, before, text):
    prompt, tokens = encode(name, "x" + before), encode(name, before + "|" + text)
    whole = TOKENIZERS[name].decode(prompt + tokens, clean_up_tokenization_spaces=False)
    start = TOKENIZERS[name].decode(prompt, clean_up_tokenization_spaces=False)

    assert start + text_of(TOKENIZERS[name], prompt, tokens, settings_of(), False) == whole


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_broken_bytes_show_as_decoding_all_of_them_shows_them(data):
    tokenizer = TOKENIZERS["byte_level"]
    text = data.draw(texts)
    runs = st.one_of(
        st.lists(ids_of(tokenizer, more=0), max_size=12),
        st.lists(st.sampled_from(encode("byte_level", "日👍é\u00ff" + text)), max_size=12),
    )
    tokens = list(itertools.chain(*data.draw(st.lists(runs, max_size=4))))
    stream = TextStream(tokenizer, [], settings_of())

    for i, token in enumerate(tokens):
        stream.append(token)
        so_far = tokenizer.decode(tokens[: i + 1], skip_special_tokens=True)
        # Three tokens that are no text may wait: together they could be one character.
        assert so_far.startswith(stream.text)
        assert set(so_far[len(stream.text) :]) <= {"\ufffd"}
        assert len(so_far) - len(stream.text) <= 3 or so_far.endswith("\ufffd")


@pytest.mark.parametrize("name", BYTES)
def test_a_character_behind_broken_bytes_is_whole(name):
    tokenizer = TOKENIZERS[name]
    emoji = [byte_token(name, byte) for byte in "👍".encode()]
    broken = emoji[1:2] * 9

    text = text_of(tokenizer, encode(name, "x"), [*broken, *emoji], settings_of(), False)

    assert text.endswith("👍")
    assert set(text[:-1]) <= {"\ufffd"}


def test_one_broken_byte_spoils_no_byte_tokens_around_it():
    tokenizer = TOKENIZERS["byte_fallback"]
    good, bad = (
        [byte_token("byte_fallback", b) for b in "☃".encode()],
        byte_token("byte_fallback", 255),
    )

    text = text_of(tokenizer, [], [*good, bad, *encode("byte_fallback", "a")], settings_of(), False)

    assert text == "☃\ufffd a"


def test_characters_come_out_with_their_last_byte():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [byte_token("byte_level", byte) for byte in ("日" * 40).encode()]
    stream = Detokenizer(tokenizer, [])

    pieces = [stream.extend([token]) for token in ids]

    assert "".join(pieces) == "日" * 40
    assert [bool(piece) for piece in pieces[:6]] == [False, False, True, False, False, True]


def test_spaces_between_special_tokens_can_be_left_out():
    tokenizer = TOKENIZERS["no_decoder"]
    tokens = tokenizer.convert_tokens_to_ids(["a", "<s>", "</s>", "<s>", "b"])

    shown = settings_of(skip_special_tokens=False)
    tight = settings_of(skip_special_tokens=False, spaces_between_special_tokens=False)

    prompt = tokens[:1]
    assert text_of(tokenizer, prompt, tokens, shown, False) == " a <s> </s> <s> b"
    assert text_of(tokenizer, prompt, tokens, tight, False) == " a <s></s><s> b"


@pytest.mark.parametrize("between", ["</s>", 9999])
def test_tokens_without_text_do_not_take_the_space_of_the_next_one(between):
    tokenizer = TOKENIZERS["word_level"]
    hello, paris, end = tokenizer.convert_tokens_to_ids(["▁Hello", "▁Paris", "</s>"])
    nothing = [end if between == "</s>" else between] * 20

    params = settings_of()

    assert text_of(tokenizer, [hello], [*nothing, paris], params, False) == " Paris"
    assert text_of(tokenizer, [hello, *nothing], [paris], params, False) == " Paris"
    stream = TextStream(tokenizer, [hello, *nothing], params)
    assert stream_through(stream, [*nothing, paris])[0][-1] == " Paris"


def test_the_context_begins_with_a_whole_character():
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt, tokens = (
        encode("byte_fallback", "x👍☃👍"),
        [byte_token("byte_fallback", b) for b in "☃".encode()],
    )

    assert text_of(tokenizer, prompt, tokens, settings_of(), False) == "☃"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_detokenize_or_tokenizer_the_text_is_empty(name):
    params = settings_of(detokenize=False)

    for tokenizer, p in [(TOKENIZERS[name], params), (None, settings_of())]:
        stream = TextStream(tokenizer, [4], p)
        assert stream.append(4) is None
        stream.finish()
        assert stream.text == stream.visible == text_of(tokenizer, [4], [4], p, False) == ""


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.lengths = []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, tokens, **more):
        self.lengths.append(len(tokens))
        return self.tokenizer.decode(tokens, **more)


@pytest.mark.parametrize("name", BYTES)
def test_the_work_for_a_token_does_not_grow(name):
    broken, letter = byte_token(name, 0x9F), byte_token(name, ord("a"))
    tokens = [*encode(name, " ".join(CORPUS)), *[broken] * 100, letter, *[9999] * 100] * 5
    counting = Counting(TOKENIZERS[name])
    stream = TextStream(counting, tokens, settings_of(stop=("never comes",)))

    for token in tokens:
        stream.append(token)

    assert max(counting.lengths) < 15
    assert len(counting.lengths) < 3 * len(tokens)


# ---------------------------------------------------------------- stop strings


def naive(name, prompt, tokens, params):
    """Text and stop string by decoding every prefix in full."""
    tokenizer = TOKENIZERS[name]
    start = tokenizer.decode(prompt)

    texts = [tokenizer.decode(prompt + tokens[:n]) for n in range(len(tokens) + 1)]
    # The longest so far: a byte that waits for its next ones spoils all bytes before it.
    texts = [text[len(start) :].rstrip("\ufffd") for text in texts]
    texts = list(itertools.accumulate(texts, lambda *both: max(both, key=len)))

    floor = len(texts[min(params.min_tokens, len(tokens))])
    for n in range(params.min_tokens + 1, len(tokens) + 1):
        text = texts[n]
        ends = [
            (i + len(s), order, i, s)
            for order, s in enumerate(params.stop)
            for i in [text.find(s, floor)]
            if i >= 0
        ]
        if ends:
            end, _, i, s = min(ends)
            return text[: end if params.include_stop_str_in_output else i], s
    return texts[-1], None


@pytest.mark.parametrize("name", BYTES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_strings_are_found_as_by_decoding_every_prefix(name, data):
    text = data.draw(st.one_of(texts, st.text("ab日👍", max_size=30)))
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 5))
    inside = spans.map(lambda span: text[span[0] : span[0] + span[1]])
    stop = data.draw(
        st.lists(
            st.one_of(inside, st.text("ab日👍", min_size=1, max_size=4)).filter(bool), max_size=4
        )
    )
    params = settings_of(
        stop=tuple(stop),
        min_tokens=data.draw(st.sampled_from([0, 0, 1, 3, 8])),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    prompt, tokens = encode(name, "x|"), encode(name, "|" + text)
    expected, found = naive(name, prompt, tokens, params)
    stream = TextStream(TOKENIZERS[name], prompt, params)

    seen, by_stream = stream_through(stream, tokens)

    assert (stream.text, by_stream) == (expected, found)
    assert seen[-1] == stream.text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))


@pytest.mark.parametrize("includes", [False, True])
def test_a_stop_string_across_tokens_cuts_at_its_start_or_its_end(includes):
    tokens = encode("byte_level", "all was well. 日本語 and more")
    params = settings_of(stop=["l. 日本"], include_stop_str_in_output=includes)
    stream = TextStream(TOKENIZERS["byte_level"], [], params)

    seen, found = stream_through(stream, tokens)

    assert found == "l. 日本"
    assert stream.text == stream.visible == "all was wel" + "l. 日本" * includes
    assert len(seen) < len(tokens)


def test_the_stop_string_that_ends_first_wins_and_then_the_first_of_the_list():
    assert first_match("xabcd", ["abcd", "bc"]) == (2, 4, "bc")
    assert first_match("xabc", ["c", "abc"]) == (3, 4, "c")
    assert first_match("xabc", ["abc", "c"]) == (1, 4, "abc")
    assert first_match("xabc", ["d"]) is None


def test_visible_text_holds_back_what_may_become_a_stop_string():
    a, b = encode("byte_level", "a")[0], encode("byte_level", "b")[0]
    stream = TextStream(TOKENIZERS["byte_level"], [], settings_of(stop=("aab",)))

    visible = []
    for token in [b, a, a, a]:
        stream.append(token)
        visible.append(stream.visible)
    stream.finish()

    assert visible == ["b", "b", "b", "ba"]
    assert stream.visible == stream.text == "baaa"


def test_a_stop_string_that_will_be_shown_is_not_held_back():
    stream = TextStream(
        TOKENIZERS["byte_level"], [], settings_of(stop=("ab",), include_stop_str_in_output=True)
    )

    stream.append(encode("byte_level", "a")[0])

    assert stream.visible == "a"


def test_text_of_the_first_min_tokens_is_not_searched():
    a, b = encode("byte_level", "a")[0], encode("byte_level", "b")[0]
    stream = TextStream(TOKENIZERS["byte_level"], [], settings_of(stop=("ab",), min_tokens=3))

    found = [stream.append(token) for token in [a, b, a, b, a, b]]

    assert found == [None, None, None, None, None, "ab"]
    assert stream.text == "abab"


@pytest.mark.parametrize(("includes", "text"), [(False, "a"), (True, "ab")])
def test_text_of_a_stop_token_is_left_out_or_shown(includes, text):
    a, b = encode("byte_level", "a")[0], encode("byte_level", "b")[0]
    params = settings_of(include_stop_str_in_output=includes)
    stream = TextStream(TOKENIZERS["byte_level"], [], params)

    stream.append(a)
    stream.append(b, is_stop_token=True)
    stream.finish()

    assert stream.text == text_of(TOKENIZERS["byte_level"], [], [a, b], params, True) == text


def test_nothing_comes_after_the_end():
    a = encode("byte_level", "a")[0]
    stream = TextStream(TOKENIZERS["byte_level"], [], settings_of(stop=("a",)))

    assert stream.append(a) == "a"

    stream.finish()
    with pytest.raises(RuntimeError, match="A token came after the end of its text"):
        stream.append(a)
