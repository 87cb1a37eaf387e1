"""Comparison with transformers: the oracle of every family."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxllm import LLM, SamplingParams
from jaxllm.modeling import registry, weights
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.config import with_length
from jaxllm.modeling.forward import full_forward
from tests.tiny import sharder

torch.set_num_threads(1)  # models so small only lose by more, above all beside other tests

NUM_PROMPTS = 20
NUM_TOKENS = 64
LONGEST_PROMPT = 40
MIN_MARGIN = 1e-3
"""Between the two best logits of every step; closer, and rounding could decide."""

MAX_GAP = 1e-4
"""Largest difference of a log-probability."""


@dataclass(frozen=True)
class Variant:
    """One tiny model: its classes in transformers and what its config changes."""

    name: str
    model: Any
    config: Any
    changes: dict = field(default_factory=dict)
    old_spelling: bool = False
    """Write config.json as transformers 4 did."""

    settings: dict = field(default_factory=dict)
    """Of `LLM`."""

    @property
    def family(self) -> str:
        return self.name.partition("-")[0]


SIZES = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write(variant: Variant, folder: Path):
    """Saves a random model, and returns it as transformers loads it again."""
    torch.manual_seed(0)
    model = variant.model(variant.config(**{**SIZES, **variant.changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@dataclass
class Reference:
    """What transformers generated from one prompt."""

    prompt: list[int]
    tokens: list[int]
    logprobs: np.ndarray
    """float64 [N, V]."""


def references(model, *, seed: int = 0) -> list[Reference]:
    """Greedy generations of random prompts, redrawn until every step has a clear winner."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(10):
        # Twice as many as are needed: a larger batch costs less than another one.
        sizes = rng.integers(1, LONGEST_PROMPT + 1, 2 * NUM_PROMPTS)
        prompts = [rng.integers(0, model.config.vocab_size, size).tolist() for size in sizes]
        found += [r for r in _generate(model, prompts) if _margin(r) >= MIN_MARGIN]
        if len(found) >= NUM_PROMPTS:
            return found[:NUM_PROMPTS]
    raise AssertionError("too few prompts have a clear winner at every step")


def _generate(model, prompts: list[list[int]]) -> list[Reference]:
    """One left-padded batch through `generate`, as its documentation asks for."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    logprobs = torch.stack(out.logits, dim=1).double().log_softmax(-1).numpy()  # [B, N, V]
    tokens = out.sequences[:, longest:].tolist()
    return [Reference(*parts) for parts in zip(prompts, tokens, logprobs, strict=True)]


def _margin(reference: Reference) -> float:
    best = np.sort(reference.logprobs, axis=-1)
    return float((best[:, -1] - best[:, -2]).min())


def assert_same(folder: Path, wanted: list[Reference], **settings) -> float:
    """Checks tokens and log-probabilities of `LLM`, and returns the largest gap."""
    settings = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, **settings}
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
    with LLM(folder, skip_tokenizer_init=True, use_tqdm_on_load=False, **settings) as llm:
        outputs = llm.generate([w.prompt for w in wanted], params, use_tqdm=False)
    worst = 0.0
    for want, output in zip(wanted, outputs, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == want.tokens
        assert completion.logprobs is not None
        for row, logprobs in zip(want.logprobs, completion.logprobs, strict=True):
            gaps = [abs(row[token] - found.logprob) for token, found in logprobs.items()]
            worst = max(worst, *gaps)
    assert worst <= MAX_GAP
    return worst


def forward(folder: Path, tokens: np.ndarray, dtype: str = "float32", length: int = 0):
    """Log-probabilities of a checkpoint without the engine.

    Args:
        folder: Of the checkpoint.
        tokens: int [B, T], sequences of one length.
        dtype: Of the parameters.
        length: Longest sequence that rotations are for.

    Returns:
        float64 [B, T, V].
    """
    hf = registry.read_hf_config(folder)
    _, family = registry.family_of(hf)
    config = with_length(registry.model_config(hf, family), length)
    model = abstract_model(config, family.build, dtype, sharder())
    ignored = (*family.IGNORED_WEIGHTS, "lm_head.weight") if config.tie_embeddings else ()
    sources = weights.match(model, weights.Checkpoint(folder), family.WEIGHTS, ignored)
    params = weights.load(sources, lambda size: None)
    num_seqs, size = tokens.shape
    positions = jnp.tile(jnp.arange(size, dtype=jnp.int32), num_seqs)
    segments = jnp.repeat(jnp.arange(num_seqs, dtype=jnp.int32), size)

    @jax.jit
    def run(params, tokens):
        merged = model.merge(params)
        return full_forward(merged, tokens, sharder(), positions=positions, segments=segments)

    logits = np.asarray(run(params, jnp.asarray(tokens, jnp.int32).reshape(-1)), np.float64)
    logits = logits.reshape(num_seqs, size, -1)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference_forward(folder: Path, tokens: np.ndarray, model: Any, dtype: torch.dtype):
    """The same of transformers, float64 [B, T, V]."""
    loaded = model.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return loaded(torch.from_numpy(tokens).long()).logits.double().log_softmax(-1).numpy()
