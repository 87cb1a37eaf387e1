"""Several engines, each on devices of its own, answer one list of prompts as one engine does."""

import gc
import random
import signal
import threading
import time

import jax
import numpy as np
import pytest

from jaxllm import LLM, JaxLLMError, RequestError, SamplingParams
from jaxllm.modeling import weights
from tests.tiny import random_prompts

SMALL = {
    "skip_tokenizer_init": True,
    "max_model_len": 32,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    # Fewer pages than four sequences need: a call prefills in chunks, preempts and evicts.
    "num_gpu_blocks_override": 18,
    "use_tqdm_on_load": False,
    "seed": 7,
}
TWO = {"data_parallel_size": 2, "devices": [4, 6]}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
DRAWN = SamplingParams(max_tokens=8, n=2)
PROMPTS = random_prompts(10, longest=20, shortest=3)
SOME_DRAWN = [GREEDY, DRAWN] * 5

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def tokens_of(outputs):
    return [[one.token_ids for one in output.outputs] for output in outputs]


def generate(llm, params=GREEDY):
    return tokens_of(llm.generate(PROMPTS, params, use_tqdm=False))


def assert_clean(llm):
    """Nothing is held, queued or running."""
    assert llm.stats()["num_pages_held"] == 0
    for engine in llm._engine.engines:
        engine.scheduler.check_invariants()
        assert engine.requests == {}
    assert all(replica.step is None for replica in llm._engine._replicas)


@pytest.fixture(scope="module")
def one(checkpoints):
    """What a single engine gives: greedy, then drawn."""
    with LLM(checkpoints(), **SMALL) as llm:
        return generate(llm), generate(llm, SOME_DRAWN)


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints(), **TWO, **SMALL) as llm:
        generate(llm)  # compiles what the tests below need
        yield llm


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "place", [{"data_parallel_size": 3}, {"data_parallel_size": 2, "tensor_parallel_size": 2}]
)
def test_tokens_do_not_depend_on_the_number_of_engines(checkpoints, one, place):
    with LLM(checkpoints(), **place, **SMALL) as llm:
        found = generate(llm), generate(llm, SOME_DRAWN)
        steps = [engine.stats.num_steps for engine in llm._engine.engines]

    assert found == one
    assert len(steps) == place["data_parallel_size"]
    assert all(steps)


def test_each_engine_has_its_devices_and_the_same_weights(llm):
    first, second = (engine.runner.params for engine in llm._engine.engines)

    assert {d.id for param in first for d in param.devices()} == {4}
    assert {d.id for param in second for d in param.devices()} == {6}
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_are_read_once(checkpoints, monkeypatch):
    reads = []
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda *args: reads.append(1) or load(*args))

    with LLM(checkpoints(), **TWO, **SMALL):
        pass

    assert reads == [1]


def test_work_is_dealt_evenly(llm):
    before = [engine.stats.num_tokens for engine in llm._engine.engines]

    llm.generate(PROMPTS * 4, GREEDY, use_tqdm=False)

    after = [engine.stats.num_tokens for engine in llm._engine.engines]
    first, second = (end - start for start, end in zip(before, after, strict=True))
    assert abs(first - second) < 0.2 * max(first, second)


def test_steps_of_engines_run_at_the_same_time(llm, one, monkeypatch):
    both = threading.Barrier(2, timeout=30)  # passed only by two threads together
    waited = threading.local()

    def meet(launch, *args):
        if not hasattr(waited, "once"):
            waited.once = True
            both.wait()
        return launch(*args)

    for engine in llm._engine.engines:
        launch = engine.runner.launch
        monkeypatch.setattr(engine.runner, "launch", lambda *a, f=launch: meet(f, *a))

    assert generate(llm) == one[0]
    assert not both.broken


def test_streams_queues_and_scores_work_too(llm, one):
    last = {}
    for output in llm.stream(PROMPTS, GREEDY):
        last[output.request_id] = output
    assert tokens_of(last[name] for name in sorted(last, key=int)) == one[0]

    llm.enqueue(PROMPTS, GREEDY)
    assert tokens_of(llm.wait_for_completion(use_tqdm=False)) == one[0]

    ends = [tokens[0] for tokens in one[0]]
    scores = llm.score_completions(PROMPTS, ends, use_tqdm=False)
    assert [score.token_ids.tolist() for score in scores] == ends
    assert all((score.ranks == 1).all() for score in scores)
    assert_clean(llm)


def test_other_calls_may_come_between_two_outputs_of_a_stream(llm, one):
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)

    assert generate(llm) == one[0]
    last = {output.request_id: output for output in stream}
    assert tokens_of(last[name] for name in sorted(last, key=int)) == one[0]


def test_leaving_a_stream_ends_its_requests(llm, one):
    for _ in llm.stream(PROMPTS, GREEDY):
        break
    gc.collect()

    assert generate(llm) == one[0]
    assert_clean(llm)


def test_conversations_have_the_answers_of_one_engine():
    settings = {"chat_template": "{{ messages[0]['content'] }}", "use_tqdm_on_load": False}
    talks = [[{"role": "user", "content": text}] for text in ("def f(", "import ", "class A")]
    with LLM("demo", **settings) as llm:
        wanted = llm.chat(talks, GREEDY, use_tqdm=False)

    with LLM("demo", data_parallel_size=2, **settings) as llm:
        found = llm.chat(talks, GREEDY, use_tqdm=False)

    assert [o.outputs[0].text for o in found] == [o.outputs[0].text for o in wanted]


