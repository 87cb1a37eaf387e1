"""Interrupts at random moments of every way to run requests: all is exact afterwards."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.interrupts import check, noticed
from jaxllm.prompts import parse_prompts
from jaxllm.request_builder import RequestBuilder
from tests.interrupts import Interrupts, count_events
from tests.tiny import Naive, random_prompts, tiny_model

MAX_LEN = 64
SMALL = {
    "skip_tokenizer_init": True,
    "max_model_len": MAX_LEN,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    # Fewer pages than four sequences need: a call prefills in chunks, preempts and evicts.
    "kv_cache_memory_bytes": 19 * 4 * 256,
    "use_tqdm_on_load": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = random_prompts(4, longest=24, shortest=9)
COMPLETIONS = random_prompts(4, longest=12, shortest=3, seed=1)

# What Python raises while it throws an object away, it only reports; see `interrupted`.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def generate(llm):
    return tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))


def stream(llm):
    last = {output.request_id: output for output in llm.stream(PROMPTS, GREEDY)}
    return tokens_of(sorted(last.values(), key=lambda output: int(output.request_id)))


def enqueue_and_wait(llm):
    llm.enqueue(PROMPTS, GREEDY)
    # An interrupted call may have left the same prompts queued: they are answered as well.
    outputs = tokens_of(llm.wait_for_completion(use_tqdm=False))
    assert outputs == outputs[: len(PROMPTS)] * (len(outputs) // len(PROMPTS))
    return outputs[: len(PROMPTS)]


def score(llm):
    scores = llm.score_completions(PROMPTS, COMPLETIONS, use_tqdm=False)
    assert [score.token_ids.tolist() for score in scores] == COMPLETIONS
    return [score.logprobs for score in scores]


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


USES = {"generate": generate, "stream": stream, "enqueue": enqueue_and_wait, "score": score}


@pytest.fixture(scope="module")
def expected():
    """By use, what it returns, worked out without the engine."""
    _, model, params = tiny_model()
    naive = Naive(model, params, length=MAX_LEN)
    tokens = [naive.generate(prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    scores = [logprobs(naive, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    return {"generate": tokens, "stream": tokens, "enqueue": tokens, "score": scores}


def logprobs(naive, prompt, completion):
    logits = naive.logits(prompt + completion)[len(prompt) - 1 : -1].astype(np.float64)
    each = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return each[np.arange(len(completion)), completion]


@pytest.fixture(scope="module")
def llm(checkpoints, expected):
    with LLM(checkpoints(), **SMALL) as llm:
        for name in USES:  # compiles what the tests below need
            assert_exact(llm, name, expected)
        yield llm


def assert_exact(llm, name, expected):
    """The use returns what it must, and leaves nothing behind."""
    found = USES[name](llm)
    if name == "score":
        for ours, theirs in zip(found, expected[name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert found == expected[name]
    llm._engine.scheduler.check_invariants()
    assert llm.stats()["num_pages_held"] == 0
    assert llm._engine.requests == {}


@pytest.fixture
def alarm():
    """SIGALRM, whatever it did before the test, does it again afterwards."""
    former = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


def interrupted(use, delay):
    """Repeats a use until a signal comes after some seconds; returns whether it was cut off.

    It is not where the signal falls into a finalizer, whose exceptions Python swallows.
    """
    came = []

    def interrupt(*_):
        came.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        while not came:
            use()
    except KeyboardInterrupt:
        return True
    return False


def interrupt_again_and_again(llm, expected, count, seed=0):
    """Cuts off a use at a random moment, checks another, and so on."""
    rng, num_interrupted = random.Random(seed), 0
    for i in range(count):
        name, other = rng.choice(list(USES)), rng.choice(list(USES))
        start = time.perf_counter()
        USES[name](llm)
        longest = time.perf_counter() - start

        num_interrupted += interrupted(lambda n=name: USES[n](llm), rng.uniform(1e-6, longest))

        llm._engine.scheduler.check_invariants()
        try:
            assert_exact(llm, other, expected)
        except BaseException as error:
            error.add_note(f"{other} after interrupt {i}, which was in {name}")
            raise
    assert num_interrupted > 0.9 * count


def test_two_hundred_interrupts_at_random_moments_leave_the_engine_exact(llm, expected, alarm):
    interrupt_again_and_again(llm, expected, 200)


@pytest.mark.slow
def test_five_hundred_interrupts_at_random_moments_leave_the_engine_exact(llm, expected, alarm):
    interrupt_again_and_again(llm, expected, 500, seed=1)


@pytest.mark.parametrize("name", USES)
def test_interrupt_at_any_call_of_a_use_leaves_the_engine_exact(llm, expected, name):
    num_events = count_events(lambda: USES[name](llm))

    for event in random.Random(0).sample(range(1, num_events + 1), 10):
        try:
            with Interrupts(event):
                USES[name](llm)
        except KeyboardInterrupt:
            pass

        assert_exact(llm, name, expected)


def test_interrupt_between_two_outputs_of_a_stream_frees_its_pages(llm, expected):
    def read():
        for _ in llm.stream(PROMPTS, GREEDY):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()

    for name in USES:
        assert_exact(llm, name, expected)


def test_a_call_that_never_began_may_be_collected_in_the_middle_of_a_step(
    llm, expected, monkeypatch
):
    # An interrupt can fall behind `__enter__`; what is left is closed by the garbage collector.
    requests = llm._builder.generation(parse_prompts(PROMPTS), [GREEDY] * len(PROMPTS))
    never_began = llm._engine.call(requests)
    never_began.__enter__()
    launch = llm._engine.runner.launch

    def collect_and_launch(*args):
        never_began.gen.close()
        return launch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine.runner, "launch", collect_and_launch)

        assert_exact(llm, "generate", expected)
    for name in USES:
        assert_exact(llm, name, expected)


def test_interrupted_wait_forgets_its_requests_and_later_ones_are_answered(llm, expected):
    def bar(**_):
        raise KeyboardInterrupt

    llm.enqueue(PROMPTS, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        llm.wait_for_completion(use_tqdm=bar)

    assert llm.wait_for_completion(use_tqdm=False) == []
    assert_exact(llm, "enqueue", expected)


# ---------------------------------------------------------------- interrupts that Python drops


class Dropped:
    """Ctrl-C comes while this is thrown away; Python only reports what is raised there."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


