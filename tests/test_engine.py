"""The engine equals greedy generation by a cacheless full forward, whatever the schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine import Engine
from jaxllm.program_cache import ProgramCache
from jaxllm.programs import ProgramBuilder
from jaxllm.runner import ModelRunner
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduler import Scheduler
from jaxllm.sequence import Request, Sequence
from tests.tiny import Naive, random_prompts, sharder, tiny_model

NUM_NEW = 24


def full_of_nan(shape, dtype):
    return jnp.full(shape, jnp.nan, dtype)


CONFIG = EngineConfig(
    max_model_len=96,
    block_q=8,
    page_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    enable_prefix_caching=True,
)
MOST_PAGES = 200


class Maker:
    """Makes engines of one model that share their compiled programs."""

    def __init__(self, model, params):
        self.params = params
        self.builder = ProgramBuilder(model, CONFIG, sharder(), MOST_PAGES)
        self.programs = ProgramCache(self.builder)

    def __call__(self, *, num_pages=MOST_PAGES, budget=32, decode_steps=1, overlap=True):
        """An engine whose cache starts poisoned: any read of a stale slot gives NaN."""
        runner = ModelRunner(self.builder, self.params, full_of_nan)
        runner.programs = self.programs
        engine = Engine(runner)
        # A smaller pool and budget than the programs were built for, which they cannot see.
        config = dataclasses.replace(
            CONFIG,
            max_num_batched_tokens=budget,
            max_decode_steps=decode_steps,
            async_scheduling=overlap,
        )
        engine.config, engine.scheduler = config, Scheduler(config, num_pages)
        return engine


def request(name, prompt, num_new=NUM_NEW, **params):
    params = SamplingParams(**{"temperature": 0, "max_tokens": num_new, **params})
    seq = Sequence(name, 0, list(prompt), params, seed=0, arrival=0)
    seq.num_logprobs = params.logprobs
    return Request(name, None, list(prompt), params, [seq])


def run(engine, arrivals, poison=None):
    """Runs to the end; `arrivals` are (step, request). Returns tokens by request."""
    arrivals, done, step = sorted(arrivals, key=lambda a: a[0]), {}, 0
    while arrivals or engine.scheduler.has_work:
        while arrivals and arrivals[0][0] <= step:
            engine.add_request(arrivals.pop(0)[1])
        if engine.scheduler.has_work:
            if poison:
                poison(engine)
            for finished in engine.step():
                done[finished.request_id] = finished.sequences[0].output_token_ids
            engine.scheduler.check_invariants()
        step += 1
    engine.step()  # a step in flight may have a row that ended in the one before
    engine.scheduler.check_invariants()
    assert engine.scheduler.pool.num_held == 0
    return done


@pytest.fixture(scope="module")
def llama():
    _, model, params = tiny_model("llama")
    return Maker(model, params), Naive(model, params)


@pytest.fixture(scope="module")
def prompts(llama):
    return random_prompts(12, 40, seed=1)


@pytest.fixture(scope="module")
def expected(llama, prompts):
    naive = llama[1]
    return {str(i): naive.generate(prompt, NUM_NEW) for i, prompt in enumerate(prompts)}


def test_random_arrivals(llama, prompts, expected):
    make, _ = llama
    engine = make()
    steps = np.random.default_rng(0).integers(0, 40, len(prompts))

    done = run(engine, [(steps[i], request(str(i), p)) for i, p in enumerate(prompts)])

    assert done == expected


def test_preemption_changes_no_answer(llama, prompts, expected):
    make, _ = llama
    engine = make(num_pages=1 + 28)

    done = run(engine, [(0, request(str(i), p)) for i, p in enumerate(prompts)])

    assert done == expected
    assert engine.scheduler.num_preemptions > 5


def poison_unowned(engine):
    """Fills every page that no sequence holds and no prefix can find with NaN."""
    free = [p for p in engine.scheduler.pool.unowned() if not engine.scheduler.pool.is_kept(p)]
    state, orders = engine.runner.state, engine.runner.builder.tuning.orders
    pages = jnp.asarray([0, *free])

    def poisoned(array, order):
        return array.at[(*[slice(None)] * order.index("P"), pages)].set(jnp.nan)

    caches = tuple(tuple(map(poisoned, layer, orders)) for layer in state.caches)
    engine.runner.state = type(state)(caches, state.last_token)


def test_freed_and_trash_pages_full_of_nan_are_never_seen(llama, prompts, expected):
    make, _ = llama
    engine = make(num_pages=1 + 40)
    subset = {str(i): prompts[i] for i in range(6)}

    done = run(engine, [(0, request(i, p)) for i, p in subset.items()], poison_unowned)

    assert done == {i: expected[i] for i in subset}


@pytest.mark.parametrize("budget", [8, 9, 16, 27])
def test_every_chunk_size(llama, prompts, expected, budget):
    make, _ = llama
    engine = make(budget=budget)
    subset = {str(i): prompts[i] for i in range(5)}

    done = run(engine, [(0, request(i, p)) for i, p in subset.items()])

    assert done == {i: expected[i] for i in subset}


def test_prefix_hits_give_the_same_tokens(llama, prompts):
    make, naive = llama
    shared = random_prompts(1, 30, seed=7, shortest=30)[0]
    tails = random_prompts(4, 6, seed=8)
    asked = {str(i): [*shared, *tail] for i, tail in enumerate(tails)}
    want = {i: naive.generate(p, 8) for i, p in asked.items()}
    engine = make()

    first = run(engine, [(0, request("0", asked["0"], 8))])
    again = run(engine, [(0, request(i, p, 8)) for i, p in asked.items()])

    assert first["0"] == want["0"]
    assert again == want
    # 30 shared tokens are 7 full pages of 4; "0" finds its own generated pages too.
    assert engine.scheduler.prefixes.num_hit >= 4 * 28


def test_a_prompt_of_whole_pages_computes_its_last_token_again(llama):
    make, naive = llama
    prompt = random_prompts(1, 16, seed=3, shortest=16)[0]
    engine = make()

    first = run(engine, [(0, request("a", prompt, 4))])["a"]
    second = run(engine, [(0, request("b", prompt, 4))])["b"]

    assert first == second == naive.generate(prompt, 4)
    assert engine.scheduler.prefixes.num_hit == 12


def test_sliding_windows_across_page_and_chunk_edges(prompts):
    config, model, params = tiny_model(
        "qwen3",
        use_sliding_window=True,
        sliding_window=10,
        layer_types=["full_attention", "sliding_attention"],
    )
    naive = Naive(model, params)
    engine = Maker(model, params)()
    subset = {str(i): prompts[i] for i in range(4)}

    done = run(engine, [(0, request(i, p, 12)) for i, p in subset.items()])

    assert config.windows == (None, 10)
    assert done == {i: naive.generate(p, 12) for i, p in subset.items()}


def test_logprobs_are_those_of_the_full_forward(llama, prompts):
    make, naive = llama
    engine = make()
    asked = request("0", prompts[0], 8, logprobs=5)

    run(engine, [(0, asked)])

    seq = asked.sequences[0]
    logits = naive.logits(prompts[0] + seq.output_token_ids).astype(np.float64)
    logits = logits[len(prompts[0]) - 1 : -1]
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, token, found in zip(want, seq.output_token_ids, seq.logprobs, strict=True):
        assert found.chosen == pytest.approx(row[token], abs=1e-4)
        assert found.rank == (row >= row[token]).sum()
        assert found.ids == np.argsort(-row)[:5].tolist()
        np.testing.assert_allclose(found.values, np.sort(row)[::-1][:5], atol=1e-4)


def test_sampled_tokens_do_not_depend_on_batch_chunks_or_preemption(llama, prompts):
    make, _ = llama

    def sampled(num_pages, count, budget):
        engine = make(num_pages=num_pages, budget=budget)
        requests = []
        for i in range(count):
            asked = request(str(i), prompts[i], 16, temperature=0.8)
            asked.sequences[0].seed = 1000 + i
            requests.append((0, asked))
        return run(engine, requests), engine.scheduler.num_preemptions

    alone, _ = sampled(400, 1, 32)
    together, _ = sampled(400, 8, 32)
    squeezed, preemptions = sampled(1 + 26, 8, 9)

    assert alone["0"] == together["0"]
    assert squeezed == together
    assert preemptions > 0


@pytest.mark.parametrize("decode_steps", [8, 32])
@pytest.mark.parametrize("num_pages", [MOST_PAGES, 1 + 28])
def test_several_steps_a_launch_give_the_same_tokens(
    llama, prompts, expected, decode_steps, num_pages
):
    make, _ = llama
    engine = make(num_pages=num_pages, decode_steps=decode_steps)
    lengths = [NUM_NEW - i for i in range(len(prompts))]  # they end within launches
    requests = [request(str(i), p, lengths[i]) for i, p in enumerate(prompts)]

    done = run(engine, [(0, asked) for asked in requests])

    assert done == {str(i): expected[str(i)][: lengths[i]] for i in range(len(prompts))}
    assert engine.stats.num_steps < sum(lengths) / 4 + 30


def test_stop_tokens_end_a_row_within_a_launch(llama, prompts, expected):
    make, _ = llama
    engine = make(decode_steps=8)
    stops = [expected[str(i)][3 + i % 5] for i in range(4)]
    asked = [request(str(i), prompts[i], stop_token_ids=[stops[i]]) for i in range(4)]

    done = run(engine, [(0, one) for one in asked])

    for i, stop in enumerate(stops):
        want = expected[str(i)]
        assert done[str(i)] == want[: want.index(stop) + 1]
    assert all(one.sequences[0].finish_reason == "stop" for one in asked)


def test_sampling_with_penalties_and_logprobs_is_the_same_for_every_number_of_steps(llama, prompts):
    make, _ = llama

    def sampled(decode_steps):
        engine = make(decode_steps=decode_steps)
        rules = {"temperature": 0.9, "repetition_penalty": 1.4, "frequency_penalty": 0.5}
        asked = [request(str(i), prompts[i], 20, logprobs=2, top_k=20, **rules) for i in range(4)]
        for i, one in enumerate(asked):
            one.sequences[0].seed = i
        tokens = run(engine, [(0, one) for one in asked])
        found = [[(lp.rank, lp.ids) for lp in one.sequences[0].logprobs] for one in asked]
        return tokens, found, engine.stats.num_steps

    one, several = sampled(1), sampled(8)

    assert several[:2] == one[:2]
    assert several[2] < one[2] / 2


def test_a_row_that_needs_the_host_gets_one_token_a_launch(llama, prompts, expected):
    make, _ = llama
    engine = make(decode_steps=8)
    want = expected["0"]
    never = [token for token in range(101) if token not in want][:8]
    many = request("0", prompts[0], stop_token_ids=[*never, want[10]])

    done = run(engine, [(0, many)])

    assert done["0"] == want[: want.index(want[10]) + 1]
    assert engine.stats.num_steps >= len(done["0"])


# ---------------------------------------------------------------- one step ahead


@pytest.mark.parametrize("decode_steps", [1, 8])
@pytest.mark.parametrize("num_pages", [MOST_PAGES, 1 + 28])
def test_overlapping_steps_give_the_same_tokens(llama, prompts, expected, decode_steps, num_pages):
    make, _ = llama
    stops = {i: expected[str(i)][3 + i] for i in range(0, len(prompts), 2)}

    def served(overlap):
        engine = make(num_pages=num_pages, decode_steps=decode_steps, overlap=overlap)
        arrivals = []
        for i, prompt in enumerate(prompts):
            rules = {"stop_token_ids": [stops[i]]} if i in stops else {}
            rules |= {"temperature": 0.9, "seed": i, "repetition_penalty": 1.3} if i % 3 else {}
            arrivals.append((2 * i, request(str(i), prompt, **rules)))
        return run(engine, arrivals), engine

    apart, one = served(overlap=False)
    together, other = served(overlap=True)

    assert together == apart
    assert one.stats.num_ahead == 0
    assert other.stats.num_ahead > 10
    if num_pages < MOST_PAGES:
        assert other.scheduler.num_preemptions > 0


def events_of(engine, monkeypatch):
    """What the engine does with the device, in order, and whether it had to wait for it."""
    events, launches = [], []
    launch, fetch = engine.runner.launch, engine.runner.fetch

    def launch_(key, buffer):
        events.append(("launch", len(launches)))
        launches.append(launch(key, buffer))
        return launches[-1]

    def fetch_(outputs):
        number = next(i for i, known in enumerate(launches) if known is outputs)
        events.append(("fetch", number))
        return fetch(outputs)

    monkeypatch.setattr(engine.runner, "launch", launch_)
    monkeypatch.setattr(engine.runner, "fetch", fetch_)
    return events


def test_a_step_is_launched_before_the_one_before_it_is_fetched(llama, prompts, monkeypatch):
    make, _ = llama
    engine = make()
    events = events_of(engine, monkeypatch)

    run(engine, [(0, request("0", prompts[0], 6))])

    pairs = [("launch", 0)]
    for i in range(1, 6):
        pairs += [("launch", i), ("fetch", i - 1)]
    assert len(prompts[0]) <= 32  # or the prompt would take two steps
    assert events == [*pairs, ("fetch", 5)]


def test_a_launch_returns_before_it_is_computed(llama, prompts, monkeypatch):
    make, _ = llama
    engine, ready = make(), []
    launch = engine.runner.launch

    def launch_(key, buffer):
        outputs = launch(key, buffer)
        ready.append(outputs.tokens.is_ready())
        return outputs

    monkeypatch.setattr(engine.runner, "launch", launch_)

    run(engine, [(0, request(str(i), prompt)) for i, prompt in enumerate(prompts)])

    assert not all(ready)


def test_without_async_scheduling_each_step_is_fetched_at_once(llama, prompts, monkeypatch):
    make, _ = llama
    engine = make(overlap=False)
    events = events_of(engine, monkeypatch)

    run(engine, [(0, request("0", prompts[0], 3))])

    assert events == [(what, i) for i in range(3) for what in ("launch", "fetch")]


def test_a_row_that_ends_by_a_token_costs_one_step_and_frees_its_pages(llama, prompts, expected):
    make, _ = llama
    engine = make()
    stop = expected["0"][5]
    want = expected["0"][: expected["0"].index(stop) + 1]

    done = run(engine, [(0, request("0", prompts[0], stop_token_ids=[stop]))])

    assert done["0"] == want
    assert engine.stats.num_steps == len(want) + 1


def test_an_abort_in_flight_gives_its_pages_back(llama, prompts, expected):
    make, _ = llama
    engine = make()
    for i in range(3):
        engine.add_request(request(str(i), prompts[i]))
    for _ in range(4):
        engine.step()

    engine.abort({"1"})
    engine.scheduler.check_invariants()

    done = {}
    while engine.scheduler.has_work:
        for one in engine.step():
            done[one.request_id] = one.sequences[0].output_token_ids
        engine.scheduler.check_invariants()
    assert done == {i: expected[i] for i in ("0", "2")}
    engine.step()
    assert engine.scheduler.pool.num_held == 0


def test_a_launch_that_fails_on_the_device_loses_no_request(llama, prompts, expected, monkeypatch):
    """Its error comes out where the results are fetched, one step later."""
    make, _ = llama
    engine = make()
    asked = request("0", prompts[0])
    fetch = engine.runner.fetch

    def fail(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def call():
        with engine.call([]):
            engine.add_request(asked)
            engine.step()
            engine.step()
            monkeypatch.setattr(engine.runner, "fetch", fail)
            engine.step()

    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        call()
    monkeypatch.setattr(engine.runner, "fetch", fetch)

    assert run(engine, [])["0"] == expected["0"]


def test_a_state_that_a_failed_launch_left_is_made_anew(llama):
    class Failed:
        def is_deleted(self):
            return False

        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    runner = llama[0]().runner
    runner.state = dataclasses.replace(runner.state, last_token=Failed())

    runner.recover()

    assert not runner.is_lost()
