"""`llm.reshard`: the same tokens before and after, nothing lost, nothing half-way."""

import random
import threading

import jax
import numpy as np
import pytest

from jaxllm import LLM, ConfigError, SamplingParams
from jaxllm.program_cache import ProgramCache
from jaxllm.sharding.gpu_topology import gpu_devices
from jaxllm.warm_up import program_keys
from tests.interrupts import Interrupts, count_events
from tests.layouts import EIGHT_HEADS
from tests.tiny import random_prompts

SMALL = {
    "skip_tokenizer_init": True,
    "max_model_len": 48,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 17,
    "use_tqdm_on_load": False,
}
PROMPTS = random_prompts(3, 30, seed=3, shortest=3)
GREEDY = SamplingParams(temperature=0, max_tokens=6)
THERE = {"layout": "tensor", "tensor_parallel_size": 8}
ROUND = {
    "copies, padding": THERE,
    "other devices": {"layout": "tensor", "tensor_parallel_size": 2, "devices": [6, 1]},
    "two axes": {"layout": "tensor_2d", "tensor_parallel_size": 8},
    "sequence": {"layout": "sequence", "tensor_parallel_size": 4},
}


def tokens(llm, params=GREEDY):
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params, use_tqdm=False)]


def values(llm):
    """Every parameter, from the devices."""
    return [np.asarray(param) for param in llm._engine.runner.params]


def devices(llm):
    return [device.id for device in llm._engine.runner.builder.sharder.mesh.devices.flat]


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llama", **EIGHT_HEADS)


@pytest.fixture(scope="module")
def expected(folder):
    with LLM(folder, **SMALL) as llm:
        return tokens(llm)


@pytest.fixture
def llm(folder):
    with LLM(folder, **SMALL) as llm:
        yield llm


@pytest.mark.parametrize("name", ROUND)
def test_tokens_are_the_same_under_another_layout_and_back(llm, expected, name):
    before = values(llm)

    llm.reshard(**ROUND[name])
    assert tokens(llm) == expected
    llm._engine.scheduler.check_invariants()
    llm.reshard(**THERE)
    llm.reshard("replicated", devices=[0])

    assert tokens(llm) == expected
    for ours, theirs in zip(values(llm), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_sampled_tokens_with_penalties_are_the_same_too(llm):
    params = SamplingParams(seed=1, temperature=0.8, repetition_penalty=1.3, max_tokens=6)
    wanted = tokens(llm, params)

    llm.reshard(**THERE)

    assert tokens(llm, params) == wanted


def test_nothing_of_the_old_layout_stays_on_the_devices(llm):
    tokens(llm)
    report = llm.layout()
    assert set(report.weight_bytes) == {0}

    llm.reshard("tensor", tensor_parallel_size=2, devices=[4, 5])

    runner = llm._engine.runner
    assert {d.id for x in jax.tree.leaves((runner.params, runner.state)) for d in x.devices()} == {
        4,
        5,
    }
    assert llm.layout().weight_bytes.keys() == {4, 5}
    assert "2 x cpu" in llm._repr_html_()


def test_devices_it_has_come_first(llm):
    llm.reshard("tensor", tensor_parallel_size=2, devices=[5, 3])
    llm.reshard("tensor", tensor_parallel_size=4)
    assert devices(llm) == [5, 3, 0, 1]

    llm.reshard("replicated")
    assert devices(llm) == [5]


def test_one_parameter_at_a_time_is_in_two_places(llm, monkeypatch):
    runner = llm._engine.runner
    most = max(param.nbytes for param in runner.params)
    total = sum(param.nbytes for param in runner.params)
    seen = []
    import jaxllm.runner as module

    original = module.move

    def live():
        shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
        # An array and the view of its only shard are one buffer.
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())

    others = live() - sum(runner.held_bytes().values())

    def moved(x, old, new):
        result = original(x, old, new).block_until_ready()
        seen.append(live() - others)
        return result

    monkeypatch.setattr(module, "move", moved)

    llm.reshard("replicated", devices=[7])

    assert len(seen) == len(runner.params)
    assert max(seen) <= total + most  # the cache is freed before the first one moves


def test_programs_of_a_layout_are_compiled_once(llm, expected):
    first = llm._engine.runner.programs
    tokens(llm)
    compiled = dict(first._programs)
    llm.reshard("tensor", tensor_parallel_size=2)
    tokens(llm)
    second = llm._engine.runner.programs
    assert second is not first

    llm.reshard("replicated")
    assert llm._engine.runner.programs is first
    assert tokens(llm) == expected
    assert first._programs == compiled

    llm.reshard("tensor", tensor_parallel_size=2)
    assert llm._engine.runner.programs is second


