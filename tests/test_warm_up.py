"""The list of programs holds every plan's; warm-up and the background compile it."""

import logging
import threading
import time

import numpy as np
import pytest

from jaxllm import LLM, ConfigError, RecompileError, SamplingParams
from jaxllm.buckets import Buckets
from jaxllm.config import EngineConfig
from jaxllm.flags import NO_FLAGS, SamplingFlags
from jaxllm.program_cache import ProgramCache
from jaxllm.programs import CountKey, ProgramKey
from jaxllm.scheduler import SampledRow, Scheduler
from jaxllm.warm_up import Background, program_keys, warm_up
from tests.arrays import no_new_arrays
from tests.fake import make_sequence
from tests.test_program_cache import Builder

GREEDY = SamplingParams(temperature=0, max_tokens=6)
SAMPLED = SamplingFlags(sampled=True)
TINY = {
    "skip_tokenizer_init": True,
    "max_model_len": 24,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "kv_cache_memory_bytes": 1 << 16,
    "use_tqdm_on_load": False,
}

# ---------------------------------------------------------------- the list


def random_config(rng):
    page_size = int(2 ** rng.integers(0, 5))
    max_num_seqs = int(rng.integers(1, 24))
    return EngineConfig(
        max_model_len=int(rng.integers(2, 200)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, int(2 ** rng.uniform(1, 9))),
        page_size=page_size,
        min_rows=int(rng.integers(1, 3)),
        min_width=int(rng.choice([8, 256])),
        max_decode_steps=int(rng.choice([1, 8, 32])),
        block_q=int(2 ** rng.integers(2, 6)),
    )


def plans_of_a_random_run(config, rng):
    """Every plan that a scheduler makes of random requests, in few or many pages."""
    fewest = config.pages_per_seq + 1
    scheduler = Scheduler(config, fewest + int(rng.integers(0, fewest * config.max_num_seqs)))
    waiting = []
    for i in range(int(rng.integers(1, 2 * config.max_num_seqs + 2))):
        length = int(rng.integers(1, config.max_model_len))
        prompt = rng.integers(0, 9, length).tolist()
        waiting.append(make_sequence(str(i), prompt, max_tokens=int(rng.integers(1, 60))))
    for _ in range(3000):
        while waiting and rng.random() < 0.4:
            scheduler.add(waiting.pop())
        plan = scheduler.schedule() if scheduler.has_work else None
        if plan is not None:
            yield plan
            scheduler.update(plan, [SampledRow([1] * row.limit, []) for row in plan.rows])
        if not waiting and not scheduler.has_work:
            return
    pytest.fail("the run does not end")


@pytest.mark.parametrize("seed", range(60))
def test_every_plan_falls_into_the_list(seed):
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    buckets, keys = Buckets(config), set(program_keys(config))

    for plan in plans_of_a_random_run(config, rng):
        assert ProgramKey(buckets.of(plan), plan.lookahead) in keys, (config, plan.num_tokens)


def test_the_list_has_each_program_once_and_the_likeliest_first():
    config = EngineConfig(max_model_len=2048)

    keys = program_keys(config, [SAMPLED, NO_FLAGS])

    assert len(keys) == len(set(keys)) == len({str(key) for key in keys})
    assert {k.flags for k in keys} == {SAMPLED, NO_FLAGS}
    assert str(keys[0]) == "decode[2] x1 width 8 sampled"
    assert "prefill[16x8] x1 width 8 sampled" in [str(k) for k in keys[:4]]
    assert "decode[64]" in str(keys[-1]) or "mixed[2048" in str(keys[-1])


def test_the_list_has_the_steps_that_a_launch_may_have():
    config = EngineConfig(max_model_len=64, max_num_seqs=2, max_decode_steps=8)

    steps = {k.steps for k in program_keys(config) if k.bucket.is_decode}

    assert steps == {1, 8}