class Bar:
    """A progress bar that drops an interrupt as it is made, and counts what is finished."""

    def __init__(self, **_):
        Dropped()
        self.count = 0

    def update(self, count):
        self.count += count

    def set_postfix_str(self, *_, **__):
        pass

    def close(self):
        pass


def test_interrupt_in_a_finalizer_ends_the_call_at_its_next_step(llm, expected):
    bars = []

    def bar(**options):
        bars.append(Bar(**options))
        return bars[-1]

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=bar)

    assert [bar.count for bar in bars] == [0]
    for name in USES:
        assert_exact(llm, name, expected)


def test_interrupt_in_a_finalizer_ends_the_making_of_requests():
    class Tokenizer:
        """Drops an interrupt at its first text."""

        eos_token_id = None
        encoded = 0

        def __len__(self):
            return 10

        def get_vocab(self):
            return {}

        def encode(self, text, **_):
            self.encoded += 1
            if self.encoded == 1:
                Dropped()
            return [1]

    tokenizer = Tokenizer()
    builder = RequestBuilder(tokenizer, 10, MAX_LEN, 20, (), np.random.default_rng(0))

    with pytest.raises(KeyboardInterrupt):
        builder.generation(parse_prompts(["a"] * 5), [GREEDY] * 5)

    assert tokenizer.encoded == 1


def test_lost_interrupt_is_raised_where_one_asks_or_at_the_end():
    def end_early():
        with noticed():
            Dropped()
            check()
            pytest.fail("not reached")

    def run_through():
        with noticed():
            Dropped()

    for work in (end_early, run_through):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        check()  # and it is over


def test_a_stretch_that_never_began_ends_no_other():
    first, second = noticed(), noticed()
    first.__enter__()

    def close_others():
        with noticed():
            with ThreadPoolExecutor(1) as pool:
                pool.submit(first.gen.close).result()
            second.__enter__()
            second.gen.close()
            Dropped()
            check()
            pytest.fail("not reached")

    with pytest.raises(KeyboardInterrupt):
        close_others()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handler_of_the_application_is_left_in_place(llm):
    came = []
    former = signal.signal(signal.SIGINT, lambda *_: came.append(True))

    try:
        llm.generate(PROMPTS, GREEDY, use_tqdm=Bar)
    finally:
        signal.signal(signal.SIGINT, former)

    assert came == [True]


def test_calls_of_other_threads_touch_no_handler(llm, expected):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(generate, llm).result() == expected["generate"]
