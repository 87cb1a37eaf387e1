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
from jaxllm.demo.tokenizer import END_ID, train_tokenizer
from jaxllm.modeling.abstract import AbstractModel, abstract_model, init_params
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.forward import full_forward
from jaxllm.modeling.registry import family_of, model_config
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh

VOCAB_SIZE = 4096
MAX_LENGTH = 512

TOKENS_PER_STEP = 1024
"""Small, because steps are what a run of minutes is short of: for the same 400,000
tokens the held-out loss was 5.07 with it and 5.15 with 2048."""

LENGTH = 256
"""Tokens in a sequence, in most steps: attention over more costs more."""

LONG_EVERY = 8
"""One step in so many has sequences of MAX_LENGTH: the model is to work in every
position that its config allows."""

PEAK_RATE = 2.5e-3
LAST_RATE = 0.02
"""Learning rate at the end, as a share of the peak."""

WARM_UP = 0.03
"""Share of the run in which the learning rate rises."""

WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
SAVE_SECONDS = 300
LOG_SECONDS = 15

Params = tuple[jax.Array, ...]
Tokens = np.ndarray | jax.Array
Loss = Callable[[Params, Tokens], jax.Array]
Step = Callable[[Params, Any, Tokens, float], tuple[Params, Any, jax.Array]]


def hf_config() -> LlamaConfig:
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
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        dtype="bfloat16",
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> np.ndarray:
    """Returns all documents as one stream, int32, with an end of text before each."""
    ids = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    return np.concatenate([np.array([END_ID, *tokens], np.int32) for tokens in ids])


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


def damp_residuals(model: AbstractModel, params: Params, num_layers: int) -> Params:
    """Shrinks the initial weights of what layers add to the residual stream.

    There are two additions a layer; with `1 / sqrt(2 L)` on each the stream keeps
    its size (GPT-2).
    """
    scale = (2 * num_layers) ** -0.5
    return tuple(
        param * scale if leaf.path.endswith(("attn.o.weight", "mlp.down.weight")) else param
        for leaf, param in zip(model.leaves, params, strict=True)
    )


def build_loss(model: AbstractModel, sharder: Sharder) -> Loss:
    """Returns the mean cross entropy, in nats a token, of tokens [B, T + 1]."""

    def loss(params: Params, tokens: Tokens) -> jax.Array:
        decoder: Decoder = model.merge(params)
        logits = jax.vmap(lambda row: full_forward(decoder, row, sharder))(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


def has_decay(params: Params) -> Params:
    """Marks matrices; the scales of norms are to stay where the loss wants them."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


def build_optimizer() -> optax.GradientTransformation:
    """Returns AdamW after clipping, without the learning rate: the clock gives that."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=has_decay),
    )


def build_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """Returns the jitted update; parameters and optimizer state are donated."""

    def step(
        params: Params, state: Any, tokens: Tokens, rate: float
    ) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def held_out_loss(loss: Loss, params: Params, stream: np.ndarray) -> float:
    """Returns the mean loss over the stream, cut into sequences of MAX_LENGTH."""
    count = (len(stream) - 1) // MAX_LENGTH
    cut = [stream[i * MAX_LENGTH :][: MAX_LENGTH + 1] for i in range(count)]
    return float(np.mean([loss(params, row[None]) for row in cut]))


def save(
    hf: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    tensors: dict[str, np.ndarray],
    out: Path,
) -> None:
    """Writes the whole checkpoint folder."""
    out.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    GenerationConfig(
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    ).save_pretrained(out)
    save_weights(tensors, out)


def read_streams() -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Returns the tokenizer, the stream to learn from, and the one to evaluate on."""
    documents = read_documents()
    learned = [document for document in documents if not document.is_held_out]
    kept = [document for document in documents if document.is_held_out]
    tokenizer = train_tokenizer((document.text for document in learned), VOCAB_SIZE, MAX_LENGTH)
    text, held_out = encode(tokenizer, learned), encode(tokenizer, kept)
    size = sum(len(document.text.encode()) for document in documents)
    print(
        f"{len(documents)} files, {size:,} bytes: {len(text):,} tokens to learn from; "
        f"{len(held_out):,} tokens held out in {len(kept)} files",
        flush=True,
    )
    return tokenizer, text, held_out


def train(minutes: float, out: Path, seed: int) -> None:
    """Runs steps until the time is up, and writes the checkpoint every few minutes.

    Args:
        minutes: Wall clock of the steps, compiling included.
        out: Folder of the checkpoint; made if it is not there.
        seed: Of the initial weights and of the order of the text.
    """
    tokenizer, text, held_out = read_streams()
    hf = hf_config()
    layout = preset("replicated")
    sharder = Sharder(layout, make_mesh(layout))
    _, family = family_of(hf)
    config = model_config(hf, family)
    model = abstract_model(config, family.build, jnp.float32, sharder)
    params = init_params(model, seed)
    params = damp_residuals(model, params, config.num_layers)
    loss, optimizer = build_loss(model, sharder), build_optimizer()
    state, step, evaluate = optimizer.init(params), build_step(loss, optimizer), jax.jit(loss)

    rng = np.random.default_rng(seed)
    start = logged = saved = time.monotonic()
    steps, fraction, recent = 0, 0.0, []
    while fraction < 1:
        tokens = crops(text, LENGTH if steps % LONG_EVERY else MAX_LENGTH, rng)
        params, state, value = step(params, state, tokens, learning_rate(fraction))
        recent.append(float(value))
        steps += 1
        now = time.monotonic()
        fraction = (now - start) / (60 * minutes)
        if now - logged > LOG_SECONDS or fraction >= 1:
            print(
                f"{(now - start) / 60:5.1f} min  step {steps:,}  "
                f"{steps * TOKENS_PER_STEP:,} tokens  loss {np.mean(recent):.3f}",
                flush=True,
            )
            logged, recent = now, []
        if now - saved > SAVE_SECONDS or fraction >= 1:
            save(hf, tokenizer, to_checkpoint(model, params, family.WEIGHTS), out)
            print(
                f"saved; held-out loss {held_out_loss(evaluate, params, held_out):.3f}", flush=True
            )
            saved = time.monotonic()


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=33.0, help="wall clock of the steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.minutes, args.out, args.seed)


if __name__ == "__main__":
    main()
