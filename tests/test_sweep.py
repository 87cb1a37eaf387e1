"""Sweeps: a row a layout, whatever becomes of it."""

import importlib
import json
import time
from types import SimpleNamespace

import pytest

from jaxllm import LLM, ConfigError, Sweep, measuring, sweep
from jaxllm.program_cache import ProgramCache
from jaxllm.sharding.layouts import Layout
from jaxllm.sweep import BETTER, SweepRow
from tests.test_plan import LLAMA, LLAMA_70B

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "use_tqdm": False}


@pytest.fixture(scope="module")
def planned():
    return sweep(LLAMA, hardware="h200:8", batch=[8, 64], context=1024, use_tqdm=False)


def test_by_default_all_mixtures_of_tensor_and_data(planned):
    assert [row.layout for row in planned][::2] == [
        "tensor:8",
        "data_tensor:2x4",
        "data_tensor:4x2",
        "data:8",
    ]
    assert [row.batch for row in planned] == [8, 64] * 4
    assert {row.devices for row in planned} == {8}
    assert [row.engines for row in planned][::2] == [1, 2, 4, 8]
    assert all(row.fits and row.error is None for row in planned)


def test_more_devices_a_model_hold_more_tokens_and_send_more(planned):
    tensor, data = planned[0], planned[-1]

    assert tensor.kv_tokens > data.kv_tokens
    assert tensor.weight_bytes == pytest.approx(data.weight_bytes / 8, rel=1e-3)
    assert tensor.decode_link_bytes > data.decode_link_bytes == 0


def test_the_best_row_is_by_what_one_cares_for(planned):
    assert planned.best().tokens_per_second == max(row.tokens_per_second for row in planned)
    assert planned.best("decode_seconds").layout == "tensor:8"
    assert planned.best("kv_tokens").layout == "tensor:8"


def test_what_cannot_be_compared_by_is_refused(planned):
    with pytest.raises(ConfigError, match=r"by='speed' is nothing to compare by.*Use one of"):
        planned.best("speed")
    with pytest.raises(
        ConfigError, match=r"level='plan'\. Use another figure, or sweep at level='measure'"
    ):
        planned.best("measured_decode_seconds")


def test_every_figure_to_compare_by_is_one_of_a_row():
    assert set(BETTER) <= set(SweepRow.__dataclass_fields__)


def test_a_layout_that_fails_is_a_row_with_its_reason():
    bad = Layout("bad", {"tensor": 8}, {"mlp": "tensor", "embed": "tensor"})
    layouts = ["tensor:8", "tensor:3", "tensor:16", "nothing", bad, {"mesh": {"tensor": 0}}]

    found = sweep(LLAMA, layouts, hardware="h200:8", use_tqdm=False)

    assert [row.error is None for row in found] == [True, False, False, False, False, False]
    reasons = ["Sizes that work", "has 8", "is not a preset", "over one mesh axis", "the size 0"]
    for row, reason in zip(found[1:], reasons, strict=True):
        assert reason in row.error
        assert not row.fits
        assert row.error in repr(found)
    assert found.best().layout == "tensor:8"


def test_by_default_the_context_is_one_that_the_model_has(checkpoints):
    found = sweep(checkpoints("llama"), ["tensor:2", "tensor:3"], hardware="h200:8", use_tqdm=False)

    assert [row.context for row in found] == [128, None]
    assert "does not divide" in found[1].error


def test_a_model_that_fits_nowhere_has_rows_and_no_best():
    found = sweep(LLAMA_70B, hardware="l4:2", max_model_len=4096, use_tqdm=False)

    assert [row.fits for row in found] == [False, False]
    with pytest.raises(ConfigError, match="No layout of this sweep works: tensor:2: The model"):
        found.best()
    assert "does not fit" in repr(found)


def test_rows_go_to_a_file_and_back(planned, tmp_path):
    planned.save(tmp_path / "sweep.json")

    again = Sweep.load(tmp_path / "sweep.json")

    assert list(again) == list(planned)
    assert repr(again) == repr(planned)
    assert again.best() == planned.best()
    assert json.loads((tmp_path / "sweep.json").read_text())["hardware"] == "h200:8"


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"rows": [{"speed": 1}]}'])
def test_what_is_no_sweep_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)

    with pytest.raises(ConfigError, match=r"other.json' is no sweep .*`Sweep.save\(path\)` writes"):
        Sweep.load(tmp_path / "other.json")


def test_a_notebook_shows_a_table(planned):
    shown = planned._repr_html_()

    assert shown.count("<tr>") == 1 + len(planned)
    assert "data_tensor:2x4" in shown


def test_rows_become_a_data_frame(planned):
    pytest.importorskip("pandas")

    frame = planned.to_pandas()

    assert list(frame.layout) == [row.layout for row in planned]
    assert frame.loc[0, "kv_tokens"] == planned[0].kv_tokens
    assert "plan" not in frame


def test_a_plot_has_a_bar_for_each_row_and_part(planned):
    pytest.importorskip("matplotlib")

    times, memory, sent = planned.plot().axes

    assert len(times.patches) == len(planned)
    assert len(memory.patches) == 3 * len(planned)
    assert len(sent.patches) == len(planned)
    assert next(text.get_text() for text in times.get_yticklabels()) == "tensor:8, batch 8"


