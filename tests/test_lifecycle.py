"""Making, closing and interrupting: nothing leaks, and the engine is exact afterwards."""

import gc
import logging
import random
import re
import shutil
import signal
import threading

import jax
import pytest

from jaxllm import LLM, CheckpointError, ConfigError, RequestError, SamplingParams
from jaxllm import llm as llm_module
from tests.interrupts import Interrupts, count_events
from tests.tiny import Naive, random_prompts, tiny_model

MAX_LEN = 64
SMALL = {
    "skip_tokenizer_init": True,
    "max_model_len": MAX_LEN,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "kv_cache_memory_bytes": 1 << 16,
    "use_tqdm_on_load": False,
}
# Fewer pages than four sequences need: a call prefills in chunks, preempts and evicts.
FEW_PAGES = {"kv_cache_memory_bytes": 19 * 4 * 256}
GREEDY = SamplingParams(temperature=0, max_tokens=10)
PROMPTS = random_prompts(4, longest=24, shortest=9)


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints(), **{**SMALL, **FEW_PAGES}) as llm:
        generate(llm)  # compiles what the tests below need
        yield llm


@pytest.fixture(scope="module")
def expected():
    _, model, params = tiny_model()
    naive = Naive(model, params, length=MAX_LEN)
    return [naive.generate(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def generate(llm, prompts=PROMPTS, params=GREEDY):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def num_live():
    gc.collect()
    return len(jax.live_arrays())


def assert_num_live(expected, what=""):
    """No array was left, not even in a cycle."""
    if len(jax.live_arrays()) != expected:
        gc.collect()  # half a second: only where it can change the answer
    assert len(jax.live_arrays()) == expected, what


def assert_clean(llm):
    """Nothing is held, queued or lost."""
    engine = llm._engine
    engine.scheduler.check_invariants()
    assert llm.stats()["num_pages_held"] == 0
    assert not engine.scheduler.has_work
    assert engine.requests == {}


# ---------------------------------------------------------------- making and closing


def test_ten_rounds_of_load_generate_and_close_leave_no_array(checkpoints):
    folder = checkpoints(num_hidden_layers=1)
    live, answers = num_live(), []

    for _ in range(10):
        llm = LLM(folder, **SMALL)
        answers.append(generate(llm, [[3, 1, 4]], SamplingParams(temperature=0, max_tokens=1)))
        llm.close()

        assert_num_live(live)

    assert all(answer == answers[0] for answer in answers)


def test_with_closes_even_when_its_body_fails(checkpoints):
    live = num_live()

    with pytest.raises(RequestError), LLM(checkpoints(), **SMALL) as llm:
        llm.generate("no tokenizer")

    assert_num_live(live)
    assert "closed" in repr(llm)


def test_del_frees_the_arrays_at_once(checkpoints):
    live = num_live()
    llm = LLM(checkpoints(), **SMALL)
    assert len(jax.live_arrays()) > live

    del llm  # no collection: there must be no cycle to collect

    assert len(jax.live_arrays()) == live


def test_del_asks_no_module_that_has_ended(checkpoints, monkeypatch):
    """While Python ends, modules lose what is in them before their last objects go."""
    llm = LLM(checkpoints(), **SMALL)
    monkeypatch.setattr(threading, "main_thread", None)
    monkeypatch.setattr(llm_module, "_is_exiting", None)

    llm.__del__()

    assert "closed" in repr(llm)


def test_cell_that_is_run_again_frees_the_former_model_without_a_collection(checkpoints):
    cell = compile("llm = LLM(folder, **options)\nllm.generate([[1, 2]], params)", "cell", "exec")
    params = SamplingParams(temperature=0, max_tokens=2)
    notebook = {"LLM": LLM, "folder": checkpoints(), "options": SMALL, "params": params}
    exec(cell, notebook)
    gc.collect()
    gc.disable()
    try:
        one = len(jax.live_arrays())
        for _ in range(3):
            exec(cell, notebook)

            assert len(jax.live_arrays()) == one
    finally:
        gc.enable()
    notebook["llm"].close()


def test_rebinding_a_name_frees_the_former_model(checkpoints):
    live = num_live()
    llm = LLM(checkpoints(), **SMALL)
    one = len(jax.live_arrays())

    for _ in range(3):
        llm = LLM(checkpoints(), **SMALL)

    assert one > live
    assert_num_live(one)
    llm.close()


def test_two_models_at_once_do_not_meet(llm, expected, checkpoints):
    with LLM(checkpoints(seed=1), **SMALL) as other:
        alone = generate(other, PROMPTS[:1])

        assert generate(llm) == expected
        assert generate(other, PROMPTS[:1]) == alone
        assert alone != expected[:1]

    assert generate(llm) == expected


def test_streams_of_two_models_in_turn_do_not_meet(llm, expected, checkpoints):
    with LLM(checkpoints(seed=1), **SMALL) as other:
        alone = generate(other)
        last = {}
        for pair in zip(llm.stream(PROMPTS, GREEDY), other.stream(PROMPTS, GREEDY), strict=True):
            for which, output in zip(("ours", "other"), pair, strict=True):
                last[which, int(output.request_id)] = output.outputs[0].token_ids

    assert [last[key] for key in sorted(last) if key[0] == "ours"] == expected
    assert [last[key] for key in sorted(last) if key[0] == "other"] == alone


def test_failed_load_leaves_no_array(checkpoints, tmp_path):
    live = num_live()

    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        LLM(checkpoints(), **{**SMALL, "kv_cache_memory_bytes": 100})
    with pytest.raises(CheckpointError, match="has no config"):
        LLM(tmp_path, **SMALL)

    assert_num_live(live)


def test_calls_in_a_row_give_the_same_tokens(llm, expected):
    assert [generate(llm) for _ in range(3)] == [expected] * 3
    assert_clean(llm)
    assert llm.stats()["num_preemptions"] > 0


# ---------------------------------------------------------------- what it says of itself


def test_close_says_once_what_it_freed(checkpoints):
    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("jaxllm")
    former = logger.level
    llm = LLM(checkpoints(), **SMALL)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        llm.close()
        llm.close()
        del llm
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)

    assert lines == [f"closed {checkpoints()}: freed 0.00 GiB of weights and 0.00 GiB of cache"]


def test_repr_is_one_short_line(llm, checkpoints):
    about = repr(llm).replace(str(checkpoints()), "tiny")

    assert about == "LLM('tiny', LlamaForCausalLM, 2 layers, float32, max_model_len=64)"


def test_table_in_a_notebook_is_small_and_escaped(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "<b>bold</b>&")
    with LLM(folder, **SMALL) as llm:
        ready = llm._repr_html_()
    closed = llm._repr_html_()

    assert "&lt;b&gt;bold&lt;/b&gt;&amp;" in ready
    assert "<b>" not in ready
    rows = ("model", "architecture", "parameters", "dtype", "device", "max_model_len", "cache")
    assert re.findall("<th>(.*?)</th>", ready) == [*rows, "state"]
    num_params = sum(leaf.shape.size for leaf in llm._plan.model.leaves)
    cells = ("LlamaForCausalLM", f"{num_params:,}", "float32", "1 x cpu", "64", "252 tokens")
    for value in (*cells, "ready"):
        assert f"<td>{value}</td>" in ready
    assert closed == ready.replace("<td>ready</td>", "<td>closed</td>")


def test_stats_count_what_was_done(checkpoints):
    with LLM(checkpoints(), **SMALL) as llm:
        assert llm.stats()["num_steps"] == 0
        generate(llm, [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2))
        stats = llm.stats()

    assert stats["num_steps"] > 0
    assert stats["num_tokens"] >= 3
    assert stats["num_pages"] == llm._plan.memory.num_pages - 1
    assert stats["num_pages_held"] == 0
    assert all(seconds > 0 for seconds in stats["compile_seconds"].values())


# ---------------------------------------------------------------- interrupts at chosen points


def interrupt_in_call(function, when, *, after):
    """Wraps a function to be interrupted in its `when`-th call, before or after it has run."""
    calls = 0

    def wrapped(*args):
        nonlocal calls
        calls += 1
        if calls == when and not after:
            raise KeyboardInterrupt
        result = function(*args)
        if calls == when:
            raise KeyboardInterrupt
        return result

    return wrapped


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("when", [1, 2, 5, 11])
@pytest.mark.parametrize("part", ["schedule", "launch", "fetch", "update", "recover"])
def test_interrupt_around_a_part_of_a_step_leaves_a_usable_engine(
    llm, expected, monkeypatch, part, when, after
):
    engine = llm._engine
    owners = {"launch": engine.runner, "fetch": engine.runner, "recover": engine}
    owner = owners.get(part, engine.scheduler)
    if part == "recover":
        broken = interrupt_in_call(engine.runner.launch, when, after=True)
        monkeypatch.setattr(engine.runner, "launch", broken)
        when = 1  # a second interrupt, while the first is being dealt with
    monkeypatch.setattr(owner, part, interrupt_in_call(getattr(owner, part), when, after=after))

    with pytest.raises(KeyboardInterrupt):
        generate(llm)

    monkeypatch.undo()
    assert generate(llm) == expected
    assert_clean(llm)


@pytest.mark.parametrize("when", [1, 2, 3, 5, 8, 13])
def test_interrupt_that_loses_the_donated_state_leaves_a_usable_engine(
    llm, expected, monkeypatch, when
):
    runner, lost = llm._engine.runner, []
    get = runner.programs.get

    def get_broken(key):
        program = get(key)

        def run(params, state, buffer):
            outputs = program(params, state, buffer)
            lost.append(state.last_token.is_deleted())
            if len(lost) == when:
                raise KeyboardInterrupt  # the old state was donated, and the new one is dropped
            return outputs

        return run

    monkeypatch.setattr(runner.programs, "get", get_broken)

    with pytest.raises(KeyboardInterrupt):
        generate(llm)

    monkeypatch.undo()
    assert lost == [True] * when
    assert not runner.is_lost()
    assert_clean(llm)
    assert generate(llm) == expected


def test_interrupt_while_requests_are_queued_leaves_none(llm, expected, monkeypatch):
    engine = llm._engine
    monkeypatch.setattr(engine, "add_request", interrupt_in_call(engine.add_request, 3, after=True))

    with pytest.raises(KeyboardInterrupt):
        generate(llm)

    monkeypatch.undo()
    assert_clean(llm)
    assert generate(llm) == expected


def test_interrupt_from_the_progress_bar_leaves_a_usable_engine(llm, expected):
    def bar(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=bar)

    assert_clean(llm)
    assert generate(llm) == expected


# ---------------------------------------------------------------- interrupts anywhere


def interrupted_at(llm, *events):
    """Returns how many of the interrupts fell into a call that was cut off by them."""
    interrupts = Interrupts(*events)
    with pytest.raises(KeyboardInterrupt), interrupts:
        generate(llm)
    return sum(event <= interrupts.count for event in events)


def test_interrupt_anywhere_leaves_a_usable_engine(llm, expected):
    num_events = count_events(lambda: generate(llm))

    for event in random.Random(0).sample(range(1, num_events + 1), 80):
        interrupted_at(llm, event)

        assert_clean(llm)
        assert generate(llm) == expected, f"after an interrupt at event {event} of {num_events}"


def test_second_interrupt_soon_after_the_first_leaves_a_usable_engine(llm, expected):
    num_events = count_events(lambda: generate(llm))
    rng, num_second = random.Random(0), 0

    for first in rng.sample(range(1, num_events + 1), 80):
        second = first + rng.randint(1, 60)

        num_second += interrupted_at(llm, first, second) == 2

        assert generate(llm) == expected, f"after interrupts at events {first} and {second}"
        assert_clean(llm)

    assert num_second > 10


def test_interrupt_while_a_program_is_compiled_leaves_a_usable_engine(checkpoints, expected):
    first = expected[0][:1]
    params = SamplingParams(temperature=0, max_tokens=1)
    with LLM(checkpoints(), **SMALL) as llm:
        # Once it is compiled and kept, before how long that took is.
        cache = llm._engine.runner.programs
        cache._programs = InterruptsAfterStoring()

        with pytest.raises(KeyboardInterrupt):
            generate(llm, PROMPTS[:1], params)

        assert_clean(llm)
        assert generate(llm, PROMPTS[:1], params) == [first]


class InterruptsAfterStoring(dict):
    """A dict whose first stored item is followed by an interrupt."""

    def __setitem__(self, key, value):
        is_first = not self
        super().__setitem__(key, value)
        if is_first:
            raise KeyboardInterrupt


# A file that was opened and not yet given to its `with` is closed by Python, which says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_load_leaves_no_array(checkpoints):
    folder = checkpoints()
    live = num_live()
    num_events = count_events(lambda: LLM(folder, **SMALL).close())

    for event in random.Random(0).sample(range(1, num_events), 25):
        with pytest.raises(KeyboardInterrupt), Interrupts(event):
            LLM(folder, **SMALL).close()

        assert_num_live(live, f"after an interrupt at event {event} of {num_events}")


# ---------------------------------------------------------------- real signals


def test_ctrl_c_at_any_time_leaves_a_usable_engine(llm, expected):
    rng = random.Random(0)

    for _ in range(20):
        assert generate_until_ctrl_c(llm, delay=rng.uniform(0, 0.1))

        assert_clean(llm)
        assert generate(llm) == expected


def generate_until_ctrl_c(llm, delay):
    """Generates again and again; returns whether a real SIGINT ended it."""
    timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
    try:
        timer.start()
        while timer.is_alive():
            generate(llm)
        timer.join()
    except KeyboardInterrupt:
        return True
    return False
