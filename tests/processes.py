"""What each process of a job runs in `test_distributed.py`: `python -m tests.processes ...`.

A scenario prints JSON on its last line. Two processes of two devices each; the model is split
over all four.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

import jaxllm
from jaxllm import LLM, ConfigError, JaxLLMError, SamplingParams, devices
from jaxllm.modeling import checkpoint
from jaxllm.modeling.weights import Source
from tests.tiny import random_prompts

HAPPENED = "happened at "
"""Before the time at which something goes wrong, on a line of its own."""

SMALL = {
    "max_model_len": 48,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "num_gpu_blocks_override": 6,
    "block_size": 8,
    "skip_tokenizer_init": True,
    "use_tqdm_on_load": False,
}
"""Chunks, waiting sequences and preemptions."""

PROMPTS = random_prompts(4, 20, seed=3, shortest=10)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=16),
    SamplingParams(temperature=1.0, max_tokens=16),
    SamplingParams(temperature=0.8, seed=7, max_tokens=12, n=2, logprobs=1),
    SamplingParams(temperature=0.7, frequency_penalty=0.5, logprobs=1, max_tokens=8),
]
"""Greedy and sampled, with seeds and without, and with counts of tokens on the devices."""


def tokens_of(outputs):
    return [[list(c.token_ids) for c in output.outputs] for output in outputs]


def generate(llm):
    """All that differs between calls: batches, and a stream, and scores."""
    first = tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    streamed = [tokens_of([output]) for output in llm.stream(PROMPTS[:2], PARAMS[:2])][-2:]
    scores = llm.score_completions(PROMPTS[0], PROMPTS[1:2], use_tqdm=False)
    return {
        "tokens": first,
        "streamed": streamed,
        "scores": [score.total for score in scores],
        "preemptions": llm.stats()["num_preemptions"],
        "ahead": llm.stats()["num_ahead"],
    }


def load(folder, **options):
    return LLM(folder, **{**SMALL, "tensor_parallel_size": jax.device_count(), **options})


def same(folder, me):
    """The whole of it, and how much of the checkpoint was read."""
    read = []
    whole = Source.read

    def counted(source, index, zeros):
        shard = whole(source, index, zeros)
        read.append((source.leaf.path, str(index), shard.nbytes))
        return shard

    Source.read = counted
    llm = load(folder)
    shards = set(read)
    split = {leaf.path: leaf.num_bytes for leaf in llm._plan.model.leaves if is_split(leaf)}
    return {
        **generate(llm),
        "pages": llm.stats()["num_pages"],
        "split": sum(split.values()),
        "read": sum(size for path, _, size in shards if path in split),
        "least_pages": pages_where_memory_differs(folder, me),
        "refused": refused(folder, me),
        "compiled": len(llm.stats()["compile_seconds"]),
    }


def pages_where_memory_differs(folder, me):
    """Process 1 has less."""
    devices.memory_limit = lambda device, fraction: (1 << 28) - (me << 22)
    with load(folder, num_gpu_blocks_override=None, gpu_memory_utilization=0.5) as llm:
        return llm.stats()["num_pages"]


def refused(folder, me):
    """What is said of what several processes cannot do."""
    tries = [
        {"tensor_parallel_size": 2, "data_parallel_size": 2},
        {"warmup": "background"},
        *([{"tensor_parallel_size": 2}] if me == 1 else []),
    ]
    said = []
    for options in tries:
        try:
            load(folder, **options)
        except ConfigError as error:
            said.append(str(error))
    return said


def is_split(leaf):
    return not leaf.shape.sharding.is_fully_replicated


def saves(folder, me):
    """Saved by both together, loaded by both; saved by each for itself; and what is refused."""
    target = folder.with_name("saved")
    with load(folder) as llm:
        llm.save(target)
        said = [refusal(llm, target)]
        is_dir = Path.is_dir
        Path.is_dir = is_dir if me == 0 else lambda path: False
        said.append(refusal(llm, folder.with_name("unseen")))
        Path.is_dir = is_dir

    read, whole = {}, checkpoint._read

    def counted(place, leaf, context):
        array = whole(place, leaf, context)
        read[leaf.path] = {str(s.index): s.data.nbytes for s in array.addressable_shards}
        return array

    checkpoint._read = counted
    llm = load(target)
    found = {
        **generate(llm),
        "split": sum(leaf.num_bytes for leaf in llm._plan.model.leaves if is_split(leaf)),
        "read": sum(sum(shards.values()) for shards in read.values() if len(shards) > 1),
    }
    own = {"tensor_parallel_size": 1, "devices": jax.local_devices()[:1]}
    with load(folder, **own) as alone:
        said.append(refusal(alone, folder.with_name(f"own-{me}")))
    said.append(refusal(llm, folder.with_name(f"other-{me}")))
    return {**found, "said": said}


def refusal(llm, where):
    try:
        llm.save(where)
    except JaxLLMError as error:
        return f"{type(error).__name__}: {error}"


def now_it_happens():
    """Tells the test when that is, from which the others have a bounded time."""
    sys.stdout.write(f"{HAPPENED}{time.time()}\n")
    sys.stdout.flush()


def prompts_differ(folder, me):
    llm = load(folder)
    now_it_happens()
    llm.generate([[1 + me], [2]], use_tqdm=False)


def plans_differ(folder, me):
    """One process drops a request in the middle of a call."""
    llm = load(folder)
    for i, _ in enumerate(llm.stream(PROMPTS[:2], PARAMS[:2])):
        if i == 5 and me == 1:
            now_it_happens()
            llm._engine.abort_later(["0"])


def interrupted(folder, me):
    """Ctrl-C in one process, in the middle of a call."""
    llm = load(folder)
    engine = llm._engine
    step, steps = engine.step, iter(range(1000))

    def step_or_interrupt():
        if next(steps) == 5 and me == 1:
            now_it_happens()
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    engine.step = step_or_interrupt
    llm.generate(PROMPTS[:2], PARAMS[:2], use_tqdm=False)


def leaves(folder, me):
    """An error in the script of one process, between two steps of a stream."""
    llm = load(folder)
    for i, _ in enumerate(llm.stream(PROMPTS[:2], PARAMS[:2])):
        if i == 5 and me == 1:
            now_it_happens()
            raise ZeroDivisionError


def one_dies(folder, me, *, who=1):
    llm = load(folder)
    for i, _ in enumerate(llm.stream(PROMPTS[:2], PARAMS[:2])):
        if i == 5 and me == who:
            now_it_happens()
            os.kill(os.getpid(), signal.SIGKILL)


def first_dies(folder, me):
    one_dies(folder, me, who=0)


SCENARIOS = (
    same,
    saves,
    prompts_differ,
    plans_differ,
    interrupted,
    leaves,
    one_dies,
    first_dies,
)


def join(address, num_processes, me, heartbeat):
    jaxllm.distributed.initialize(
        address,
        num_processes,
        me,
        heartbeat_timeout_seconds=heartbeat,
        initialization_timeout=60,
    )


def joining(address, heartbeat):
    """What a process is told that joins a job nobody tells it of, or joins it twice."""
    said = []
    for arguments in ((None, None, None), (address, 1, 0), (address, 1, 0)):
        try:
            said.append(join(*arguments, heartbeat))
        except JaxLLMError as error:
            said.append(str(error))
    return said


def main(name, folder, address, me, heartbeat):
    if name == "joining":
        return joining(address, int(heartbeat))
    join(address, 2, int(me), int(heartbeat))
    scenario = next(one for one in SCENARIOS if one.__name__ == name)
    return scenario(Path(folder), int(me))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
