"""The exceptions that callers can catch.

Every message says what was given, the rule it breaks and what to type instead.
The ones that a caller can mend are `ValueError`s too, so that code written for
other engines keeps working.
"""

import difflib
from collections.abc import Iterable


class JaxLLMError(Exception):
    """Base of every error that jaxllm raises on purpose."""


class ConfigError(JaxLLMError, ValueError):
    """An argument of `LLM(...)` is wrong, alone or for this model or machine."""


class UnsupportedModelError(JaxLLMError, ValueError):
    """The model's architecture, or a setting in its config, is not implemented."""


class FamilyImportError(JaxLLMError, ImportError):
    """The code of a supported architecture could not be imported; the cause says why."""


class CheckpointError(JaxLLMError, ValueError):
    """A checkpoint folder or one of its files cannot be used as it is."""


class RequestError(JaxLLMError, ValueError):
    """A prompt or its sampling parameters cannot be run; nothing was started."""


class OutOfPagesError(JaxLLMError):
    """The page pool was asked for more pages than are free: a bug of the scheduler."""


class NativeBuildError(JaxLLMError):
    """A kernel in C++ could not be compiled for this processor."""


class RecompileError(JaxLLMError):
    """Something was compiled after warm-up, and `JAXLLM_RECOMPILE=error` forbids it."""


class DistributedError(JaxLLMError):
    """The processes of a job do not do the same, or one of them is gone; start all again."""


class NonFiniteError(JaxLLMError):
    """The model gave NaN or infinite logits."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
