"""On a GPU: tokens of every family against transformers in float32, then times of decoding.

    python benchmarks/check_gpu.py [--json out.json] [--parts start parity qwen3-0.6b llama-3.1-8b]

Parts are added to what the JSON file has, so a run may be made in pieces.

Step times are of dummy bfloat16 weights in the shapes of Qwen3-0.6B and
Llama-3.1-8B with 1,024 tokens of context a row: the median of 50 launches of the
decode program, the wait for its tokens included; beside it the time that reading
the weights and the context once would take at the measured copy bandwidth.
Prefill is held against the measured rate of a large matrix product.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tiny checkpoints of the tests

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.bench.shapes import write_config
from jaxllm.flags import SamplingFlags
from jaxllm.hub import DEMO
from jaxllm.inputs import buffer_size, fields, pack
from jaxllm.programs import ProgramKey

SHAPES = ("qwen3-0.6b", "llama-3.1-8b")
CONTEXT = 1024
PROMPTS = [
    "import os\n",
    "def main():\n",
    "class Parser:\n    def __init__(self",
    "for i in range(",
    "x",
]


def check_parity(folder, prompts, **settings):
    """A checkpoint in float32 here, and in transformers on the host."""
    import torch
    from transformers import AutoModelForCausalLM

    # Its "sdpa" leaves out Gemma's soft cap of scores in some releases.
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    params = SamplingParams(
        temperature=0, max_tokens=64, ignore_eos=True, logprobs=1, prompt_logprobs=0
    )
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 256, **settings}
    with LLM(folder, dtype="float32", use_tqdm_on_load=False, **settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    same, gap = 0, 0.0
    for output in outputs:
        prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens])).logits[0, :-1]
        want = logits.double().log_softmax(-1).numpy()
        same += want[len(prompt) - 1 :].argmax(-1).tolist() == tokens
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        everything = (prompt + tokens)[1:]
        got = [found[t].logprob for t, found in zip(everything, entries, strict=True)]
        gap = max(gap, float(np.abs(want[np.arange(len(everything)), everything] - got).max()))
    return {"prompts": len(prompts), "identical": same, "largest_logprob_gap": gap}


def check_families():
    """Tiny checkpoints of every family, with random weights."""
    from tests.tiny import CONFIGS, random_prompts, tiny_checkpoint

    found = {}
    for family in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = tiny_checkpoint(Path(folder), family)
            prompts = random_prompts(8, 40, seed=1)
            found[family] = check_parity(checkpoint, prompts, skip_tokenizer_init=True)
            print(family, found[family], flush=True)
    return found


def copy_bandwidth():
    """Bytes a second of a device copy, reads and writes counted."""
    x = jnp.zeros((1 << 30,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        y = copy(x)
    y.block_until_ready()
    return 10 * 2 * x.nbytes / (time.perf_counter() - start)


def matmul_rate():
    """Operations a second of a large bfloat16 product."""
    size = 8192
    x = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x, y: x @ y)
    multiply(x, x).block_until_ready()
    start = time.perf_counter()
    for _ in range(20):
        y = multiply(x, x)
    y.block_until_ready()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


FLAGS = {
    "greedy": SamplingFlags(),
    "sampled": SamplingFlags(sampled=True),
    "top-k and top-p": SamplingFlags(sampled=True, top_k=True, top_p=True),
    "penalties": SamplingFlags(penalties=True),
}


def decode_times(llm, rows, steps, bandwidth, choice="greedy"):
    """Times one decode program over rows with CONTEXT tokens each."""
    flags = FLAGS[choice]
    engine = llm._engine
    builder, runner = engine.runner.builder, engine.runner
    page_size = builder.engine.page_size
    width = next(w for w in engine.buckets.widths if w * page_size > CONTEXT + steps)
    bucket = engine.buckets.decode(max(2, rows), width)
    values = {
        name: np.zeros(shape, dtype) for name, (shape, dtype) in fields(bucket, flags).items()
    }
    pages = 1 + np.arange(rows * width).reshape(rows, width) % (builder.num_pages - 1)
    values["rows"][:] = builder.engine.max_num_seqs
    values["rows"][:rows] = np.arange(rows)
    values["page_table"][0, :rows] = pages
    values["kv_lens"][:rows] = CONTEXT
    values["limits"][:rows] = steps
    values["stop_ids"][:] = -1
    values["num_tokens"] += rows
    values["num_decodes"] += rows
    values["temperature"][:] = 0.8 * flags.sampled
    neutral = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    for name, value in neutral.items():
        if name in values:
            values[name][:] = value
    buffer = pack(bucket, flags, values)
    assert buffer.size == buffer_size(bucket, flags)
    key = ProgramKey(bucket, steps, flags)
    runner.fetch(runner.launch(key, buffer))
    seconds = []
    for _ in range(50 if steps == 1 else 10):
        start = time.perf_counter()
        runner.fetch(runner.launch(key, buffer))
        seconds.append((time.perf_counter() - start) / steps)
    token_bytes = sum(spec.elements_per_token() for spec in builder.model.cache_specs) * 2
    ideal = (builder.model.num_bytes + rows * CONTEXT * token_bytes) / bandwidth
    return {
        "rows": rows,
        "steps": steps,
        "choice": choice,
        "ms": 1e3 * statistics.median(seconds),
        "ms_min_max": [1e3 * min(seconds), 1e3 * max(seconds)],
        "ideal_ms": 1e3 * ideal,
        "compile_s": runner.programs.seconds[key],
    }


def prefill_flops(llm, num_tokens):
    """Operations of a prompt: two a weight and token, and the causal half of attention."""
    config, model = llm._plan.config, llm._engine.runner.builder.model
    num_weights = sum(leaf.shape.size for leaf in model.leaves)
    num_weights -= config.vocab_size * config.embed_dim  # looked up, or used for one token
    scores = 2 * num_tokens**2 * config.num_heads * config.head_dim * config.num_layers
    return 2 * num_weights * num_tokens + scores


def prefill_time(llm, num_tokens, rate):
    """Seconds of one prompt of this length and one token, once warm."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=1)
    seconds = []
    for _ in range(4):
        prompt = rng.integers(0, 1000, num_tokens).tolist()
        start = time.perf_counter()
        llm.generate(prompt, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    best = statistics.median(seconds[1:])
    share = prefill_flops(llm, num_tokens) / rate / best
    return {"tokens": num_tokens, "s": best, "first_s": seconds[0], "matmul_share": share}


WAYS = {
    "one step, in turn": (1, False),
    "one step, overlapping": (1, True),
    "up to 32 steps": (32, True),
}
"""Steps a launch may have, and whether the next one is launched before it is done."""


def generation_rates(llm, rows, num_new=128):
    """Output tokens a second of whole calls, in alternation, and the host's time a step."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    engine = llm._engine
    rates, host = {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for _ in range(4):
        for way, (steps, overlaps) in WAYS.items():
            engine.config = engine.scheduler.config = dataclasses.replace(
                engine.config, max_decode_steps=steps, async_scheduling=overlaps
            )
            prompts = [rng.integers(0, 1000, 128).tolist() for _ in range(rows)]
            before, start = dataclasses.replace(engine.stats), time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            rates[way].append(rows * num_new / (time.perf_counter() - start))
            num_steps = engine.stats.num_steps - before.num_steps
            host[way].append((engine.stats.host_seconds - before.host_seconds) / num_steps)
    return {
        "rows": rows,
        "tokens_per_s": {way: statistics.median(found[1:]) for way, found in rates.items()},
        "min_max": {way: [min(found[1:]), max(found[1:])] for way, found in rates.items()},
        "host_ms_a_step": {way: 1e3 * statistics.median(t[1:]) for way, t in host.items()},
    }


START = """
import time
start = time.perf_counter()
import sys
from jaxllm import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
          max_model_len=8192, max_num_seqs=64, use_tqdm_on_load=False)
