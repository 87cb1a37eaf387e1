"""Fixtures for all tests: CPU, eight fake devices, JAX's strict modes, tiny models.

Models are written as real checkpoints, with random weights, in a temporary
folder; nothing comes from a network and torch is not needed.
"""

import os
import signal
import tempfile

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla.flags(8)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAXLLM_LOGGING_LEVEL", "WARNING")
# Workers inherit the folder, so that each program is compiled once a run.
os.environ.setdefault("JAXLLM_CACHE_ROOT", tempfile.mkdtemp(prefix="jaxllm-tests-"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts tests in the background has them ignore Ctrl-C, which some send.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

import pytest

from jaxllm import compile_cache
from jaxllm.logs import configure
from tests.tiny import tiny_checkpoint

compile_cache.enable()
configure()  # or the first test of a process that makes an LLM would have no `caplog`


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Returns a function (family, **config) -> folder of a tiny checkpoint, made once."""
    made = {}

    def make(family="llama", **config):
        key = (family, repr(sorted(config.items())))
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(family), family, **config)
        return made[key]

    return make
