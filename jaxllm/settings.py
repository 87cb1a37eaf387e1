"""What jaxllm sets of JAX and XLA, and who had the last word: a table.

Everything the user has set is left alone. What counts from the start of the backend on
is set before it, or reported as too late. Options of single programs go with each
compilation, so that they change nothing else in the process.
"""

import os
from dataclasses import dataclass
from typing import Literal

import jax

from jaxllm import compile_cache
from jaxllm.devices import SetBy, memory_setting

Platform = Literal["all", "cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, as it is in force."""

    name: str
    value: str
    why: str
    platform: Platform
    """Where it matters."""

    set_by: SetBy
    """"JAX": its default, which is what is wanted."""


@dataclass(frozen=True, slots=True)
class Option:
    """A flag of XLA that each program is compiled with."""

    name: str
    value: str
    why: str
    platform: Platform


OPTIONS = (
    Option(
        "xla_disable_hlo_passes",
        "rematerialization",
        # For a full H200, 28 layers read 1.17x of their weights in a step. What temporaries need
        # was set aside before (`cache.memory`).
        "XLA takes a card that weights and cache fill for one short of memory, and computes "
        "whole matrix products again to save kilobytes",
        "gpu",
    ),
)


def platform_of(device: jax.Device) -> Platform:
    """Returns the platform of a device in the words of these tables."""
    return "cpu" if device.platform == "cpu" else "gpu"


def compiler_options(platform: Platform) -> dict[str, str]:
    """Returns the options of programs for a platform, without those in the user's XLA_FLAGS."""
    theirs = _flags_of_user()
    return {
        o.name: o.value for o in OPTIONS if o.platform in ("all", platform) and o.name not in theirs
    }


def settings(platform: Platform) -> tuple[Setting, ...]:
    """Returns what is in force on a platform."""
    theirs = _flags_of_user()
    name, value, set_by = memory_setting()
    why = "share of the card that JAX takes at its start, for weights, work and cache"
    rows = [Setting(name, value, why, "gpu", set_by)]
    for o in OPTIONS:
        value, by = (theirs[o.name], "user") if o.name in theirs else (o.value, "jaxllm")
        rows.append(Setting(o.name, value, o.why, o.platform, by))
    rows += [Setting(*row) for row in compile_cache.settings()]
    return tuple(row for row in rows if row.platform in ("all", platform))


def _flags_of_user() -> dict[str, str]:
    """Returns what XLA_FLAGS has; jaxllm never writes there."""
    words = os.environ.get("XLA_FLAGS", "").split()
    pairs = (word.lstrip("-").partition("=") for word in words if word.startswith("--"))
    return {name: value or "true" for name, _, value in pairs}
