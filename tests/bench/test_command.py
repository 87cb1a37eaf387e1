"""`jaxllm bench` on a model of two layers."""

import json
import sys
import time

import pytest

from jaxllm.bench import setting, startup, startup_child
from jaxllm.bench.latency import measure_latency
from jaxllm.bench.report import Chart, write_plot
from jaxllm.bench.startup import Startup, StartupResult
from jaxllm.cli import main
from jaxllm.machine import Machine, measure_machine

SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 16}
"""One engine for all tests here, so that its programs are compiled once."""

OPTIONS = ["--input-len", "6", "--output-len", "4"]
OPTIONS += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
LATENCY = ["bench", "latency", *OPTIONS, "--batch-size", "4", "--num-iters", "2"]
THROUGHPUT = ["bench", "throughput", *OPTIONS, "--num-prompts", "8"]


@pytest.fixture
def _quick_machine(monkeypatch):
    """A roofline measured on little: the rates are not what is tested here."""

    def quick(dtype, *, num_devices):
        return measure_machine(
            dtype, num_devices=num_devices, seconds=0.01, read_bytes=1 << 20, side=64
        )

    monkeypatch.setattr(setting, "measure_machine", quick)


@pytest.mark.usefixtures("_quick_machine")
def test_latency_prints_a_table_and_writes_every_figure(checkpoints, tmp_path, capsys):
    path = tmp_path / "out.json"

    status = main([*LATENCY, "--model", str(checkpoints("llama")), "--output-json", str(path)])

    shown, found = capsys.readouterr().out, json.loads(path.read_text())
    assert status == 0
    assert "4 prompts, 6 tokens in, 4 out; 2 iterations" in shown
    assert "compiled meanwhile" not in shown
    assert len(found["latencies"]) == 2
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 2)
    assert found["percentiles"].keys() >= {"50", "90", "99"}
    assert len(found["first_token_seconds"]["values"]) == 8
    assert 0 < found["first_token_seconds"]["mean"] < found["avg_latency"]
    assert found["output_tokens_per_second"] == pytest.approx(16 / found["avg_latency"])
    assert 0 < found["roofline_share"] < 1
    assert all(0 < run["num_steps"] <= 4 for run in found["iterations"])
    assert all(run["num_compiled"] == 0 for run in found["iterations"])
    assert all(run["num_ahead"] > 0 for run in found["iterations"])
    assert all(run["host_seconds"] > 0 for run in found["iterations"])
    assert all(0 <= run["padding_waste"] < 1 for run in found["iterations"])


@pytest.mark.usefixtures("_quick_machine")
def test_throughput_prints_a_table_and_writes_every_figure(checkpoints, tmp_path, capsys):
    path = tmp_path / "out.json"

    arguments = ["--model", str(checkpoints("llama")), "--no-async-scheduling"]
    status = main([*THROUGHPUT, *arguments, "--output-json", str(path)])

    shown, found = capsys.readouterr().out, json.loads(path.read_text())
    tokens = found["num_input_tokens"] + found["num_output_tokens"]
    assert status == 0
    assert "8 prompts, 48 tokens in, 32 out" in shown
    assert found["num_requests"] == 8
    assert found["total_num_tokens"] == tokens
    assert found["tokens_per_second"] == pytest.approx(tokens / found["elapsed_time"])
    assert found["requests_per_second"] == pytest.approx(8 / found["elapsed_time"])
    assert 0 < max(found["first_token_seconds"]["values"]) < found["elapsed_time"]
    assert found["engine"]["num_ahead"] == 0
    assert found["engine"]["num_tokens"] >= found["num_input_tokens"]


@pytest.mark.usefixtures("_quick_machine")
def test_a_run_that_compiles_says_so(checkpoints):
    sizes = {"input_len": 6, "output_len": 2, "batch_size": 4, "num_iters": 1}
    model = str(checkpoints("llama"))

    result = measure_latency(model, **sizes, num_iters_warmup=0, llm_options=SMALL)

    assert "counted above" in dict(result.rows())["compiled meanwhile"]
    assert repr(result).startswith("LatencyResult('")


