"""What `benchmarks/beside_peers.py` makes of the figures of its processes."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "beside_peers.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("beside_peers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(engine, dtype="float32", ids=None, **figures):
    made = {"engine": engine, "shape": "opt-125m", "dtype": dtype, "figures": figures}
    return made if ids is None else {**made, "ids": ids}


def test_a_ratio_above_one_means_that_we_are_better(script):
    assert script.better_by("batch_tok_s", 30.0, 10.0) == 3
    assert script.better_by("warm_s", 2.0, 10.0) == 5
    assert script.better_by("rss_gib", 4.0, 2.0) == 0.5


def test_figures_are_medians_over_rounds(script):
    records = [record("vllm", warm_s=s) for s in (3.0, 1.0, 2.0)]

    found = script.medians(records, "vllm", "opt-125m", "float32")

    assert found == {"warm_s": (2.0, 1.0, 3.0, 3)}
    assert script.cell(found["warm_s"]) == "2.00 (1.00..3.00)"


def test_the_report_has_ratios_the_best_types_and_equal_tokens(script, capsys):
    ids = [[1, 2], [3, 4]]
    records = [
        record("jaxllm", batch_tok_s=20.0, ids=ids),
        record("jaxllm", "bfloat16", batch_tok_s=10.0),
        record("vllm", batch_tok_s=10.0, ids=[[1, 2], [3, 5]]),
        record("vllm", "bfloat16", batch_tok_s=40.0),
    ]

    script.report(records)

    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("| batch_tok_s")]
    assert [row.split(" | ")[-1] for row in rows] == ["2.00x |", "0.25x |", "0.50x |"]
    assert "vllm 1 of 2 prompts." in shown


def test_no_part_prints_what_the_file_has(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps([record("jaxllm", cold_s=5.0)]))

    done = subprocess.run(
        [sys.executable, SCRIPT, "--parts", "--json", path],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "| cold_s | 5.00 |" in done.stdout


def test_an_engine_without_its_python_is_a_sentence():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--engines", "vllm"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "--vllm-python is None. Give the path of one" in done.stderr


FAKE = """
import json, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
started = {"versions": {}, "constructor_s": 1.0, "process_s": 2.0}
print("RESULT", json.dumps({**started, "pids": [os.getpid(), child.pid]}), flush=True)
with open(__file__ + ".pids", "w") as file:
    print(os.getpid(), child.pid, file=file)
for line in sys.stdin:
    print("RESULT", '{"decode_tok_s": 1.0}', flush=True)
"""


@pytest.fixture
def python(tmp_path):
    """Stands in for a python with an engine: answers whatever it is asked."""
    fake = tmp_path / "engine.py"
    fake.write_text(FAKE)
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {fake}\n")
    path.chmod(0o755)
    return str(path)


def is_running(pid):
    try:
        return state(pid) != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until_gone(pids):
    # A process that was killed ends a moment later, and nobody waits for a child's child.
    end = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_until_stopped(pids):
    end = time.monotonic() + 60
    while [state(pid) for pid in pids] != ["T", "T"]:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_an_engine_is_stopped_between_its_turns_and_leaves_no_process(script, python, tmp_path):
    spec = {"shape": "opt-125m", "dtype": "float32"}

    with script.Worker("vllm", python, spec, tmp_path) as worker:
        pids = worker.started["pids"]
        worker.stop()
        wait_until_stopped(pids)
        assert worker.measure(0)["figures"] == {"decode_tok_s": 1.0}
        wait_until_stopped(pids)

    wait_until_gone(pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_run_that_is_ended_leaves_no_engine(python, tmp_path):
    model = tmp_path / "models" / "opt-125m"
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    command = f"--engines vllm --vllm-python {python} --shapes opt-125m --dtypes float32"
    command += f" --parts rounds --rounds 1000000 --work {tmp_path}"
    run = subprocess.Popen([sys.executable, SCRIPT, *command.split()], stdout=subprocess.PIPE)
    for _ in range(2):  # of its start, and of a round
        assert b"vllm opt-125m float32" in run.stdout.readline()
    pids = [int(pid) for pid in (tmp_path / "engine.py.pids").read_text().split()]
    assert all(map(is_running, pids))

    run.terminate()
    run.communicate(timeout=60)

    assert run.returncode == 143
    wait_until_gone(pids)


def test_an_engine_that_fails_is_a_sentence_with_its_last_words(script, tmp_path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    path.chmod(0o755)

    with pytest.raises(SystemExit, match=r"vllm failed:\nno such module"):
        script.Worker("vllm", str(path), {"shape": "", "dtype": ""}, tmp_path)


def test_prompts_are_those_of_the_seed(script):
    one, other = (script.prompts(64, 32, 256, seed) for seed in (1, 2))

    assert one == script.prompts(64, 32, 256, 1)
    assert one != other
    assert {min(map(len, one)) >= 32, max(map(len, one)) <= 256} == {True}
