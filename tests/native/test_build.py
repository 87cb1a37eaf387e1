"""Kernels are compiled once, and what goes wrong is said."""

import logging
import platform
import re
import sys
import time

import pytest

from jaxllm.errors import ConfigError, NativeBuildError
from jaxllm.native import build
from jaxllm.native.build import why_not_compiled
from jaxllm.pallas_kernels.attention import compiled_tuning_for, tuning_for


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache root, and nothing remembered of compilers and kernels."""
    kept = (build._problem, build.target, build.compiler)
    monkeypatch.setenv("JAXLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.delenv(build.SWITCH, raising=False)
    for function in kept:
        function.cache_clear()
    yield tmp_path / "native"
    monkeypatch.undo()
    for function in kept:
        function.cache_clear()


def test_a_kernel_is_compiled_once(fresh, caplog):
    caplog.set_level(logging.INFO, "jaxllm")
    name = build.target("paged_attention", "float32")
    (library,) = fresh.iterdir()
    made = library.stat().st_mtime_ns
    build.target.cache_clear()

    assert build.target("paged_attention", "float32") == name
    assert name.startswith("jaxllm_paged_attention_float32_")
    assert library.stat().st_mtime_ns == made
    assert caplog.text.count("Compiling paged_attention for this processor") == 1


def test_all_kernels_are_compiled_at_once(fresh, monkeypatch, tmp_path):
    """Each of these compilers waits until the others have begun, too."""
    script = tmp_path / "cxx"
    kernels = sorted(source.stem for source in build.SOURCES.glob("*.cc"))
    script.write_text(
        f"""#!{sys.executable}
import sys, time
from pathlib import Path

if sys.argv[1:] != ["--version"]:
    begun = Path({str(tmp_path)!r}, "begun")
    begun.mkdir(exist_ok=True)
    (begun / Path(sys.argv[-3]).stem).touch()
    end = time.monotonic() + 60
    while len(list(begun.iterdir())) < {len(kernels)}:
        if time.monotonic() > end:
            sys.exit("the others have not begun")
        time.sleep(0.01)
    Path(sys.argv[-1]).touch()
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))

    build._compile([build._library(kernel, "float32") for kernel in kernels])

    assert sorted(path.name.split("-")[0] for path in fresh.iterdir()) == kernels