def test_the_list_has_the_counting_programs_where_there_are_penalties():
    config = EngineConfig(max_model_len=1000, max_num_seqs=2)

    with_penalties = program_keys(config, [SamplingFlags(penalties=True)])

    counting = [key.tokens for key in with_penalties if isinstance(key, CountKey)]
    assert counting == [256, 512, 1024]
    assert not any(isinstance(key, CountKey) for key in program_keys(config))


# ---------------------------------------------------------------- the background


class Slow(Builder):
    """A builder whose programs take a moment."""

    def compile(self):
        time.sleep(0.002)
        return super().compile()


CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16)
KEYS = program_keys(CONFIG)


@pytest.fixture
def programs():
    return ProgramCache(Slow())


def test_background_compiles_the_list_in_order(programs):
    background = Background(programs, KEYS)

    assert background.wait(10)

    assert programs.builder.lowered == list(KEYS)
    assert (programs.counts.num_hits, programs.counts.num_misses) == (0, 0)
    background.close()


def test_background_compiles_what_is_asked_for_next(programs):
    programs.builder.go_on.clear()
    background = Background(programs, KEYS)
    assert programs.builder.entered.wait(10)

    for _ in range(3):
        background.prefer(KEYS[-1])
    programs.builder.go_on.set()
    assert background.wait(10)

    assert programs.builder.lowered == [KEYS[0], KEYS[-1], *KEYS[1:-1]]
    background.close()


def test_background_compiles_what_is_asked_for_after_the_list(programs):
    background = Background(programs, ())
    assert background.wait(10)

    programs.prefer(KEYS[0])

    assert background.wait(10)
    assert KEYS[0] in programs
    background.close()


def test_a_closed_background_ends_after_the_program_that_it_is_at(programs):
    programs.builder.go_on.clear()
    background = Background(programs, KEYS)
    assert programs.builder.entered.wait(10)

    background.close()
    programs.builder.go_on.set()
    background._thread.join(10)

    assert not background.is_running
    assert programs.builder.lowered == [KEYS[0]]
    assert programs.prefer is None


def test_background_warns_once_of_what_does_not_compile(programs, caplog):
    programs.builder.error = RuntimeError("no such instruction")

    background = Background(programs, KEYS)

    assert background.wait(10)
    assert [r.message for r in caplog.records] == [
        f"{KEYS[0]} could not be compiled in the background: no such instruction"
    ]
    with pytest.raises(RuntimeError, match="no such instruction"):
        programs.get(KEYS[0])
    background.close()


