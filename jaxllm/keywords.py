"""Misspelt keywords: a sentence with the nearest known name instead of Python's bare one."""

import inspect
from typing import Any

from jaxllm.errors import nearest


class ExplainsKeywords(type):
    """Metaclass of the public types whose keywords users type."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Checks the keywords, then builds the object as usual.

        Raises:
            TypeError: A keyword is unknown; the message names the nearest one.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in kwargs:
            if name not in known:
                guess = nearest(name, known) or "."
                raise TypeError(
                    f"{cls.__name__} got an unexpected keyword argument {name!r}{guess} "
                    f"It takes: {', '.join(known)}."
                )
        return super().__call__(*args, **kwargs)
