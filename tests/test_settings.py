"""Who sets what of JAX and XLA, before the backend starts and only where the user has not."""

import os
import subprocess
import sys

import pytest

from jaxllm import devices
from jaxllm.settings import OPTIONS, compiler_options, settings

NEW, OLD = devices.MEMORY_VARIABLES


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As a process begins: nothing set, JAX not started."""
    monkeypatch.setattr(devices, "_memory_set_by", None)
    monkeypatch.setattr(devices, "has_started", lambda: False)
    for name in (NEW, OLD, "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)


def row(name, platform="gpu"):
    return next(setting for setting in settings(platform) if setting.name == name)


def test_the_memory_share_is_set_where_the_user_set_none(monkeypatch):
    monkeypatch.setenv(NEW, "")  # so that what is set here is undone

    monkeypatch.delenv(NEW)
    devices.reserve_memory(0.92)

    found = row(NEW)
    assert (found.value, found.set_by) == ("0.920", "jaxllm")
    assert OLD not in os.environ


@pytest.mark.parametrize("name", [NEW, OLD])
def test_the_user_s_memory_share_stays(monkeypatch, name):
    monkeypatch.setenv(name, "0.5")

    devices.reserve_memory(0.92)

    found = row(name)
    assert (found.value, found.set_by) == ("0.5", "user")
    assert [s.name for s in settings("gpu")].count(NEW) == (name == NEW)


def test_a_backend_that_runs_has_its_share_already(monkeypatch):
    monkeypatch.setattr(devices, "has_started", lambda: True)

    devices.reserve_memory(0.92)

    found = row(NEW)
    assert (found.value, found.set_by) == ("0.75", "too late")
    assert NEW not in os.environ


def test_the_first_model_decides_the_share_for_the_process(monkeypatch):
    monkeypatch.setenv(NEW, "")
    monkeypatch.delenv(NEW)
    devices.reserve_memory(0.92)
    monkeypatch.setattr(devices, "has_started", lambda: True)

    devices.reserve_memory(0.5)

    found = row(NEW)
    assert (found.value, found.set_by) == ("0.920", "jaxllm")


def test_options_of_a_gpu_are_not_for_a_cpu():
    assert compiler_options("gpu") == {"xla_disable_hlo_passes": "rematerialization"}
    assert compiler_options("cpu") == {}


def test_the_user_s_flags_of_xla_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo --xla_disable_hlo_passes=none_at_all")

    assert compiler_options("gpu") == {}
    found = row("xla_disable_hlo_passes")
    assert (found.value, found.set_by) == ("none_at_all", "user")


def test_a_cpu_has_no_settings_of_a_gpu():
    assert {setting.platform for setting in settings("cpu")} == {"all"}


def test_every_setting_says_why():
    for setting in settings("gpu"):
        assert setting.why
        assert setting.value
    assert {option.name for option in OPTIONS} <= {setting.name for setting in settings("gpu")}


def test_the_autotune_cache_is_beside_the_programs():
    found = row("jax_persistent_cache_enable_xla_caches")

    assert found.set_by == "JAX"
    assert found.value in ("all", "xla_gpu_per_fusion_autotune_cache_dir")


AUTOTUNE = """
from jaxllm import compile_cache
from jax._src import compiler
import numpy as np
folder = compile_cache.enable()
options = compiler.get_compile_options(1, 1, device_assignment=np.array([[0]]))
found = options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
print(found.startswith(folder + "/") and len(found) > len(folder) + 1)
"""


@pytest.mark.slow
def test_xla_is_given_the_autotune_folder(tmp_path):
    """What JAX hands to XLA, on CPU as on a GPU."""
    env = {"JAX_PLATFORMS": "cpu", "JAXLLM_CACHE_ROOT": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", AUTOTUNE], env=env, capture_output=True, text=True, check=True
    )

    assert done.stdout == "True\n"
