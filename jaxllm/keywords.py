"""Keywords as users type them: sentences for misspelt and removed ones, and translation.

Host code that knows no single class: a class says with `_removed_keywords` and
`_translate_keywords` what is special about its own keywords.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import nearest


class ExplainsKeywords(type):
    """Metaclass of the public types whose keywords users type."""

    _removed_keywords: Mapping[str, str] = {}
    """Keywords that other versions have and the class has not, and what to type instead."""

    def _translate_keywords(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the class's own keywords for those of other libraries or versions.

        A class that has any defines a classmethod of this name; it may drop and
        rename, and leaves in what it does not know.
        """
        return kwargs

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of `__init__`, for `help` and notebooks, which would see `__call__`'s."""
        return _signature(cls)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Translates and checks the keywords, then builds the object as usual.

        Raises:
            TypeError: A keyword is unknown, and the message names the nearest one; or
                it was removed, and the message says what to use instead.
        """
        kwargs = cls._translate_keywords(kwargs)
        known = _signature(cls).parameters
        for name in kwargs:
            if name in known:
                continue
            if name in cls._removed_keywords:
                raise TypeError(
                    f"{cls.__name__} does not take {name!r}: {cls._removed_keywords[name]}"
                )
            guess = nearest(name, known) or "."
            raise TypeError(
                f"{cls.__name__} got an unexpected keyword argument {name!r}{guess} "
                f"It takes: {', '.join(known)}."
            )
        return super().__call__(*args, **kwargs)


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    """That of a class's `__init__` without `self`; making it anew is slow."""
    whole = inspect.signature(cls.__init__)
    return whole.replace(parameters=list(whole.parameters.values())[1:])
