"""The persistent cache of compiled programs: on by default, so a second start is quick.

It lies under `JAXLLM_CACHE_ROOT` (or vLLM's `VLLM_CACHE_ROOT`), by default the
user's cache folder, and keeps autotuning results beside the programs. A folder
that the user has given JAX is left alone.
"""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

SETTING = "jax_compilation_cache_dir"
"""JAX's own name for it; None where nobody has set it."""


def cache_root() -> Path:
    """Returns the folder for everything jaxllm keeps between runs."""
    asked = os.environ.get("JAXLLM_CACHE_ROOT") or os.environ.get("VLLM_CACHE_ROOT")
    if asked:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"


def enable() -> str:
    """Turns the cache on, unless it is on already; returns its folder."""
    folder = getattr(jax.config, SETTING)
    if folder is None:
        folder = str(cache_root() / "xla")
        jax.config.update(SETTING, folder)
        # Small programs count too: a model has dozens, and each costs a second or more.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # JAX decides at its first compilation, which may lie behind us.
        compilation_cache.reset_cache()
    return folder
