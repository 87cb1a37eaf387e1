"""Plans with the programs of GPUs that are not here: what the rules ask for, and what is more."""

import pytest

from jaxllm import ConfigError, Layout, plan, sweep
from jaxllm.compiling import Compiler, Program
from jaxllm.hardware import parse
from jaxllm.loading import Wishes
from jaxllm.planner import Planner, read_config
from jaxllm.sharding.gpu_topology import is_installed
from tests.test_plan import LLAMA

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not is_installed(), reason="needs the CUDA plugin of JAX: extra `aot`"),
]

SMALL = {**LLAMA, "num_hidden_layers": 2}
OPTIONS = {"hardware": "h200:8", "batch": 16, "context": 512, "max_model_len": 4096}

# The heads of attention are split, and what it gives is multiplied with a weight that is not:
# the rules ask for no sum there, and the compiler needs one.
BAD = Layout("bad", {"tensor": 8}, {"kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"})


ABORTS = "import os; print('LLVM ERROR: no', flush=True); os.abort()"
"""What LLVM does where it cannot go on."""


@pytest.fixture(scope="module")
def rows():
    layouts = ["tensor:8", "data:8", BAD, "tensor:3"]
    found = sweep(SMALL, layouts, level="compile", use_tqdm=False, **OPTIONS)
    return {row.layout.partition(":")[0] if row.fits else row.layout: row for row in found}


def test_a_good_layout_sends_what_its_rules_ask_for(rows):
    for name in ("tensor", "data"):
        assert rows[name].error is None
        assert rows[name].excess_per_layer == 0

    # Both are bfloat16 sums of the residual stream, and 16 rows are a bucket.
    assert rows["tensor"].compiled_link_bytes == pytest.approx(
        rows["tensor"].decode_link_bytes, rel=0.01
    )


def test_a_bad_rule_shows_what_it_sends_beyond_the_textbook(rows):
    bad = rows["bad"].plan

    assert rows["bad"].excess_per_layer >= 1
    assert bad.transfers_per_layer() == {"all-reduce": 1}
    for program in bad.programs:
        assert sum(program.excess.values()) >= bad.num_layers
    assert "(1 a layer)" in repr(bad)


def test_a_layout_that_cannot_be_is_a_row_between_the_others(rows):
    assert "does not divide" in rows["tensor:3"].error
    assert rows["tensor:3"].compile_seconds is None


def test_the_programs_read_at_least_what_a_step_must(rows):
    for name in ("tensor", "data"):
        found = rows[name].plan
        decode = next(program for program in found.programs if program.kind == "decode")
        assert decode.memory_bytes >= found.decode.work.memory_bytes
        assert decode.temp_bytes <= decode.temp_bound
        assert found.program_roofline("decode").seconds >= found.decode.seconds * 0.99


def test_a_card_with_no_target_cannot_be_compiled_for():
    hardware = {**parse("h200:8").to_dict(), "name": "mine", "target": None}

    with pytest.raises(ConfigError, match=r"'mine' names no target.*Add 'target': 'h200'"):
        plan(SMALL, layout="tensor", compile=True, **{**OPTIONS, "hardware": hardware})


def test_a_compiler_that_ends_its_process_is_a_sentence_and_a_new_process(monkeypatch):
    planner = Planner("small", read_config(SMALL), Wishes(max_model_len=4096), parse("t4:1"))
    layout = Layout("one", {"tensor": 1}, {})

    with Compiler(planner) as compiler:
        monkeypatch.setattr("jaxllm.compiling.WORKER", ["-c", ABORTS])
        with pytest.raises(
            ConfigError, match=r"ended its process \(exit status -6\).*LLVM ERROR: no"
        ):
            compiler.programs(layout, 2, 64)
        monkeypatch.undo()
        programs = compiler.programs(layout, 2, 64)

    assert all(isinstance(program, Program) for program in programs)
