"""A second start compiles nothing, and a folder of the user's is left alone."""

import subprocess
import sys
import threading
import zlib

import jax
import numpy as np
import pytest

from jaxllm import compile_cache

SCRIPT = """
import jax
{before}
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
from jaxllm import LLM
with LLM({folder!r}, skip_tokenizer_init=True, max_num_seqs=2, max_num_batched_tokens=16) as llm:
    llm.generate([1, 2, 3], use_tqdm=False)
print(hits.count("/jax/compilation_cache/cache_misses"), jax.config.jax_compilation_cache_dir)
"""


def start(folder, root, before=""):
    script = SCRIPT.format(folder=str(folder), before=before)
    env = {"JAX_PLATFORMS": "cpu", "JAXLLM_CACHE_ROOT": str(root), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    misses, used = done.stdout.split()
    return int(misses), used


@pytest.mark.slow
def test_second_start_compiles_nothing(checkpoints, tmp_path):
    folder = checkpoints("llama")

    first, used = start(folder, tmp_path)
    second, _ = start(folder, tmp_path)

    assert used == str(tmp_path / "xla")
    assert first > 0
    assert second == 0


@pytest.mark.slow
def test_folder_of_the_user_is_left_alone(checkpoints, tmp_path):
    mine = tmp_path / "mine"

    _, used = start(
        checkpoints("llama"),
        tmp_path,
        f"jax.config.update('jax_compilation_cache_dir', {str(mine)!r})",
    )

    assert used == str(mine)


# ---------------------------------------------------------------- what is wrong with a folder

ONE = """
import warnings
import jax
import numpy as np
from jaxllm import compile_cache, logs
warnings.simplefilter("error")
logs.configure()
print(compile_cache.enable())
with compile_cache.watch() as seen:
    value = jax.jit(lambda x: x * 2 + 1)(np.float32(3))
print(float(value), seen.num_hits, seen.num_misses)
"""


def compile_one(root):
    """Returns the folder, the value of a program with its hits and misses, and what was said."""
    env = {"JAX_PLATFORMS": "cpu", "JAXLLM_CACHE_ROOT": str(root), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", ONE], env=env, capture_output=True, text=True, check=True
    )
    folder, found = done.stdout.splitlines()
    return folder, found, done.stderr


@pytest.mark.slow
def test_damaged_entry_is_removed_and_compiled_anew_with_one_warning(tmp_path):
    assert compile_one(tmp_path)[1] == "7.0 0 1"
    (entry,) = (tmp_path / "xla").glob("jit__lambda*-cache")
    entry.write_bytes(entry.read_bytes()[:100])

    _, mended, said = compile_one(tmp_path)
    _, after, silence = compile_one(tmp_path)

    assert mended == "7.0 0 1"
    assert said.count("damaged entries in") == said.count("\n") == 1
    assert (after, silence) == ("7.0 1 0", "")


@pytest.mark.slow
def test_folder_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path):
    root = tmp_path / "a_file"
    root.write_text("no folder")

    folder, found, said = compile_one(root)

    assert (folder, found) == ("None", "7.0 0 0")
    assert said.count("\n") == 1
    assert "cannot be written" in said
    assert "Set JAXLLM_CACHE_ROOT to another folder" in said


class Entries:
    """In place of JAX's cache in a folder."""

    def __init__(self, path):
        self._path = path

    def get(self, key):
        path = self._path / f"{key}-cache"
        return path.read_bytes() if path.exists() else None


@pytest.fixture
def entries(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_said", set())
    return compile_cache.SoundEntries(Entries(tmp_path), zlib.decompress)


def test_entry_that_cannot_be_stored_is_said_once(entries, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)

    for key in ("a", "b"):
        entries.put(key, zlib.compress(b"program"))

    assert [r.message for r in caplog.records] == [
        f"compile cache: {tmp_path} cannot be written any more (No space left on device). "
        "Set JAXLLM_CACHE_ROOT to another folder."
    ]
    assert list(tmp_path.iterdir()) == []


def test_interrupt_while_an_entry_is_written_leaves_none(entries, tmp_path, monkeypatch):
    def interrupted(path, value):
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        entries.put("a", b"half")

    assert list(tmp_path.iterdir()) == []


def test_entries_are_stored_once(entries):
    entries.put("a", zlib.compress(b"first"))
    entries.put("a", zlib.compress(b"second"))

    assert zlib.decompress(entries.get("a")) == b"first"
    assert entries.get("b") is None


def test_an_inner_watch_keeps_what_it_sees():
    function = jax.jit(lambda x: x - 17)

    with compile_cache.watch() as outer:
        with compile_cache.watch() as inner:
            function(np.float32(1))
        jax.jit(lambda x: x - 18)(np.float32(1))

    assert len(inner.compiled) == len(outer.compiled) == 1
    assert inner.num_hits + inner.num_misses == 1


def test_a_watch_sees_its_own_thread():
    def elsewhere():
        jax.jit(lambda x: x - 19)(np.float32(1))

    with compile_cache.watch() as seen:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    assert seen.compiled == []
    assert seen.num_hits + seen.num_misses == 0