def test_counts_are_of_all_engines(llm):
    stats, engines = llm.stats(), llm._engine.engines

    assert stats["num_steps"] == sum(engine.stats.num_steps for engine in engines)
    assert stats["num_pages"] == 2 * 18
    assert stats["compile_seconds"].keys() == {
        str(key) for engine in engines for key in engine.runner.programs.seconds
    }


# ---------------------------------------------------------------- what goes wrong


def test_an_error_in_one_engine_ends_the_call_and_leaves_all_exact(llm, one, monkeypatch):
    broken = llm._engine.engines[1].runner
    with monkeypatch.context() as patch:
        patch.setattr(broken, "launch", lambda *args: 1 / 0)

        with pytest.raises(ZeroDivisionError):
            generate(llm)

    assert_clean(llm)
    assert generate(llm) == one[0]


def test_a_request_without_a_choice_fails_alone_or_with_its_call(llm, one):
    none = SamplingParams(
        temperature=0, max_tokens=8, allowed_token_ids=[3], stop_token_ids=[3], min_tokens=2
    )
    params = [GREEDY] * (len(PROMPTS) - 1) + [none]

    with pytest.raises(RequestError, match="leave no token to choose"):
        llm.generate(PROMPTS, params, use_tqdm=False)
    assert_clean(llm)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False, on_error="return")

    assert isinstance(outputs[-1].error, RequestError)
    assert tokens_of(outputs[:-1]) == one[0][:-1]


@pytest.fixture
def alarm():
    former = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


def interrupt_twice(use, delay):
    """Repeats a use until a signal comes after some seconds, and another a millisecond later."""
    left = 2

    def interrupt(*_):
        nonlocal left
        left -= 1
        if left <= 0:  # a third may come before this one has ended
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay, 1e-3)
            while left > 0:  # Python drops a signal that falls into a callback of its collector
                use()
        except KeyboardInterrupt:
            while left > 0:  # the use was over before the second one came
                time.sleep(1e-4)
    except KeyboardInterrupt:
        pass


def test_interrupts_at_random_moments_leave_all_engines_exact(llm, one, alarm):
    rng = random.Random(0)
    start = time.perf_counter()
    generate(llm)
    longest = time.perf_counter() - start

    for _ in range(40):
        # The second one may fall into the wait for the steps that the first has left.
        interrupt_twice(lambda: generate(llm), rng.uniform(1e-6, longest))

        assert generate(llm) == one[0]
        assert_clean(llm)


def test_a_step_in_progress_ends_before_its_engine_recovers(llm, one, monkeypatch):
    launched, released = threading.Event(), threading.Event()
    replicas, runner = llm._engine, llm._engine.engines[0].runner
    launch, settle, step = runner.launch, replicas._settle, replicas.step
    calls = []

    def slow_launch(*args):
        launched.set()
        released.wait()
        return launch(*args)

    def interrupted_step():
        step()
        launched.wait()
        raise KeyboardInterrupt

    def settle_cut_off():
        # The second one is that of the interrupted call; a second interrupt is at its start.
        calls.append(None)
        if len(calls) == 2:
            threading.Timer(0.2, released.set).start()
            raise KeyboardInterrupt
        return settle()

    with monkeypatch.context() as patch:
        patch.setattr(runner, "launch", slow_launch)
        patch.setattr(replicas, "step", interrupted_step)
        patch.setattr(replicas, "_settle", settle_cut_off)
        with pytest.raises(KeyboardInterrupt):
            generate(llm)

    assert generate(llm) == one[0]
    assert_clean(llm)


def test_a_call_that_never_began_may_be_collected_in_the_middle_of_a_step(llm, one, monkeypatch):
    # An interrupt can fall behind `__enter__`; what is left is closed by the garbage collector.
    never_began = llm._engine.call([])
    never_began.__enter__()
    runner = llm._engine.engines[0].runner
    launch = runner.launch

    def collect_and_launch(*args):
        never_began.gen.close()
        return launch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "launch", collect_and_launch)

        assert generate(llm) == one[0]
    assert_clean(llm)


def test_closing_frees_every_array_of_every_engine(checkpoints):
    gc.collect()
    live = len(jax.live_arrays())
    llm = LLM(checkpoints(), **TWO, **SMALL)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)

    llm.close()
    llm.close()

    gc.collect()
    assert len(jax.live_arrays()) == live
    with pytest.raises(JaxLLMError, match=r"is closed\. Make a new one"):
        llm.generate(PROMPTS[0], GREEDY)


def num_threads():
    """Of replicas: a progress bar may start one of its own."""
    return sum(thread.name == "jaxllm-replica" for thread in threading.enumerate())


def test_del_frees_the_arrays_and_the_threads(checkpoints):
    gc.collect()
    live, threads = len(jax.live_arrays()), num_threads()
    llm = LLM(checkpoints(), **TWO, **SMALL)
    generate(llm)
    assert num_threads() == threads + 2

    del llm

    assert len(jax.live_arrays()) == live
    for _ in range(100):
        if num_threads() == threads:
            break
        time.sleep(0.01)
    assert num_threads() == threads