@pytest.fixture
def few_programs(monkeypatch):
    """What is compiled ahead are three programs, each once `go_on` is set."""
    compile_one, go_on, entered = ProgramCache._compile, threading.Event(), threading.Event()

    def held(table, key):
        entered.set()
        assert go_on.wait(60)
        compile_one(table, key)

    monkeypatch.setattr(ProgramCache, "_compile", held)
    monkeypatch.setattr("jaxllm.llm.program_keys", lambda *args: program_keys(*args)[:3])
    return entered, go_on


def test_background_compiles_for_the_layout_that_the_model_has(folder, expected, few_programs):
    entered, go_on = few_programs
    with LLM(folder, warmup="background", **SMALL) as llm:
        first, (left,) = llm._engine.runner.programs, llm._backgrounds
        assert entered.wait(60)

        llm.reshard(**THERE)
        go_on.set()

        second, (follower,) = llm._engine.runner.programs, llm._backgrounds
        assert follower.wait(120)
        left._thread.join(60)
        assert not left.is_running
        assert (len(first), len(second)) == (1, 3)  # one that the first thread was at
        assert (first.prefer, second.prefer) == (None, follower.prefer)
        assert tokens(llm) == expected
        llm.reshard("replicated", devices=[0])
        assert llm._backgrounds[0].wait(120)
        assert len(first) == 3


def test_background_goes_on_where_a_failed_reshard_leaves_the_model(
    folder, expected, few_programs, monkeypatch
):
    entered, go_on = few_programs
    with LLM(folder, warmup="background", **SMALL) as llm:
        programs = llm._engine.runner.programs
        assert entered.wait(60)

        monkeypatch.setattr("jaxllm.runner.move", _no_room)
        with pytest.raises(MemoryError):
            llm.reshard(**THERE)
        go_on.set()

        assert llm._backgrounds[0].wait(120)
        assert llm._engine.runner.programs is programs
        assert len(programs) == 3
        assert tokens(llm) == expected


def _no_room(*_):
    raise MemoryError("no room")


def test_past_prompts_are_forgotten(llm):
    tokens(llm)
    assert llm._engine.scheduler.pool.num_held == 0
    llm.reshard("tensor", tensor_parallel_size=2)

    assert llm.stats()["prefix_tokens_hit"] == 0
    tokens(llm)
    assert llm.stats()["prefix_tokens_hit"] == 0


def test_more_devices_have_a_larger_cache(llm):
    before = llm._engine.scheduler.num_pages

    llm.reshard("tensor", tensor_parallel_size=2)

    scheduler = llm._engine.scheduler
    assert scheduler.num_pages == llm._plan.memory.num_pages > before
    assert llm.stats()["num_pages"] == scheduler.num_pages - 1
    scheduler.check_invariants()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unfinished_requests_go_on_where_they_were(llm, expected, steps):
    stream, outputs = llm.stream(PROMPTS, GREEDY), {}
    for _ in range(steps):
        output = next(stream)
        outputs[output.request_id] = output

    llm.reshard("tensor", tensor_parallel_size=8)

    for output in stream:
        outputs[output.request_id] = output
    assert all(output.finished for output in outputs.values())
    found = [list(outputs[i].outputs[0].token_ids) for i in sorted(outputs, key=int)]
    assert found == expected
    assert tokens(llm) == expected


def test_queued_requests_run_under_the_new_layout(llm, expected):
    llm.enqueue(PROMPTS, GREEDY)

    llm.reshard(**THERE)

    found = llm.wait_for_completion(use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in found] == expected


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"layout": "tensr"}, "tensr.*is not a preset"),
        ({"layout": "tensor", "tensor_parallel_size": 3}, "num_attention_heads=8 does not divide"),
        ({"layout": "tensor", "tensor_parallel_size": 16}, "World size"),
        ({"layout": "tensor", "tensor_parallel_size": 2, "devices": [0]}, "needs 2"),
        ({"layout": {"mesh": {"data": 2}}}, "has 2 engines side by side, and reshard moves one"),
    ],
)
def test_layout_that_cannot_be_moves_nothing(llm, expected, how, words):
    runner = llm._engine.runner
    held, state = runner.params, runner.state

    with pytest.raises(ConfigError, match=words):
        llm.reshard(**how)

    assert runner.params is held
    assert runner.state is state
    assert tokens(llm) == expected


