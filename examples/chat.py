"""Conversations, one and several at once; vLLM's script of the same kind but for the import."""

import sys

from jaxllm import LLM

# A model with a template of its own needs none of this.
TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)


def print_outputs(outputs: list) -> None:
    print("\nGenerated Outputs:\n" + "-" * 80)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}\n")
        print(f"Generated text: {output.outputs[0].text!r}")
        print("-" * 80)


def main(model: str) -> None:
    llm = LLM(model=model, chat_template=TEMPLATE if model == "demo" else None)
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = 32
    sampling_params.seed = 0

    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I assist you today?"},
        {"role": "user", "content": "Write an essay about the importance of higher education."},
    ]
    print_outputs(llm.chat(conversation, sampling_params, use_tqdm=False))

    conversations = [conversation for _ in range(10)]
    print_outputs(llm.chat(conversations, sampling_params, use_tqdm=True))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
