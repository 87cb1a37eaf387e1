"""One long prefix, many questions: with prefix caching and without, the same answers.

vLLM's script of the same kind but for the import.
"""

import sys

from jaxllm import LLM, SamplingParams

prefix = (
    "You are an expert school principal, skilled in effectively managing "
    "faculty and staff. Draft 10-15 questions for a potential first grade "
    "Head Teacher for my K-12, all-girls', independent school that emphasizes "
    "community, joyful discovery, and life-long learning. Based on these information, fulfill "
    "the following paragraph: "
)
prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
generating_prompts = [prefix + prompt for prompt in prompts]
sampling_params = SamplingParams(temperature=0.0)


def main(model: str) -> None:
    regular_llm = LLM(model=model, gpu_memory_utilization=0.4, enable_prefix_caching=False)
    print("Results without `enable_prefix_caching`")
    outputs = regular_llm.generate(generating_prompts, sampling_params)
    regular_texts = [output.outputs[0].text for output in outputs]
    for prompt, text in zip(prompts, regular_texts, strict=True):
        print(f"Prompt: {prompt!r}, Generated text: {text!r}")
    del regular_llm

    prefix_cached_llm = LLM(model=model, gpu_memory_utilization=0.4, enable_prefix_caching=True)
    # Warm-up, so that the shared prompt's KV cache is computed.
    prefix_cached_llm.generate(generating_prompts[0], sampling_params)
    outputs = prefix_cached_llm.generate(generating_prompts, sampling_params)
    print("Results with `enable_prefix_caching`")
    cached_texts = [output.outputs[0].text for output in outputs]
    for prompt, text in zip(prompts, cached_texts, strict=True):
        print(f"Prompt: {prompt!r}, Generated text: {text!r}")
    print(f"Tokens found in the cache: {[output.num_cached_tokens for output in outputs]}")

    same = all(a == b for a, b in zip(regular_texts, cached_texts, strict=True))
    print(f"Generated answers are the same: {same}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