def test_engines_side_by_side_are_not_moved(folder):
    with (
        LLM(folder, data_parallel_size=2, **SMALL) as llm,
        pytest.raises(ConfigError, match=r"has 2 engines side by side \(data_parallel_size\)"),
    ):
        llm.reshard("tensor", tensor_parallel_size=2)


def test_cache_too_small_for_a_sequence_moves_nothing(folder, expected):
    # Split over two devices it holds one sequence; on one it does not.
    with LLM(
        folder,
        **{**SMALL, "kv_cache_memory_bytes": 6_000, "block_size": 16},
        layout="tensor",
        tensor_parallel_size=2,
    ) as llm:
        held = llm._engine.runner.params

        with pytest.raises(ConfigError, match=r"max seq len \(48\)"):
            llm.reshard("replicated")

        assert llm._engine.runner.params is held
        assert tokens(llm) == expected


@pytest.mark.aot
def test_other_kind_of_device_is_refused(llm):
    with pytest.raises(ConfigError, match=r"on cpu devices and .* is one of .*make another LLM"):
        llm.reshard("replicated", devices=gpu_devices("h100"))


# ---------------------------------------------------------------- cut off


def test_failure_half_way_puts_everything_back(llm, expected, monkeypatch):
    import jaxllm.runner as module

    before, original, calls = devices(llm), module.move, []

    def fails(x, old, new):
        calls.append(old)
        if len(calls) == 5:
            raise MemoryError("no room")
        return original(x, old, new)

    monkeypatch.setattr(module, "move", fails)

    with pytest.raises(MemoryError):
        llm.reshard("tensor", tensor_parallel_size=8)

    assert devices(llm) == before
    assert tokens(llm) == expected
    assert set(llm.layout().weight_bytes) == {0}


def test_no_room_for_the_new_cache_puts_everything_back(llm, expected, monkeypatch):
    import jaxllm.runner as module

    original, calls = module.allocate, []

    def fails(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError("no room")
        return original(*args, **options)

    monkeypatch.setattr(module, "allocate", fails)

    with pytest.raises(MemoryError):
        llm.reshard("tensor", tensor_parallel_size=8)

    assert devices(llm) == [0]
    assert tokens(llm) == expected


def assert_whole(llm, before):
    """Parameters, cache, books and plan are of one layout, and values are what they were."""
    with llm._engine.call([]):
        pass  # as any call begins: what a second interrupt has left is mended
    runner = llm._engine.runner
    shapes = runner.builder.model.shapes
    for param, shape in zip(runner.params, shapes, strict=True):
        assert param.shape == shape.shape
        assert param.sharding.is_equivalent_to(shape.sharding, param.ndim)
    for array, shape in zip(
        jax.tree.leaves(runner.state), jax.tree.leaves(runner.builder.state_shapes()), strict=True
    ):
        assert array.shape == shape.shape
        assert not array.is_deleted()
    assert llm._engine.scheduler.num_pages == runner.builder.num_pages
    llm._engine.scheduler.check_invariants()
    from jaxllm.modeling.forms import to_bare

    for leaf, param, value in zip(runner.builder.model.leaves, runner.params, before, strict=True):
        np.testing.assert_array_equal(to_bare(leaf, param), value)


@pytest.mark.parametrize("second", [False, True])
def test_interrupt_anywhere_leaves_all_in_one_layout(llm, expected, second):
    before = values(llm)
    there, back = THERE, {"layout": "replicated"}
    llm.reshard(**there)
    llm.reshard(**back)
    num_events = count_events(lambda: llm.reshard(**there))
    llm.reshard(**back)
    rng, num_back, num_second = random.Random(0), 0, 0

    for event in rng.sample(range(1, num_events), 25):
        events = [event, event + rng.randint(1, 200)] if second else [event]
        interrupts = Interrupts(*events)
        try:
            with interrupts:
                llm.reshard(**there)
        except KeyboardInterrupt:
            pass
        num_second += second and interrupts.count >= events[-1]
        assert_whole(llm, before)
        num_back += len(devices(llm)) == 1
        assert llm._plan.model is llm._engine.runner.builder.model or second
        llm.reshard(**back)

    assert num_back > 10
    assert tokens(llm) == expected
    assert num_second > 5 or not second
