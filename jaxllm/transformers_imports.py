"""What jaxllm uses of transformers, imported without the PyTorch that it would bring.

transformers imports torch, where it is installed, as soon as a config class is used: for
one function of rotary tables, which no config calls. That takes two to ten seconds, and
is most of a start. Here `torch` is a stand-in meanwhile, which imports the real one when
somebody asks it for anything, so that models of transformers in this process still work.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TORCH = "torch"


class _WhenUsed(types.ModuleType):
    """A module that is imported when the first of its attributes is asked for."""

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


@contextmanager
def torch_when_used() -> Iterator[None]:
    """A stretch of imports in which `import torch` is put off; nothing where torch is in."""
    if TORCH in sys.modules:
        yield
        return
    stand_in = _WhenUsed(TORCH)
    stand_in.__spec__ = importlib.util.find_spec(TORCH)  # which transformers looks at
    sys.modules[TORCH] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(TORCH) is stand_in:
            del sys.modules[TORCH]


with torch_when_used():
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

__all__ = ["CONFIG_MAPPING", "AutoTokenizer", "PreTrainedConfig"]