def test_one_that_fails_leaves_no_compiler_behind(fresh, monkeypatch, tmp_path):
    """Nor what one has started: it writes into a folder that is to go."""
    script, beat = tmp_path / "cxx", tmp_path / "beat"
    script.write_text(
        f"""#!/bin/sh
[ $1 = --version ] && exit 0
case $* in *greatest.cc*) until [ -e {beat} ]; do sleep 0.02; done; exit 7;; esac
(while :; do : > {beat}; sleep 0.02; done) &
wait
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv(build.SWITCH, "1")

    with pytest.raises(NativeBuildError, match="exit status 7"):
        compiled_tuning_for("cpu", 1, "float32")

    assert not list(fresh.iterdir())
    beat.unlink()
    time.sleep(0.5)
    assert not beat.exists()


def test_a_compiler_that_makes_nothing_is_said(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "true")

    assert compiled_tuning_for("cpu", 1, "float32") == tuning_for("cpu")
    assert "true could not make" in caplog.text
    assert not list(fresh.iterdir())


def test_a_library_is_of_its_sources_flags_and_processor(fresh, monkeypatch):
    build.target("paged_attention", "float32")
    for change in ({"_processor": lambda: "another"}, {"FLAGS": (*build.FLAGS, "-DANOTHER")}):
        for name, value in change.items():
            monkeypatch.setattr(build, name, value)
        build.target.cache_clear()
        build.target("paged_attention", "float32")

    assert len(list(fresh.iterdir())) == 3


def test_without_a_compiler_attention_is_plain_xla(fresh, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ())
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)

    assert compiled_tuning_for("cpu", 1, "float32") == tuning_for("cpu")
    assert compiled_tuning_for("cpu", 1, "float32") == tuning_for("cpu")
    assert "no C++ compiler" in why_not_compiled("cpu", 1, "float32")
    assert caplog.text.count("pip install 'jaxllm[cpu]'") == 1


def test_ziglang_is_the_compiler_where_the_system_has_none(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ())
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name)

    assert build.compiler()[1:] == ("-m", "ziglang", "c++")


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, caplog, tmp_path):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho 'line 7: no such vector' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))

    assert compiled_tuning_for("cpu", 1, "float32") == tuning_for("cpu")
    assert "exit status 3" in caplog.text
    assert "line 7: no such vector" in caplog.text
    assert "Set CXX to another compiler, or JAXLLM_NATIVE=0" in caplog.text
    assert not list(fresh.iterdir())


def test_where_it_is_asked_for_a_missing_kernel_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "1")
    monkeypatch.setenv("CXX", "/nowhere/c++")

    with pytest.raises(NativeBuildError, match=r"JAXLLM_NATIVE=1, but /nowhere/c\+\+ is no"):
        compiled_tuning_for("cpu", 1, "float32")


def test_a_cache_root_that_cannot_be_written_is_said(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLLM_CACHE_ROOT", str(tmp_path / "file"))
    monkeypatch.setenv(build.SWITCH, "1")

    with pytest.raises(NativeBuildError, match="could not make"):
        compiled_tuning_for("cpu", 1, "float32")


def test_a_library_that_cannot_be_loaded_is_said(fresh, monkeypatch):
    build.target("paged_attention", "float32")
    (library,) = fresh.iterdir()
    library.unlink()  # not over the old one, which this process has loaded
    library.write_bytes(b"half of one")
    others = {name for name in build._registered if "paged_attention" not in name}
    monkeypatch.setattr(build, "_registered", others)
    monkeypatch.setenv(build.SWITCH, "1")
    build.target.cache_clear()

    with pytest.raises(NativeBuildError, match=r"could not be loaded: .* Delete it, or set"):
        compiled_tuning_for("cpu", 1, "float32")


def test_the_compiler_may_have_arguments_and_spaces(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "'/opt/my tools/c++' -v")

    assert build.compiler() == ("/opt/my tools/c++", "-v")


def test_it_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")

    assert compiled_tuning_for("cpu", 1, "float32") == tuning_for("cpu")
    assert why_not_compiled("cpu", 1, "float32") == "JAXLLM_NATIVE=0"
    assert not fresh.exists()


def test_another_word_for_the_switch_is_refused(fresh, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "yes")

    with pytest.raises(ConfigError, match="JAXLLM_NATIVE=yes is neither 0"):
        compiled_tuning_for("cpu", 1, "float32")


@pytest.mark.parametrize(("platform", "devices"), [("cuda", 1), ("cpu", 2)])
def test_it_is_for_one_cpu_device(platform, devices):
    assert compiled_tuning_for(platform, devices, "float32") == tuning_for(platform)
    assert why_not_compiled(platform, devices, "float32")


def test_windows_has_no_kernel(fresh, monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "win32")

    assert "not for Windows" in build.unavailable("float32")


def test_other_types_have_no_kernel(fresh):
    assert "not for float64" in build.unavailable("float64")


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or bool(build.unavailable("float32")),
    reason="reads code of x86-64",
)
@pytest.mark.parametrize("kernel", ["paged_attention", "linear"])
def test_memory_is_asked_for_ahead(kernel):
    """Compilers may drop a prefetch, and nothing but time would tell."""
    code = build._library(kernel, "float32").path.read_bytes()

    prefetches = [m for m in re.finditer(rb"\x0f\x18(.)", code, re.DOTALL) if m[1][0] >> 3 & 7 == 2]
    assert len(prefetches) >= 8  # `prefetcht1`
