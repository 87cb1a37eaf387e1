"""Trains the demo model: `python -m jaxllm.demo.train`, half an hour on two CPU cores.

The clock ends the run, and the learning rate follows the share of the time that
has passed, so a slower machine gives a model of fewer steps, not a longer run;
two runs are therefore alike and not equal. Parameters and gradients are float32;
the checkpoint is bfloat16 and usable from its first writing on.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from jaxllm.demo.corpus import Document, read_documents
from jaxllm.demo.export import save_weights, to_checkpoint
from jaxllm.demo.tokenizer import train_tokenizer
from jaxllm.modeling.abstract import AbstractModel, abstract_model, init_params
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.families import llama
from jaxllm.modeling.forward import full_forward
from jaxllm.modeling.registry import model_config
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh

VOCAB_SIZE = 4096
MAX_LENGTH = 512

TOKENS_PER_STEP = 2048
LENGTH = 256
"""Tokens in a sequence, for most of the run: attention over more costs more."""

LONG_AFTER = 0.8
"""Share of the run after which sequences have MAX_LENGTH tokens: the model is to
work in every position that its config allows."""

PEAK_RATE = 3e-3
LAST_RATE = 0.02
"""Learning rate at the end, as a share of the peak."""

WARM_UP = 0.02
"""Share of the run in which the learning rate rises."""

WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
EMBED_STD = 0.02
SAVE_SECONDS = 300
LOG_SECONDS = 15

Params = tuple[jax.Array, ...]
Loss = Callable[[Params, jax.Array], jax.Array]
Step = Callable[[Params, Any, jax.Array, float], tuple[Params, Any, jax.Array]]


def hf_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the config that the checkpoint states: about 3.2 million parameters."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> np.ndarray:
    """Returns all documents as one stream, int32, with an end of text before each."""
    ids = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([end, *tokens], np.int32) for tokens in ids])


def crops(stream: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns sequences from random places, int32 [B, length + 1], for one step."""
    starts = rng.integers(len(stream) - length, size=TOKENS_PER_STEP // length)
    return stream[starts[:, None] + np.arange(length + 1)]


def learning_rate(fraction: float) -> float:
    """Returns the learning rate when this share of the run has passed."""
    if fraction < WARM_UP:
        return PEAK_RATE * max(fraction, 1e-3) / WARM_UP
    falling = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (fraction - WARM_UP) / (1 - WARM_UP)))
    return PEAK_RATE * (LAST_RATE + (1 - LAST_RATE) * falling)


def scale_for_training(model: AbstractModel, params: Params, num_layers: int) -> Params:
    """Shrinks the initial values of layers' outputs and of the tied embedding.

    Each layer adds to the residual stream twice; with `1 / sqrt(2 L)` on what is
    added the stream keeps its size (GPT-2). The embedding is the output head too,
    so a small one starts the model at even odds for all tokens.
    """
    scales = {
        "attn.o.weight": (2 * num_layers) ** -0.5,
        "mlp.down.weight": (2 * num_layers) ** -0.5,
    }

    def scaled(path: str, param: jax.Array) -> jax.Array:
        if path == "embed.weight":
            return param * (EMBED_STD * param.shape[1] ** 0.5)  # drawn with std 1 / sqrt(E)
        return param * scales.get(path.split(".", 2)[-1], 1.0)

    return tuple(scaled(leaf.path, p) for leaf, p in zip(model.leaves, params, strict=True))


