"""Completions of a few prompts; vLLM's script of the same kind but for the import."""

import sys

from jaxllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=0)


def main(model: str) -> None:
    llm = LLM(model=model, gpu_memory_utilization=0.9, trust_remote_code=False)
    outputs = llm.generate(prompts, sampling_params)
    print("\nGenerated Outputs:\n" + "-" * 60)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt:    {prompt!r}")
        print(f"Output:    {generated_text!r}")
        print("-" * 60)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