built = time.perf_counter() - start
llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
print(built, time.perf_counter() - start)
"""


def start_times(shape):
    """Seconds from imports to a model and to its first token: nothing compiled, then all."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_config(shape, Path(folder))
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", START, folder],
                env={**os.environ, "JAXLLM_CACHE_ROOT": f"{folder}/cache"},
                cwd=Path(__file__).parent.parent,
                check=True,
                capture_output=True,
                text=True,
            )
            built, first = map(float, done.stdout.split())
            found[name] = {"construct_s": built, "first_token_s": first}
    return found


def time_model(shape):
    rows, bandwidth, rate = [], copy_bandwidth(), matmul_rate()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, matmul {rate / 1e12:.0f} TF/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_config(shape, Path(folder))
        start = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=8192,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
        )
        built = time.perf_counter() - start
        with llm:
            for batch, steps in ((1, 1), (8, 1), (64, 1), (1, 8), (64, 8)):
                rows.append(decode_times(llm, batch, steps, bandwidth))
                print(shape, rows[-1], flush=True)
            for choice in list(FLAGS)[1:]:
                rows.append(decode_times(llm, 64, 1, bandwidth, choice))
                print(shape, rows[-1], flush=True)
            prefill = prefill_time(llm, 4096, rate)
            print(shape, prefill, flush=True)
            rates = [generation_rates(llm, batch) for batch in (1, 64)]
            print(shape, rates, flush=True)
    return {
        "copy_bandwidth": bandwidth,
        "matmul_rate": rate,
        "construct_s": built,
        "decode": rows,
        "prefill": prefill,
        "generation": rates,
    }


PARTS = ("start", "parity", *SHAPES)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to add every figure")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    args = parser.parse_args()
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if "start" in args.parts:
        # Before this process takes the card's memory, which its children need.
        found["start"] = start_times("qwen3-0.6b")
    found |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if "parity" in args.parts:
        found["parity"] = check_parity(DEMO, PROMPTS)
        print(found, flush=True)
        found["families"] = check_families()
    for shape in SHAPES:
        if shape in args.parts:
            found[shape] = time_model(shape)
        if args.json:  # each time: a run may be cut off
            args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