def build_loss(model: AbstractModel, sharder: Sharder) -> Loss:
    """Returns the mean cross entropy, in nats a token, of tokens [B, T + 1]."""

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        decoder: Decoder = model.merge(params)
        logits = jax.vmap(lambda row: full_forward(decoder, row, sharder))(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


def build_optimizer() -> optax.GradientTransformation:
    """Returns AdamW after clipping, without the learning rate: the clock gives that."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=lambda ps: tuple(p.ndim > 1 for p in ps)),
    )


def build_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """Returns the jitted update; parameters and optimizer state are donated."""

    def step(
        params: Params, state: Any, tokens: jax.Array, rate: float
    ) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return tuple(p - rate * u for p, u in zip(params, updates, strict=True)), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def held_out_loss(loss: Loss, params: Params, stream: np.ndarray) -> float:
    """Returns the mean loss over the stream, cut into sequences of MAX_LENGTH."""
    count = (len(stream) - 1) // MAX_LENGTH
    cut = [stream[i * MAX_LENGTH :][: MAX_LENGTH + 1] for i in range(count)]
    return float(np.mean([loss(params, jnp.asarray(row[None])) for row in cut]))


def main() -> None:
    """Trains from scratch and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=33.0, help="wall clock of the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    documents = read_documents()
    learned = [d for d in documents if not d.is_held_out]
    tokenizer = train_tokenizer((d.text for d in learned), VOCAB_SIZE, MAX_LENGTH)
    text = encode(tokenizer, learned)
    held_out = encode(tokenizer, [d for d in documents if d.is_held_out])
    size = sum(len(d.text.encode()) for d in documents)
    print(f"{len(documents)} files, {size:,} bytes: {len(text):,} tokens to learn from, ", end="")
    print(f"{len(held_out):,} held out in {len(documents) - len(learned)} files", flush=True)

    hf = hf_config(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    save_configs(hf, tokenizer, args.out)
    train(hf, text, held_out, args)


def save_configs(hf: LlamaConfig, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes everything of the checkpoint but its weights."""
    hf.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    GenerationConfig(
        bos_token_id=hf.bos_token_id,
        eos_token_id=hf.eos_token_id,
        pad_token_id=hf.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    ).save_pretrained(out)


def train(
    hf: LlamaConfig, text: np.ndarray, held_out: np.ndarray, args: argparse.Namespace
) -> None:
    """Runs steps until the time is up, and writes weights every few minutes.

    Args:
        hf: What the model is.
        text: int32 stream to learn from.
        held_out: int32 stream to evaluate on.
        args: `minutes`, `out` and `seed`.
    """
    layout = preset("replicated")
    sharder = Sharder(layout, make_mesh(layout))
    config = model_config(hf, llama)
    model = abstract_model(config, llama.build, jnp.float32, sharder)
    params = init_params(model, config, llama.build, jnp.float32, args.seed)
    params = scale_for_training(model, params, config.num_layers)
    loss = build_loss(model, sharder)
    optimizer = build_optimizer()
    state, step, evaluate = optimizer.init(params), build_step(loss, optimizer), jax.jit(loss)

    rng = np.random.default_rng(args.seed)
    start = logged = saved = time.monotonic()
    steps, recent, fraction = 0, [], 0.0
    while fraction < 1:
        tokens = crops(text, MAX_LENGTH if fraction > LONG_AFTER else LENGTH, rng)
        params, state, value = step(params, state, tokens, learning_rate(fraction))
        recent.append(float(value))
        steps += 1
        now = time.monotonic()
        fraction = (now - start) / (60 * args.minutes)
        if now - logged > LOG_SECONDS or fraction >= 1:
            speed = len(recent) * TOKENS_PER_STEP / (now - logged)
            print(
                f"{(now - start) / 60:5.1f} min  step {steps}  {steps * TOKENS_PER_STEP:,} tokens  "
                f"{speed:,.0f} tokens/s  loss {np.mean(recent):.3f}",
                flush=True,
            )
            logged, recent = now, []
        if now - saved > SAVE_SECONDS or fraction >= 1:
            save_weights(to_checkpoint(model, params, llama.WEIGHTS), args.out)
            print(
                f"saved; held-out loss {held_out_loss(evaluate, params, held_out):.3f}", flush=True
            )
            saved = time.monotonic()


if __name__ == "__main__":
    main()
