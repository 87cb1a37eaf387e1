import dataclasses
import inspect
from typing import ClassVar

import pytest

from jaxllm.keywords import ExplainsKeywords


class Plain(metaclass=ExplainsKeywords):
    def __init__(self, model, *, max_model_len=None, seed=0):
        self.model, self.max_model_len, self.seed = model, max_model_len, seed


@dataclasses.dataclass
class Data(metaclass=ExplainsKeywords):
    first: int = 1
    second: int = 2


def test_known_keywords_arrive():
    made = Plain("a", max_model_len=5)

    assert (made.model, made.max_model_len, made.seed) == ("a", 5, 0)


def test_a_dataclass_is_built_as_usual():
    assert Data(5, second=6) == Data(first=5, second=6)


def test_a_misspelt_keyword_is_refused_with_the_nearest_and_all_known_ones():
    with pytest.raises(
        TypeError,
        match=r"^Plain got an unexpected keyword argument 'max_model_length'; "
        r"did you mean 'max_model_len'\?\.? It takes: model, max_model_len, seed\.$",
    ):
        Plain("a", max_model_length=5)


def test_a_keyword_like_no_other_is_refused_without_a_guess():
    with pytest.raises(
        TypeError, match=r"^Data got an unexpected keyword argument 'xyz'\. It takes: first, second"
    ):
        Data(xyz=1)


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        Plain()


# ---------------------------------------------------------------- of other versions


class Translated(metaclass=ExplainsKeywords):
    _removed_keywords: ClassVar = {"best_of": "ask for n completions and choose yourself."}

    def __init__(self, n=1, size=0):
        self.n, self.size = n, size

    @classmethod
    def _translate_keywords(cls, kwargs):
        return {{"count": "n"}.get(name, name): value for name, value in kwargs.items()}


def test_a_class_may_translate_its_keywords():
    made = Translated(count=5, size=2)

    assert (made.n, made.size) == (5, 2)


def test_a_removed_keyword_says_what_to_use_instead():
    with pytest.raises(
        TypeError, match=r"^Translated does not take 'best_of': ask for n completions and choose"
    ):
        Translated(best_of=3)


def test_a_misspelt_keyword_is_found_after_the_translation():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'sise'; did you mean 'size'"):
        Translated(count=5, sise=2)


def test_help_shows_the_keywords_themselves():
    assert list(inspect.signature(Plain).parameters) == ["model", "max_model_len", "seed"]
    assert str(inspect.signature(Data)) == "(first: int = 1, second: int = 2) -> None"