@pytest.mark.parametrize(("call", "module"), [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_a_missing_library_is_named_with_what_to_install(planned, monkeypatch, call, module):
    real = importlib.import_module

    def without(name, *args):
        if name.startswith(module):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)

    with pytest.raises(ConfigError, match=rf"{call}\(\) needs {module}, .*'jaxllm\[plot\]'"):
        getattr(planned, call)()


class Bar:
    """What is called in place of tqdm."""

    def __init__(self, **about):
        self.about, self.count, self.closed = about, 0, False
        made.append(self)

    def update(self, number):
        self.count += number

    def close(self):
        self.closed = True


made: list[Bar] = []


def test_progress_is_a_step_a_row_and_can_be_anything():
    made.clear()

    sweep(LLAMA, ["tensor", "tensor:3"], hardware="h200:8", batch=[1, 2], use_tqdm=Bar)

    assert [(bar.about["total"], bar.count, bar.closed) for bar in made] == [(4, 4, True)]


REFUSED = {
    "level": ({"level": "run"}, r"level='run' is not known.*Use one of \['plan', 'compile'"),
    "layouts": ({"layouts": "tensor"}, r"layouts='tensor' must be a list, such as \['tensor:8'"),
    "none": ({"layouts": []}, r"layouts=\[\] is empty"),
    "batch": ({"batch": [8, 0]}, r"batch=\[8, 0\] must be a number of at least 1, or a list"),
    "context": ({"context": "long"}, "context='long' must be a number"),
    "elsewhere": (
        {"level": "measure"},
        r"runs on the devices that are here, 'cpu', and hardware='h200' is another. Leave",
    ),
    "hardware": ({"hardware": "abacus"}, "hardware='abacus' is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_for_every_layout_is_refused(case):
    changed, sentence = REFUSED[case]

    with pytest.raises(ConfigError, match=sentence):
        sweep(**{"model": LLAMA, "hardware": "h200:8", **changed}, use_tqdm=False)


def test_programs_are_compiled_for_the_devices_that_are_here(checkpoints):
    found = sweep(
        checkpoints("llama"),
        ["tensor:2", "data:2", "tensor:3"],
        hardware="cpu:8",
        batch=4,
        context=32,
        level="compile",
        **OPTIONS,
    )

    tensor, data, failed = found
    assert tensor.excess_per_layer == data.excess_per_layer == 0
    assert tensor.compiled_link_bytes > data.compiled_link_bytes == 0
    assert tensor.compile_seconds > 0
    assert tensor.compiled_temp_bytes <= tensor.temp_bytes
    assert "does not divide" in failed.error
    assert "excess a layer" in repr(found)


def test_a_batch_that_is_never_decoded_at_once_is_a_row_that_says_so(checkpoints):
    (row,) = sweep(
        checkpoints("llama"),
        ["replicated"],
        batch=8,
        context=36,
        level="measure",
        max_model_len=36,
        kv_cache_memory_bytes=8 * 16 * 256,  # eight pages; each prompt comes to need three
        **OPTIONS,
    )

    assert row.measured_decode_seconds is None
    assert "were not decoded all at once for 4 steps: max_model_len=36" in row.error


def test_a_step_is_one_in_which_every_prompt_gets_a_token(checkpoints, monkeypatch):
    made = []

    def load(*args, **options):
        made.append(LLM(*args, **options))
        return made[-1]

    # A clock that counts the engine's steps, of which the prompts take many.
    clock = SimpleNamespace(perf_counter=lambda: made[-1].stats()["num_steps"])
    monkeypatch.setattr(measuring, "LLM", load)
    monkeypatch.setattr(measuring, "time", clock)

    (row,) = sweep(
        checkpoints("llama"),
        ["replicated"],
        batch=8,
        context=48,
        level="measure",
        max_model_len=128,
        **{**OPTIONS, "max_num_batched_tokens": 16},
    )

    assert row.measured_prefill_seconds >= 8 * 31 / 16
    assert row.measured_decode_seconds == 1


def test_an_engine_that_compiles_longer_than_another_needs_for_its_prompts(
    checkpoints, monkeypatch
):
    compile_, slow = ProgramCache._compile, []

    def compile_slowly(cache, key):
        compile_(cache, key)
        slow.append(cache)
        if cache is slow[0]:
            time.sleep(0.5)

    monkeypatch.setattr(ProgramCache, "_compile", compile_slowly)

    (row,) = sweep(
        checkpoints("llama"),
        ["data:2"],
        batch=2,
        context=24,
        level="measure",
        max_model_len=64,
        **OPTIONS,
    )

    assert row.error is None
    assert len({id(cache) for cache in slow}) == 2


def test_layouts_are_run_on_the_devices_that_are_here(checkpoints):
    found = sweep(
        checkpoints("llama"),
        ["replicated", "tensor:2"],
        batch=2,
        context=24,
        level="measure",
        max_model_len=64,
        **OPTIONS,
    )

    for row in found:
        assert row.error is None
        assert row.measured_prefill_seconds > 0
        assert row.measured_decode_seconds > 0
        assert row.measured_kv_tokens == pytest.approx(row.kv_tokens, rel=0.02)
        assert row.measured_tokens_per_second == pytest.approx(2 / row.measured_decode_seconds)
    assert found.best() in list(found)
    assert found.best().measured_tokens_per_second == max(
        r.measured_tokens_per_second for r in found
    )