def test_warm_up_that_is_interrupted_keeps_what_it_has(programs, monkeypatch):
    compile_one = programs._compile

    def interrupted(key):
        if key == KEYS[2]:
            raise KeyboardInterrupt
        compile_one(key)

    monkeypatch.setattr(programs, "_compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm_up([programs], KEYS, show_progress=False)
    monkeypatch.undo()

    assert len(programs) == 2
    warm_up([programs], KEYS, show_progress=False)
    assert len(programs) == len(KEYS)


def test_warm_up_shows_a_bar_unless_it_should_not(programs, capsys):
    warm_up([programs], KEYS[:2], show_progress=False)
    assert capsys.readouterr().err == ""

    warm_up([programs], KEYS, show_progress=True)

    shown = capsys.readouterr().err
    assert "Compiling programs: 100%" in shown
    assert f" {len(KEYS)}/{len(KEYS)} [" in shown


# ---------------------------------------------------------------- in LLM


def tokens(llm, prompts, params=GREEDY):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


PROMPTS = [[1, 2, 3], [5, 4, 3, 2, 1, 9, 8], [7] * 12]


@pytest.fixture(scope="module")
def expected(checkpoints):
    with LLM(checkpoints(num_hidden_layers=1), **TINY) as llm:
        assert llm.stats().num_programs == 0
        yield tokens(llm, PROMPTS)


def test_after_full_warm_up_nothing_is_compiled(checkpoints, expected, monkeypatch, caplog):
    monkeypatch.setenv("JAXLLM_RECOMPILE", "error")

    with LLM(checkpoints(num_hidden_layers=1), warmup="full", **TINY) as llm:
        ready = llm.stats()
        found = tokens(llm, PROMPTS)
        tokens(llm, PROMPTS, SamplingParams(max_tokens=3))
        after = llm.stats()

        assert found == expected
        assert ready.num_programs == after.num_programs > 0
        assert (ready.program_misses, after.program_misses) == (0, 0)
        assert after.program_hits >= after.num_steps > 0
        with pytest.raises(RecompileError, match=r"\+top_k"):
            tokens(llm, PROMPTS, SamplingParams(top_k=2, max_tokens=3))
        assert tokens(llm, PROMPTS) == expected  # the engine is as before
        assert llm.stats().num_pages_held == 0


def test_background_gives_the_same_tokens_while_it_compiles(checkpoints, expected):
    with LLM(checkpoints(num_hidden_layers=1), warmup="background", **TINY) as llm:
        first = tokens(llm, PROMPTS)
        assert llm._backgrounds[0].wait(120)
        last = tokens(llm, PROMPTS)
        thread = llm._backgrounds[0]._thread
        stats = llm.stats()

    thread.join(30)
    assert not thread.is_alive()
    assert first == last == expected
    assert stats.num_programs >= len(program_keys(llm._plan.engine))


def test_larger_programs_give_the_same_tokens(checkpoints, expected):
    """Each step is served by a program that is not its own."""
    with LLM(checkpoints(num_hidden_layers=1), **TINY) as llm:
        engine = llm._engine
        programs, buckets = engine.runner.programs, engine.buckets
        width = buckets.widths[-1]
        large = [buckets.decode(buckets.rows[-1], width)]
        large.append(buckets.mixed(16, buckets.mixed_rows[-1], width, with_decodes=True))
        for bucket in large:
            programs.compile(ProgramKey(bucket, 1, SAMPLED))
        asked = []
        programs.prefer = asked.append

        found = tokens(llm, PROMPTS)

        assert found == expected
        assert len(programs) == 2
        assert asked
        assert llm.stats().program_stand_ins == len(asked) >= llm.stats().num_steps


def test_close_and_del_end_the_background(checkpoints):
    llm = LLM(checkpoints(num_hidden_layers=1), warmup="background", **TINY)
    thread = llm._backgrounds[0]._thread

    del llm

    thread.join(60)
    assert not thread.is_alive()


def test_interrupted_full_warm_up_frees_the_model(checkpoints, monkeypatch):
    folder = checkpoints(num_hidden_layers=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgramCache, "_compile", interrupted)
    with no_new_arrays(), pytest.raises(KeyboardInterrupt):
        LLM(folder, warmup="full", **TINY)

    assert not any(t.name == "jaxllm-compile" for t in threading.enumerate() if t.is_alive())


@pytest.mark.parametrize("warmup", ["eager", None, True])
def test_unknown_warm_up_lists_the_known_ones(checkpoints, warmup):
    with pytest.raises(ConfigError, match=r"is not one of \['lazy', 'background', 'full'\]"):
        LLM(checkpoints(), warmup=warmup, **TINY)


def test_unknown_guard_is_said_before_anything_is_compiled(checkpoints, monkeypatch):
    monkeypatch.setenv("JAXLLM_RECOMPILE", "maybe")

    with pytest.raises(ConfigError, match="JAXLLM_RECOMPILE='maybe'"):
        LLM(checkpoints(), warmup="full", **TINY)


def test_a_default_warm_up_is_lazy_and_warns_of_nothing(checkpoints, caplog):
    with caplog.at_level(logging.WARNING, "jaxllm"), LLM(checkpoints(), **TINY) as llm:
        tokens(llm, PROMPTS)

        assert llm.report().programs["warm-up"] == "lazy"
    assert caplog.records == []
