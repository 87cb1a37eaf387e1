"""On a GPU: tokens of every family against transformers in float32, then times of decoding.

    python benchmarks/check_gpu.py [--json out.json] [--skip-llama]

Step times are of dummy bfloat16 weights in the shapes of Qwen3-0.6B and
Llama-3.1-8B with 1,024 tokens of context a row: the median of 50 launches of the
decode program, the wait for its tokens included; beside it the time that reading
the weights and the context once would take at the measured copy bandwidth.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tiny checkpoints of the tests

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.flags import SamplingFlags
from jaxllm.hub import DEMO
from jaxllm.inputs import buffer_size, fields, pack
from jaxllm.programs import ProgramKey

SHAPES = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}
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


def prefill_time(llm, num_tokens):
    """Seconds of one prompt of this length and one token, once warm."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=1)
    seconds = []
    for _ in range(4):
        prompt = rng.integers(0, 1000, num_tokens).tolist()
        start = time.perf_counter()
        llm.generate(prompt, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return {"tokens": num_tokens, "s": statistics.median(seconds[1:]), "first_s": seconds[0]}


def generation_rates(llm, rows, num_new=128):
    """Output tokens a second of whole calls, one step a launch and up to 32, in alternation."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    scheduler = llm._engine.scheduler
    rates = {1: [], 32: []}
    for _ in range(4):
        for steps, found in rates.items():
            scheduler.config = dataclasses.replace(scheduler.config, max_decode_steps=steps)
            prompts = [rng.integers(0, 1000, 128).tolist() for _ in range(rows)]
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            found.append(rows * num_new / (time.perf_counter() - start))
    return {
        "rows": rows,
        "tokens_per_s": {steps: statistics.median(found[1:]) for steps, found in rates.items()},
        "min_max": {steps: [min(found[1:]), max(found[1:])] for steps, found in rates.items()},
    }


def time_model(shape, bandwidth):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
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
            prefill = prefill_time(llm, 4096)
            print(shape, prefill, flush=True)
            rates = [generation_rates(llm, batch) for batch in (1, 64)]
            print(shape, rates, flush=True)
    return {"construct_s": built, "decode": rows, "prefill": prefill, "generation": rates}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write every figure")
    parser.add_argument("--skip-llama", action="store_true", help="leave the 8B shape out")
    args = parser.parse_args()
    found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    found["parity"] = check_parity(DEMO, PROMPTS)
    print(found, flush=True)
    found["families"] = check_families()
    found["copy_bandwidth"] = copy_bandwidth()
    print(f"copy {found['copy_bandwidth'] / 1e12:.2f} TB/s", flush=True)
    for shape in SHAPES:
        if args.skip_llama and shape.startswith("llama"):
            continue
        found[shape] = time_model(shape, found["copy_bandwidth"])
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
