"""The table of programs: compiled once, counted, guarded; larger ones stand in."""

import logging
import threading

import jax
import pytest

from jaxllm.buckets import Buckets
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, RecompileError
from jaxllm.flags import NO_FLAGS, SamplingFlags
from jaxllm.program_cache import ProgramCache, asked_guard, stands_in
from jaxllm.programs import CountKey, ProgramKey, count_key

CONFIG = EngineConfig(max_model_len=1024, max_num_seqs=64, page_size=4, max_decode_steps=32)
BUCKETS = Buckets(CONFIG)
SAMPLED = SamplingFlags(sampled=True)
TOP_K = SamplingFlags(sampled=True, top_k=True)


def decode(rows=8, width=8, steps=1, flags=NO_FLAGS):
    return ProgramKey(BUCKETS.decode(rows, width), steps, flags)


def mixed(tokens=64, rows=8, width=8, flags=NO_FLAGS, *, with_decodes=True):
    return ProgramKey(BUCKETS.mixed(tokens, rows, width, with_decodes=with_decodes), 1, flags)


class Builder:
    """In place of `ProgramBuilder`: programs are their own names."""

    def __init__(self):
        self.lowered = []
        self.error = None
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def lower(self, key):
        self.lowered.append(key)
        self.entered.set()
        assert self.go_on.wait(10)
        if self.error is not None:
            raise self.error
        return self

    def compile(self):
        return str(self.lowered[-1])


@pytest.fixture
def builder():
    return Builder()


@pytest.fixture
def programs(builder):
    return ProgramCache(builder)


# ---------------------------------------------------------------- the table


def test_a_program_is_compiled_once_and_counted(programs, builder):
    found = [programs.get(decode()) for _ in range(3)]

    assert found == [str(decode())] * 3
    assert builder.lowered == [decode()]
    assert (programs.counts.num_misses, programs.counts.num_hits) == (1, 2)
    assert programs.seconds[decode()] >= 0
    assert decode() in programs
    assert len(programs) == 1


def test_a_program_that_fails_is_tried_again(programs, builder):
    builder.error = RuntimeError("out of registers")
    with pytest.raises(RuntimeError, match="out of registers"):
        programs.get(decode())
    builder.error = None

    assert programs.get(decode()) == str(decode())


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_that_a_thread_compiles_is_waited_for(programs, builder, fails):
    builder.go_on.clear()
    builder.error = RuntimeError("once") if fails else None
    errors = []

    def compile_there():
        try:
            programs.compile(decode())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=compile_there)
    thread.start()
    assert builder.entered.wait(10)
    threading.Timer(0.05, builder.go_on.set).start()

    if fails:  # then it is compiled here, where the caller sees why it cannot be
        with pytest.raises(RuntimeError, match="once"):
            programs.get(decode())
    else:
        assert programs.get(decode()) == str(decode())

    thread.join()
    assert len(errors) == fails
    assert len(builder.lowered) == 1 + fails


def test_an_interrupt_leaves_nothing_that_is_waited_for(programs, builder, monkeypatch):
    builder.error = KeyboardInterrupt()
    # Even where it falls into the cleaning up.
    monkeypatch.setattr(programs, "_compiling", KeepsAll())
    with pytest.raises(KeyboardInterrupt):
        programs.get(decode())
    builder.error = None

    assert programs.get(decode()) == str(decode())


class KeepsAll(dict):
    def pop(self, key, default=None):
        return default


def test_no_program_is_left_after_clear(programs):
    programs.get(decode())

    programs.clear()

    assert decode() not in programs


# ---------------------------------------------------------------- larger programs


@pytest.mark.parametrize(
    ("ready", "serves"),
    [
        (decode(8), True),
        (decode(16), True),
        (decode(32), True),
        (decode(64), False),  # more than four times the rows
        (decode(4), False),
        (decode(8, width=32), True),
        (decode(8, width=64), False),
        (decode(8, steps=8), False),
        (decode(8, flags=SAMPLED), True),
        (mixed(64), False),
    ],
)
def test_which_programs_stand_in_for_a_decode(ready, serves):
    assert stands_in(ready, decode(8)) is serves


@pytest.mark.parametrize(
    ("ready", "wanted", "serves"),
    [
        (mixed(256), mixed(64), True),
        (mixed(512), mixed(64), False),
        (mixed(64, rows=64), mixed(64), True),
        (mixed(64), mixed(64, rows=64), False),
        (mixed(64), mixed(64, with_decodes=False), True),
        (mixed(64, with_decodes=False), mixed(64), False),
        (mixed(64, flags=SAMPLED), mixed(64, flags=TOP_K), False),
        (mixed(64, flags=TOP_K), mixed(64, flags=SAMPLED), True),
        (decode(8), mixed(64), False),
    ],
)
def test_which_programs_stand_in_for_a_mixed_step(ready, wanted, serves):
    assert stands_in(ready, wanted) is serves


