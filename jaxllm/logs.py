"""The library's logger and the one switch of how much it says.

One line an event, to stderr, none a step. `set_verbosity`, or `JAXLLM_LOGGING_LEVEL`
before the first model, sets how much; `JAXLLM_CONFIGURE_LOGGING=0` leaves handlers to
the application. vLLM's names of these variables are read where ours are not set.
"""

import logging
import os
import sys
from typing import Literal

LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "debug": logging.DEBUG}

Verbosity = Literal["quiet", "normal", "debug"]

_verbosity: Verbosity = "normal"


class _StderrHandler(logging.Handler):
    """Writes to what stderr is at the time: notebooks and test runners replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except (OSError, ValueError):  # a closed stream
            self.handleError(record)


def configure() -> logging.Logger:
    """Returns the library's logger, with a handler unless someone else set one up."""
    logger = logging.getLogger("jaxllm")
    if logger.handlers or _setting("CONFIGURE_LOGGING") == "0":
        return logger
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("jaxllm: %(message)s"))
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel((_setting("LOGGING_LEVEL") or "INFO").upper())
    logger.propagate = False
    return logger


def set_verbosity(verbosity: Verbosity) -> None:
    """Sets how much jaxllm says: log lines and progress bars together.

    Args:
        verbosity: "quiet" leaves warnings and errors, and shows no progress bar;
            "normal" is one summary a model and bars for long work; "debug" is all.

    Raises:
        ValueError: It is none of them.
    """
    if verbosity not in LEVELS:
        raise ValueError(f"verbosity={verbosity!r} is not one of {list(LEVELS)}.")
    global _verbosity  # the one thing here that a caller sets for the whole process
    _verbosity = verbosity
    configure().setLevel(LEVELS[verbosity])


def shows_progress() -> bool:
    """Whether progress bars are wanted."""
    return _verbosity != "quiet"


def _setting(name: str) -> str | None:
    return os.environ.get(f"JAXLLM_{name}") or os.environ.get(f"VLLM_{name}")