@pytest.mark.slow
def test_startup_runs_processes_and_warm_ones_compile_less(checkpoints, tmp_path, capsys):
    path = tmp_path / "out.json"
    command = ["bench", "startup", "--model", str(checkpoints("llama")), "--input-len", "8"]
    command += ["--num-iters-cold", "1", "--num-iters-warm", "1", "--output-json", str(path)]

    status = main(command)

    shown, found = capsys.readouterr().out, json.loads(path.read_text())
    (cold,), (warm,) = found["cold_starts"], found["warm_starts"]
    assert status == 0
    assert "cold, s to first token" in shown
    assert found["avg_cold_startup_time"] == cold["total"]
    phases = cold["imports"] + cold["construct"] + cold["first_token"]
    assert cold["total"] == pytest.approx(phases)
    assert warm["compile"] < cold["compile"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--batch-size", "0"], "--batch-size 0 must be at least 1."),
        (["latency", "--num-iters", "0"], "--num-iters 0 must be at least 1."),
        (["latency", "--num-iters-warmup", "-1"], "--num-iters-warmup -1 must be at least 0."),
        (["throughput", "--num-prompts", "0"], "--num-prompts 0 must be at least 1."),
        (["throughput", "--num-warmups", "-1"], "--num-warmups -1 must be at least 0."),
        (["throughput", "--random-input-len", "0"], "--input-len 0 must be at least 1."),
        (["startup", "--num-iters-cold", "0"], "--num-iters-warm 3 has no start before it"),
        (
            ["startup", "--num-iters-cold", "0", "--num-iters-warm", "0"],
            "--num-iters-cold 0 and --num-iters-warm 0 leave nothing to measure.",
        ),
        (["latency", "--output-json", "no/such/a.json"], "--output-json 'no/such/a.json' is in"),
        (["latency", "--plot", "a.gif"], "--plot 'a.gif' must end in one of .png, .pdf, .svg."),
        (["latency", "--model", "opt-125"], "did you mean 'opt-125m'?"),
        (["latency", "--model", "opt-125m", "--input-len", "4096"], "max_model_len (4224)"),
    ],
)
def test_a_wrong_option_is_a_sentence(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_child_says_how_long_each_phase_took(checkpoints):
    options = {"load_format": "dummy", "skip_tokenizer_init": True, **SMALL}
    spec = {"model": str(checkpoints("llama")), "llm_options": options, "input_len": 8}

    found = Startup(**startup_child.start({**spec, "born": time.time() - 5}))

    assert found.imports >= 5
    assert found.construct > 0
    assert 0 < found.compile < found.first_token


def test_a_child_that_may_not_start_says_why():
    found = startup_child.start({"model": "./no/such", "llm_options": {}})

    assert "'./no/such' does not exist" in found["error"]


@pytest.mark.slow
def test_a_model_that_may_not_start_is_the_sentence_of_its_process(capsys):
    arguments = ["--model", "./no/such", "--num-iters-cold", "1", "--num-iters-warm", "0"]

    assert main(["bench", "startup", *arguments]) == 2
    assert "jaxllm: Invalid repository ID" in capsys.readouterr().err


def test_a_process_that_ends_without_a_result_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(startup, "CHILD", "tests.bench.no_such_module")
    arguments = ["bench", "startup", "--num-iters-cold", "1", "--num-iters-warm", "0"]

    assert main(arguments) == 2
    assert "ended with status 1 and no result. Its last words:" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert main([*LATENCY, "--plot", "a.png"]) == 2
    assert "pip install 'jaxllm[plot]'" in capsys.readouterr().err


def test_a_plot_is_a_picture_of_its_chart(tmp_path):
    pytest.importorskip("matplotlib")
    chart = Chart("title", "start", "seconds", {"cold": [(1, 3.0), (2, 4.0)]})

    write_plot(chart, str(tmp_path / "a.svg"))

    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_results_are_frozen_and_say_what_they_are():
    start = Startup(imports=1.0, construct=2.0, first_token=3.0, compile=2.5)
    result = StartupResult("demo", 32, cold=(start,), warm=())

    assert repr(result) == "StartupResult('demo', cold 6 s)"
    assert result.chart().lines == {"cold": [(1, 6.0)]}
    assert "warm_starts" not in result.to_json()
    with pytest.raises(AttributeError):
        result.model = "other"


def test_a_machine_shows_its_rates():
    machine = Machine("cpu", "float32", read_bytes_per_s=43e9, flops_per_s=632e9)

    assert str(machine) == "43.0 GB/s, 0.632 TFLOP/s of float32 (1 x cpu)"
