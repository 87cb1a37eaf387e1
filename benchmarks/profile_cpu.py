"""Where the time of a decode step goes on CPU: the operations that XLA runs, by kind.

    JAX_PLATFORMS=cpu python benchmarks/profile_cpu.py [--shape smollm2-135m] [--dtype float32]

64 prompts of 32..256 random ids (those of `beside_peers.py`), random weights; some steps in which
all are decoded are traced, none launched ahead. `jaxllm_paged_attention` and `jaxllm_linear`, the
products with the weights, are compiled kernels; with `JAXLLM_NATIVE=0`, operations that ran
several times a step are in attention's loops, and the other products are those with the weights.
Times are what the threads that ran them took, of a kernel that of its caller; a loop's own line
is left out, as it holds others.
Then the memory of this process (Linux), and how long each program took to compile.
"""

import argparse
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAXLLM_LOGGING_LEVEL", "WARNING")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import jax
from beside_peers import BATCH, KV_CACHE_GIB, OUTPUT_LEN, prompts

from jaxllm import LLM, SamplingParams
from jaxllm.bench.shapes import SHAPES, model_folder

TRACED = 8
"""Steps."""

HOLDERS = ("while", "call", "conditional", "ThunkExecutor", "Pj", "Slinky", "np.asarray")
"""What holds other operations, or waits for them."""


def decode(llm, seed, on_step):
    """Runs the prompts; calls `on_step(seconds)` after each step that decoded all of them."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    requests = llm._requests(prompts(BATCH, 32, 256, seed), params, None, on_error="raise")
    engine = llm._live_engine()
    with engine.call(requests):
        while not all(request.is_finished for request in requests):
            is_decode = all(request.sequences[0].output_token_ids for request in requests)
            start = time.perf_counter()
            engine.step()
            if is_decode:
                on_step(time.perf_counter() - start)


def kernels(llm):
    """Returns {operation: name of a kernel of ours} of the program that decodes all rows."""
    text = llm.inspect("decode", batch=BATCH).hlo
    found = re.findall(r"%(\S+) = .*custom_call_target=\"(jaxllm_[a-z_]+)_[a-z]+\d+_\w+\"", text)
    return dict(found)


def traced(llm, folder):
    """Returns {operation: (runs, seconds)} of all traced steps together."""
    count = 0

    def on_step(_):
        nonlocal count
        count += 1
        if count == TRACED:
            jax.profiler.start_trace(folder)
        elif count == 2 * TRACED:
            jax.profiler.stop_trace()

    decode(llm, 61, on_step)
    (path,) = Path(folder).rglob("*.xplane.pb")
    runs, seconds = Counter(), Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                # "$" begins the name of a Python function.
                if not event.name.startswith(("$", *HOLDERS)):
                    runs[event.name] += 1
                    seconds[event.name] += event.duration_ns / 1e9
    return {name: (runs[name], seconds[name]) for name in runs}


def table(found, median, ours):
    """Prints milliseconds a step of each kind, in loops and outside; the small ones together."""
    kinds = Counter()
    for name, (runs, seconds) in found.items():
        kind = ours.get(name) or re.sub(r"[.\d]+$", "", name)
        kinds[kind, "in loops" if runs > 1.5 * TRACED else "outside"] += 1e3 * seconds / TRACED
    print(f"A step takes {1e3 * median:.0f} ms (median, untraced). Thread milliseconds of it:\n")
    print("| operation | where | ms a step |\n|---|---|---|")
    rest = 0.0
    for (kind, where), ms in kinds.most_common():
        if ms >= 0.01 * 1e3 * median:
            print(f"| {kind} | {where} | {ms:.0f} |")
        else:
            rest += ms
    print(f"| all others | | {rest:.0f} |")


def resident():
    """Returns GiB of this process's memory, its own and that of files; NaN but on Linux."""
    path = Path("/proc/self/status")
    if not path.exists():
        return math.nan, math.nan
    status = dict(line.split(":") for line in path.read_text().splitlines())
    return tuple(int(status[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))


def table_of_memory(found):
    """Prints what was resident when."""
    print("\n| memory, GiB | its own | of files |\n|---|---|---|")
    for when, (own, files) in found.items():
        print(f"| {when} | {own:.2f} | {files:.2f} |")


def table_of_programs(programs):
    """Prints how long each program took; little where the compile cache had it."""
    print(f"\n{programs.counts.num_disk_hits} of {len(programs)} programs were in the cache.\n")
    print("| program | traced and compiled in, s |\n|---|---|")
    for key, seconds in programs.seconds.items():
        print(f"| {key} | {seconds:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    memory = {"after imports": resident()}
    with model_folder(args.shape) as folder:
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=args.dtype,
            max_model_len=1024,
            max_num_seqs=BATCH,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=KV_CACHE_GIB << 30,
            enable_prefix_caching=False,
            async_scheduling=False,
            use_tqdm_on_load=False,
        )
    with llm, tempfile.TemporaryDirectory(prefix="jaxllm-profile-") as folder:
        memory["with the model"] = resident()
        decode(llm, 50, lambda _: None)  # compiles
        steps = []
        decode(llm, 60, steps.append)
        memory["after two batches"] = resident()
        table(traced(llm, folder), statistics.median(steps), kernels(llm))
        table_of_memory(memory)
        table_of_programs(llm._live_engine().runner.programs)


if __name__ == "__main__":
    main()