def test_without_a_background_each_step_has_its_own_program(programs):
    programs.get(decode(16))

    assert programs.serving(decode(8)) == decode(8)


def test_the_smallest_larger_program_serves_while_the_wanted_one_is_compiled(programs):
    asked = []
    programs.prefer = asked.append
    for rows in (32, 16, 64):
        programs.get(decode(rows))

    served = programs.serving(decode(8))

    assert served == decode(16)
    assert asked == [decode(8)]
    assert programs.counts.num_stand_ins == 1


def test_a_program_that_is_ready_serves_itself(programs):
    programs.prefer = lambda key: pytest.fail("it is ready")
    programs.get(decode(16))
    programs.get(decode(8))

    assert programs.serving(decode(8)) == decode(8)


def test_with_none_ready_the_step_waits_for_its_own(programs):
    programs.prefer = lambda key: pytest.fail("it is compiled by who waits for it")

    assert programs.serving(decode(8)) == decode(8)


# ---------------------------------------------------------------- the guard


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        (decode(8), decode(16), ("rows 8 -> 16",)),
        (decode(8), decode(8, width=16), ("width 8 -> 16",)),
        (decode(8), decode(8, steps=8), ("steps 1 -> 8",)),
        (decode(8), decode(8, flags=TOP_K), ("flags +sampled +top_k",)),
        (decode(8, flags=TOP_K), decode(8, flags=SAMPLED), ("flags -top_k",)),
        (decode(8), decode(16, flags=SAMPLED), ("rows 8 -> 16", "flags +sampled")),
        (decode(8), mixed(64), ("decode -> mixed",)),
        (mixed(64), mixed(64, with_decodes=False), ("decode_rows 8 -> 0",)),
        (CountKey(256), CountKey(512), ("tokens 256 -> 512",)),
        (decode(8), decode(8), ()),
    ],
)
def test_changes_name_what_is_different(old, new, changes):
    assert old.changes(new) == changes


def test_an_unarmed_guard_says_nothing(programs, caplog):
    programs.get(decode(8))

    assert caplog.records == []


def test_guard_warns_with_the_smallest_change(programs, caplog):
    for key in (mixed(64), decode(8, flags=TOP_K), decode(8)):
        programs.get(key)
    programs.guard = "warn"

    with caplog.at_level(logging.WARNING, "jaxllm"):
        for _ in range(2):
            programs.get(decode(16))

    assert [r.message for r in caplog.records] == [
        "decode[16] x1 width 8 is compiled after warm-up: rows 8 -> 16. The request waits for it."
    ]


def test_guard_that_forbids_raises_and_compiles_nothing(programs, builder):
    programs.get(decode(8))
    programs.guard = "error"

    with pytest.raises(RecompileError, match=r"warm-up: flags \+sampled \+top_k\. .*=warn\.$"):
        programs.get(decode(8, flags=TOP_K))

    assert builder.lowered == [decode(8)]


def test_guard_of_a_helper_names_its_tokens(programs):
    programs.get(count_key(10))
    programs.guard = "error"

    with pytest.raises(RecompileError, match=r"count_tokens\[512\] .*: tokens 256 -> 512\."):
        programs.get(count_key(300))


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 256), (256, 256), (257, 512), (1025, 2048)])
def test_counting_programs_have_few_sizes(num_tokens, size):
    assert count_key(num_tokens) == CountKey(size)


def test_guard_sees_what_is_compiled_past_the_table(programs):
    programs.guard = "error"
    fresh = jax.jit(lambda x: x + 41)

    words = r"lambda.* was compiled in a step, past the table"
    with pytest.raises(RecompileError, match=words), programs.watched():
        fresh(1)

    with programs.watched():
        fresh(2)


def test_guard_lets_the_table_compile_in_a_watched_stretch(programs, caplog):
    programs.guard = "warn"

    with programs.watched():
        programs.get(decode())

    assert [r.message for r in caplog.records if "past the table" in r.message] == []


def test_guard_of_the_environment(monkeypatch):
    monkeypatch.delenv("JAXLLM_RECOMPILE", raising=False)
    assert asked_guard() == "warn"
    monkeypatch.setenv("JAXLLM_RECOMPILE", "error")
    assert asked_guard() == "error"
    monkeypatch.setenv("JAXLLM_RECOMPILE", "never")
    with pytest.raises(ConfigError, match=r"JAXLLM_RECOMPILE='never' is not one of .*'error'\]\. "):
        asked_guard()
