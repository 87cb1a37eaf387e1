"""Tiny checkpoints with random weights, written without torch.

The weights have a standard deviation of 0.2 and more, so that logits are far
apart and greedy tokens can be compared between implementations.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from jaxllm.demo.export import to_checkpoint
from jaxllm.modeling import registry
from jaxllm.modeling.abstract import AbstractModel, abstract_model
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.forward import full_forward
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh

VOCAB_SIZE = 101

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def opt_config(**sizes):
    """An OPTConfig of sizes in Llama's names."""
    names = {"intermediate_size": "ffn_dim", "initializer_range": "init_std"}
    return OPTConfig(**{names.get(k, k): v for k, v in sizes.items() if "key_value" not in k})


def gpt2_config(**sizes):
    """A GPT2Config of sizes in Llama's names."""
    names = {"intermediate_size": "n_inner"}
    return GPT2Config(**{names.get(k, k): v for k, v in sizes.items() if "key_value" not in k})


def gpt_neox_config(**sizes):
    """A GPTNeoXConfig of sizes in Llama's names."""
    return GPTNeoXConfig(**{k: v for k, v in sizes.items() if "key_value" not in k})


CONFIGS = {
    "llama": (LlamaConfig, {"architectures": ["LlamaForCausalLM"]}),
    "qwen3": (Qwen3Config, {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}),
    "qwen2": (Qwen2Config, {"architectures": ["Qwen2ForCausalLM"]}),
    "mistral": (MistralConfig, {"architectures": ["MistralForCausalLM"], "sliding_window": 24}),
    "granite": (
        GraniteConfig,
        {
            "architectures": ["GraniteForCausalLM"],
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.8,
        },
    ),
    "gemma2": (
        Gemma2Config,
        {
            "architectures": ["Gemma2ForCausalLM"],
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "sliding_window": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gpt2": (gpt2_config, {"architectures": ["GPT2LMHeadModel"]}),
    # Branches side by side are summed once a layer between devices, and not twice.
    "gpt_neox": (
        gpt_neox_config,
        {"architectures": ["GPTNeoXForCausalLM"], "use_parallel_residual": False},
    ),
    # Narrow embeddings, so that every line of the weight table has a parameter.
    "opt": (opt_config, {"architectures": ["OPTForCausalLM"], "word_embed_proj_dim": 24}),
}
"""By family: its config class, and what it needs beside `SIZES`."""


def sharder() -> Sharder:
    """One device, nothing split."""
    layout = preset("replicated")
    return Sharder(layout, make_mesh(layout))


def random_params(model: AbstractModel, std: float = 0.2, seed: int = 0) -> list[jax.Array]:
    """Random weights for every leaf; norms around one."""
    rng = np.random.default_rng(seed)
    params = []
    for leaf in model.leaves:
        value = rng.normal(0.0, std, leaf.shape.shape)
        if leaf.path.endswith("scale"):
            value = 1 + value
        params.append(jnp.asarray(value, leaf.shape.dtype))
    return params


def tiny_model(
    family: str = "llama", seed: int = 0, std: float = 0.2, **config
) -> tuple[ModelConfig, AbstractModel, list[jax.Array]]:
    """A model in float32: its config, its structure, its parameters."""
    make, fixed = CONFIGS[family]
    hf = make(**{**SIZES, **fixed, **config})
    _, module = registry.family_of(hf)
    model_config = registry.model_config(hf, module)
    model = abstract_model(model_config, module.build, "float32", sharder())
    return model_config, model, random_params(model, std, seed)


def tiny_checkpoint(
    folder: Path, family: str = "llama", seed: int = 0, std: float = 0.2, **config
) -> Path:
    """Writes a checkpoint (no tokenizer) and returns its folder."""
    make, fixed = CONFIGS[family]
    hf = make(**{**SIZES, **fixed, **config})
    hf.save_pretrained(folder)
    _, module = registry.family_of(hf)
    _, model, params = tiny_model(family, seed, std, **config)
    tensors = to_checkpoint(model, params, module.WEIGHTS)
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def random_prompts(count: int, longest: int, seed: int = 0, shortest: int = 1) -> list[list[int]]:
    """Prompts of random length and tokens."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(shortest, longest + 1, count)
    return [rng.integers(0, VOCAB_SIZE, size).tolist() for size in sizes]


class Naive:
    """Greedy generation by the cacheless full forward: the engine's oracle."""

    def __init__(self, model: AbstractModel, params: list[jax.Array], length: int = 128) -> None:
        self.params, self.length = params, length
        pinned = sharder()
        # Padding comes after every real token, and attention is causal, so it is never seen.
        self.forward = jax.jit(lambda p, t: full_forward(model.merge(p), t, pinned))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [len(tokens), V]."""
        padded = np.zeros(self.length, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self.forward(self.params, padded))[: len(tokens)]

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The next greedy tokens."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]
