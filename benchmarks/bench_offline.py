"""jaxllm beside transformers' `generate`, in one alternating run, each in fresh processes.

    python benchmarks/bench_offline.py [--rounds 5] [--dtype float32] [--json out.json]

The model has the shape of SmolLM2-135M and random weights. Every worker measures

    first_token_s   from before its imports to the first token of a 32-token prompt
    decode_tok_s    one stream: 128 tokens after a 32-token prompt, first token taken off
    prefill_tok_s   a 512-token prompt and one token
    batch_tok_s     64 prompts of 32..256 tokens, 64 greedy tokens each: output tokens a second
    rss_gib         most memory the process had

once warm, but for the first. Compilation counts in `first_token_s` only. Ratios
are of medians; the spread is the smallest and largest round.
"""

import time

START = time.perf_counter()

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": None,
    "eos_token_id": None,
}
FIGURES = ("first_token_s", "decode_tok_s", "prefill_tok_s", "batch_tok_s", "rss_gib")
LOWER_IS_BETTER = ("first_token_s", "rss_gib")


def write_model(folder):
    """Writes the checkpoint, without torch."""
    import numpy as np
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    from jaxllm.demo.export import to_checkpoint
    from jaxllm.modeling import registry
    from jaxllm.modeling.abstract import abstract_model
    from jaxllm.sharding.apply import Sharder
    from jaxllm.sharding.layouts import preset
    from jaxllm.sharding.mesh import make_mesh

    config = LlamaConfig(**SHAPE)
    config.save_pretrained(folder)
    _, family = registry.family_of(config)
    layout = preset("replicated")
    sharder = Sharder(layout, make_mesh(layout))
    model = abstract_model(registry.model_config(config, family), family.build, "float32", sharder)
    rng = np.random.default_rng(0)
    params = [
        np.ones(leaf.shape.shape, np.float32)
        if leaf.path.endswith("scale")
        else rng.standard_normal(leaf.shape.shape, np.float32) * np.float32(0.04)
        for leaf in model.leaves
    ]
    tensors = to_checkpoint(model, params, family.WEIGHTS)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def prompts(count, low, high, seed):
    rng = random.Random(seed)
    return [[rng.randrange(10, 49000) for _ in range(rng.randint(low, high))] for _ in range(count)]


def jaxllm_generate(folder, dtype):
    from jaxllm import LLM, SamplingParams

    llm = LLM(folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=1024)

    def generate(batch, num_tokens):
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return [o.outputs[0].token_ids for o in llm.generate(batch, params, use_tqdm=False)]

    return generate


def transformers_generate(folder, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

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


ENGINES = {"jaxllm": jaxllm_generate, "transformers": transformers_generate}


def work(engine, folder, dtype):
    """Measures one engine in this process and prints the figures."""
    generate = ENGINES[engine](folder, dtype)
    generate(prompts(1, 32, 32, 1), 1)
    figures = {"first_token_s": time.perf_counter() - START}

    def timed(batch, num_tokens):
        start = time.perf_counter()
        out = generate(batch, num_tokens)
        assert all(len(tokens) == num_tokens for tokens in out)
        return time.perf_counter() - start

    # Each time other prompts: a prefix that is found again would be no work.
    generate(prompts(1, 32, 32, 2), 128)
    alone, first = timed(prompts(1, 32, 32, 6), 128), timed(prompts(1, 32, 32, 7), 1)
    figures["decode_tok_s"] = 127 / (alone - first)
    generate(prompts(1, 512, 512, 3), 1)
    figures["prefill_tok_s"] = 512 / timed(prompts(1, 512, 512, 8), 1)
    # transformers compiles nothing, so a few tokens warm it.
    generate(prompts(64, 32, 256, 4), 64 if engine == "jaxllm" else 4)
    figures["batch_tok_s"] = 64 * 64 / timed(prompts(64, 32, 256, 5), 64)
    figures["rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps(figures), flush=True)


def run_worker(engine, folder, dtype):
    command = [sys.executable, __file__, "--worker", engine, "--model", folder, "--dtype", dtype]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "JAXLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{engine} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[0][len("RESULT ") :])


def report(rows):
    print(f"{'figure':16} {'jaxllm':>26} {'transformers':>26} {'better by':>10}")
    for figure in FIGURES:
        cells, medians = [], {}
        for engine in ENGINES:
            values = [row[figure] for row in rows[engine]]
            medians[engine] = statistics.median(values)
            cells.append(f"{medians[engine]:.2f} ({min(values):.2f}..{max(values):.2f})")
        ratio = medians["jaxllm"] / medians["transformers"]
        ratio = 1 / ratio if figure in LOWER_IS_BETTER else ratio
        print(f"{figure:16} {cells[0]:>26} {cells[1]:>26} {ratio:>9.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", help="where to write every figure")
    parser.add_argument("--model", help="a folder written by an earlier run")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model, args.dtype)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or made
        if not args.model:
            write_model(folder)
        rows = {engine: [] for engine in ENGINES}
        for i in range(args.rounds):
            for engine in ENGINES:
                rows[engine].append(run_worker(engine, folder, args.dtype))
                print(f"round {i + 1} {engine}: {rows[engine][-1]}", flush=True)
    report(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
