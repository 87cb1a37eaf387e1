"""Prompts over many machines: Ray Data feeds actors, each of which holds an `LLM` of its own.

    pip install "jaxllm[ray,cuda13]"
    python examples/ray_batch.py Qwen/Qwen3-0.6B 8 1    # 8 models, a GPU each

Ray finds the cluster that the script is submitted to; without one it starts on this machine.
"""

import sys
from typing import Any

import ray  # pyright: ignore[reportMissingImports]

from jaxllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
# A seed of its own for each prompt, so that no division among the actors changes a text.
sampling_params = [SamplingParams(temperature=0.8, top_p=0.95, seed=i) for i in range(len(prompts))]


class Generator:
    """Loads the model once an actor, then completes one batch after another."""

    def __init__(self, model: str) -> None:
        self.llm = LLM(model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        params = [sampling_params[i] for i in batch["id"]]
        outputs = self.llm.generate(list(batch["prompt"]), params, use_tqdm=False)
        return {**batch, "text": [output.outputs[0].text for output in outputs]}


def main(model: str, num_models: int = 2, gpus_each: float = 0) -> None:
    rows = ray.data.from_items([{"id": i, "prompt": p} for i, p in enumerate(prompts)])
    # Large batches: the engine forms its own of what it is given.
    completed = rows.map_batches(
        Generator,
        fn_constructor_args=(model,),
        batch_size=max(1, len(prompts) // num_models),
        compute=ray.data.ActorPoolStrategy(size=num_models),
        num_gpus=gpus_each,
    )
    for row in sorted(completed.take_all(), key=lambda row: row["id"]):
        print(f"Prompt: {row['prompt']!r}\nOutput: {row['text']!r}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        arguments[0] if arguments else "demo",
        int(arguments[1]) if len(arguments) > 1 else 2,
        float(arguments[2]) if len(arguments) > 2 else 0,
    )
