"""Text that comes in pieces: never half a character, and the same as all at once."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxllm.errors import CheckpointError
from jaxllm.hub import DEMO
from jaxllm.tokenizer import Detokenizer, load_tokenizer

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
    pieces.append(detokenizer.finish())

    assert "".join(pieces) == detokenizer.text == text
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_every_prefix_is_a_prefix_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    for stop in range(len(ids)):
        detokenizer = Detokenizer(tokenizer, [])
        detokenizer.extend(ids[:stop])
        detokenizer.finish()
        assert text.startswith(detokenizer.text)


def test_half_a_character_at_the_end_is_dropped(tokenizer):
    ids = tokenizer.encode("ok 👍")
    detokenizer = Detokenizer(tokenizer, [])

    detokenizer.extend(ids[:-1])
    detokenizer.finish()

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
        detokenizer.finish()

    assert left_out.text == " Paris"
    assert "<end>" in shown.text


def test_folder_without_a_tokenizer_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        load_tokenizer(checkpoints("llama"))
