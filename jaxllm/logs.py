"""The library's logger: one line an event, to stderr, none a step.

`JAXLLM_LOGGING_LEVEL` sets the level (WARNING is silent in a normal run), and
`JAXLLM_CONFIGURE_LOGGING=0` leaves handlers to the application.
"""

import logging
import os


def configure() -> logging.Logger:
    """Returns the library's logger, with a handler unless someone else set one up."""
    logger = logging.getLogger("jaxllm")
    if logger.handlers or os.environ.get("JAXLLM_CONFIGURE_LOGGING") == "0":
        return logger
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jaxllm: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(os.environ.get("JAXLLM_LOGGING_LEVEL", "INFO").upper())
    logger.propagate = False
    return logger
