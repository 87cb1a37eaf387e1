"""Is a model the same under every layout here, and did the plan say what it would take?

    python benchmarks/layout_parity.py [--json out.json] [--devices 8]

runs a Llama of two layers with random float32 weights under each layout over 1, 2, 4 and 8
devices (CPU devices are made, where JAX runs on CPU), and compares with one device: greedy
tokens, and the log-probabilities of all tokens, prompts included. Beside it is what `plan` said
of the bytes of weights on a device and of the tokens that the cache holds, against what the load
then took. It fails where tokens differ or a plan was off by more than a hundredth.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


def arguments():
    """The command line, which is read before JAX starts."""
    parser = argparse.ArgumentParser(description="Layouts against one device, and their plans.")
    parser.add_argument("--devices", type=int, default=8, help="the most to use (default 8)")
    parser.add_argument("--json", type=Path, help="file for every figure")
    return parser.parse_args()


ARGS = arguments()
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={ARGS.devices}")
os.environ.setdefault("JAXLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.replicas import engines_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1001,  # which no number of devices divides: padded
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,  # fewer than eight devices: copied
    "max_position_embeddings": 256,
}
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # prompts come in chunks
    "kv_cache_memory_bytes": 1 << 21,
    "block_size": 16,
}
ONE_MODEL = ("replicated", "tensor", "tensor_replicated_vocab", "tensor_2d", "sequence")
GREEDY = SamplingParams(
    temperature=0, max_tokens=24, ignore_eos=True, logprobs=1, prompt_logprobs=0
)
NUM_PROMPTS = 16


def layouts(most):
    """(layout, tensor, data) of each row; the first is what the others are compared with."""
    sizes = [size for size in (1, 2, 4, 8) if size <= most]
    yield "replicated", 1, 1
    for size in sizes[1:]:
        for name in ONE_MODEL:
            yield name, size, 1
        yield "data", 1, size
        if size > 2:
            yield "data_tensor", size // 2, 2


def prompts():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 97, NUM_PROMPTS)
    return [rng.integers(0, CONFIG["vocab_size"], length).tolist() for length in lengths]


def run(folder, name, tensor, data):
    """Tokens and log-probabilities of a layout, and what it took beside what was planned."""
    sizes = {"tensor_parallel_size": tensor, "data_parallel_size": data}
    planned = jaxllm.plan(folder, layout=name, **sizes, **OPTIONS)
    with LLM(
        folder,
        layout=name,
        load_format="dummy",
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        **sizes,
        **OPTIONS,
    ) as llm:
        outputs = llm.generate(prompts(), GREEDY, use_tqdm=False)
        runner = engines_of(llm._engine)[0].runner
        weights, pages = bytes_of_a_device(runner.params), runner.builder.num_pages
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(
            [*output.prompt_token_ids[1:], *output.outputs[0].token_ids],
            [*output.prompt_logprobs[1:], *output.outputs[0].logprobs],
            strict=True,
        )
    ]
    return {
        "layout": name,
        "devices": tensor * data,
        "tokens": tokens,
        "logprobs": np.asarray(logprobs),
        "weights": weights,
        "weights_planned": planned.weight_bytes,
        "kv_tokens": (pages - 1) * OPTIONS["block_size"],  # padding writes to one page
        "kv_tokens_planned": planned.kv_tokens,
    }


def bytes_of_a_device(arrays):
    """The most that a device has of some arrays."""
    held = {}
    for shard in (shard for array in arrays for shard in array.addressable_shards):
        held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def compare(row, first):
    """A row of the table, of figures only."""
    same = sum(mine == theirs for mine, theirs in zip(row["tokens"], first["tokens"], strict=True))
    gap = np.abs(row["logprobs"] - first["logprobs"]).max() if same == NUM_PROMPTS else float("nan")
    return {
        "layout": row["layout"],
        "devices": row["devices"],
        "identical": same,
        "largest_gap": float(gap),
        "weight_bytes": row["weights"],
        "weight_error": row["weights_planned"] / row["weights"] - 1,
        "kv_tokens": row["kv_tokens"],
        "kv_error": row["kv_tokens_planned"] / row["kv_tokens"] - 1,
    }


def table(rows):
    names = ["layout", "devices", "same tokens", "largest gap of a log-probability"]
    names += ["weights a device, bytes", "plan off by", "KV tokens", "plan off by"]
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for row in rows:
        yield (
            f"| {row['layout']} | {row['devices']} | {row['identical']} of {NUM_PROMPTS} | "
            f"{row['largest_gap']:.1e} | {row['weight_bytes']:,} | {row['weight_error']:.2%} | "
            f"{row['kv_tokens']:,} | {row['kv_error']:.2%} |"
        )


def main():
    """Runs every layout, and fails where one differs."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        most = min(ARGS.devices, len(jax.devices()))
        runs = [run(folder, *how) for how in layouts(most)]
    rows = [compare(row, runs[0]) for row in runs]
    print("\n".join(table(rows)))
    if ARGS.json:
        ARGS.json.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1))
    if any(row["identical"] < NUM_PROMPTS for row in rows):
        sys.exit("Some tokens differ from those of one device.")
    if any(max(abs(row["weight_error"]), abs(row["kv_error"])) > 0.01 for row in rows):
        sys.exit("A plan was off by more than a hundredth.")


if __name__ == "__main__":
    main()
