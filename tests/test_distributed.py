"""Several processes with one model: the same tokens as one, and errors in place of hangs.

Two processes of two devices each, over gloo; `tests/processes.py` is what they run.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from jaxllm import LLM, ConfigError, DistributedError, distributed
from tests import processes, xla
from tests.processes import HAPPENED

ROOT = Path(__file__).parent.parent
MODEL = {"vocab_size": 104, "num_key_value_heads": 4}
HEARTBEAT = 3
"""Seconds: a process that is killed is noticed after them, by JAX after 9."""

LOOK = 0.1
"""Seconds between two looks at whether a process has ended."""

SLOW = pytest.mark.slow
ALLOWED = 300
"""Seconds for a scenario, far more than it takes: two processes compile on a busy machine."""


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str
    seconds: float
    """Since something went wrong, or since the start."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(*args):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(2)}
    env["JAXLLM_LOGGING_LEVEL"] = "INFO"
    command = [sys.executable, "-m", "tests.processes", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, **pipes)


def run(scenario, folder):
    """Both processes of a scenario, when they have ended."""
    address, begin = f"localhost:{free_port()}", time.time()
    both = [start(scenario, folder, address, me, HEARTBEAT) for me in range(2)]
    at = [begin, begin]
    try:
        while any(process.poll() is None for process in both):
            now = time.time()
            assert now - begin < ALLOWED, (
                f"{scenario}: {[p.poll() for p in both]} after {ALLOWED} s"
            )
            at = [now if p.poll() is None else old for old, p in zip(at, both, strict=True)]
            time.sleep(LOOK)
    finally:
        for process in both:
            process.kill()
        said = [process.communicate() for process in both]
    lines = [line for out, _ in said for line in out.splitlines()]
    marks = [float(x.removeprefix(HAPPENED)) for x in lines if x.startswith(HAPPENED)]
    since = max(marks, default=begin)
    return [
        Ended(process.returncode, *texts, ended - since)
        for process, texts, ended in zip(both, said, at, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llama", **MODEL)


@SLOW
def test_two_processes_give_the_tokens_of_one(folder):
    ended = run("same", folder)

    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    first, second = (json.loads(one.out.splitlines()[-1]) for one in ended)
    with LLM(folder, **processes.SMALL) as llm:
        want = processes.generate(llm)
    assert first["tokens"] == want["tokens"]
    assert first["streamed"] == want["streamed"]
    assert first["scores"] == pytest.approx(want["scores"], abs=1e-3)
    assert min(first["preemptions"], first["ahead"]) > 0
    shared = {"tokens", "streamed", "scores", "preemptions", "ahead", "pages", "least_pages"}
    assert {k: first[k] for k in shared} == {k: second[k] for k in shared}
    # Each reads its half of what is split, and of it nothing else.
    assert first["read"] == second["read"] == first["split"] // 2
    assert "jaxllm: process 0 of 2" in ended[0].err
    assert "tensor" not in ended[1].err
    assert "jaxllm:" not in ended[1].err
    assert "data_parallel_size=2 would spread engines" in first["refused"][0]
    assert "All 2 devices of the model are of process 0" in second["refused"][2]
    assert "warmup='background' is for a model in one process" in first["refused"][1]


@SLOW
def test_what_two_processes_save_is_loaded_by_two_and_by_one(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("llama", **MODEL), tmp_path / "original")
    ended = run("saves", folder)

    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    first, second = (json.loads(one.out.splitlines()[-1]) for one in ended)
    with LLM(folder, **processes.SMALL) as llm:
        want = processes.generate(llm)
    with LLM(tmp_path / "saved", **processes.SMALL) as llm:
        assert processes.generate(llm)["tokens"] == want["tokens"]
    assert first["tokens"] == second["tokens"] == want["tokens"]
    assert first["read"] == second["read"] == first["split"] // 2
    for said in (first["said"], second["said"]):
        assert said[0].startswith("CheckpointError: ")
        assert "saved' is not empty" in said[0]
        assert "Process 1 does not see" in said[1]
        assert "save to a folder that all hosts share" in said[1].lower()
        assert "alone, in a job of 2, and such arrays cannot be written" in said[2]
        assert said[3].startswith("DistributedError: ")
        assert "other-0' here" in said[3] or "other-1' here" in said[3]
    assert {path.name for path in tmp_path.iterdir()} == {"original", "saved"}


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("prompts_differ", "event 3 is 'call with 2 requests, 2 of them new; "),
        pytest.param("plans_differ", "do not do the same: event", marks=SLOW),
        pytest.param("interrupted", "'end a call by KeyboardInterrupt' there", marks=SLOW),
        pytest.param("leaves", "Process 1 has ended its script, and process 0", marks=SLOW),
    ],
)
def test_processes_that_do_not_do_the_same_end_with_an_error_that_says_so(folder, scenario, said):
    ended = run(scenario, folder)

    assert all(one.code != 0 for one in ended)
    assert said in ended[0].err
    assert "DistributedError" in ended[0].err
    assert all(one.seconds < 60 for one in ended)


@SLOW
def test_when_one_process_dies_the_other_raises_an_error_that_says_so(folder):
    survivor, dead = run("one_dies", folder)

    assert dead.code == -signal.SIGKILL
    assert survivor.code != 0
    assert "DistributedError: Process 1 has not been heard of for 3 s" in survivor.err
    assert survivor.seconds < 60


@SLOW
def test_when_process_0_dies_the_other_ends_with_an_error_that_says_so(folder):
    dead, survivor = run("first_dies", folder)

    assert dead.code == -signal.SIGKILL
    assert survivor.code != 0
    assert "another task died" in survivor.err or "cannot reach process 0" in survivor.err
    assert survivor.seconds < 60


def test_the_job_is_joined_once_and_in_time(folder):
    process = start("joining", folder, f"localhost:{free_port()}", 0, HEARTBEAT)
    out, err = process.communicate(timeout=ALLOWED)

    assert process.returncode == 0, err
    none, lonely, twice = json.loads(out.splitlines()[-1])
    assert none.startswith("No cluster was found that tells the missing arguments")
    assert "coordinator_address='host:port' of process 0" in none
    assert "This process has joined a job already" in twice
    assert lonely is None


def test_joining_after_jax_has_started_is_too_late():
    jax.devices()

    with pytest.raises(DistributedError, match=r"came too late.*before LLM"):
        distributed.initialize("localhost:1234", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"coordinator_address": "node1"}, "'node1' must be 'host:port' of process 0"),
        ({"coordinator_address": "http://node1:80"}, "must be 'host:port'"),
        ({"coordinator_address": "node1:99999"}, "must be 'host:port'"),
        ({"coordinator_address": 1234}, "coordinator_address=1234 must be 'host:port'"),
        ({"num_processes": 0}, "num_processes=0 must be a whole number of at least 1"),
        ({"num_processes": "2"}, "num_processes='2' must be a whole number"),
        ({"process_id": -1}, "process_id=-1 must be a whole number of at least 0"),
        ({"num_processes": 2, "process_id": 2}, "ids are from 0 to 1"),
        ({"heartbeat_timeout_seconds": 1}, "heartbeat_timeout_seconds=1 must be .* at least 2"),
        ({"initialization_timeout": 0}, "initialization_timeout=0 must be"),
    ],
)
def test_a_wrong_argument_of_initialize_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        distributed.initialize(**arguments)
