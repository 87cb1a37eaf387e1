"""From logits to tokens, on the device.

The random number of a token is a function of (seed, position, token id) alone:
neither the batch, nor its padding, nor the size of the vocabulary, nor how often
a sequence was preempted can change it.
"""

import jax
import jax.numpy as jnp

from jaxllm.inputs import SampledLogprobs

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

Words = tuple[jax.Array, jax.Array]


def threefry2x32(key: Words, counter: Words) -> Words:
    """The Threefry-2x32-20 block cipher of Salmon et al., "Parallel random numbers" (2011).

    Args:
        key: Two uint32 arrays.
        counter: Two uint32 arrays that broadcast with the key.

    Returns:
        Two uint32 arrays of independent uniform bits.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


def gumbel_noise(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Returns standard Gumbel noise for each token of the vocabulary.

    Args:
        seeds: uint32 [B, 2].
        positions: int32 [B], where the token to be sampled will stand.
        vocab_size: V.

    Returns:
        float32 [B, V].
    """
    # Tokens 2i and 2i+1 share a block: one gets its first word, one its second.
    num_pairs = -(-vocab_size // 2)
    pair = jnp.arange(num_pairs, dtype=jnp.uint32)[None, :]
    key = (seeds[:, :1], seeds[:, 1:])
    words = threefry2x32(key, (positions.astype(jnp.uint32)[:, None], pair))
    bits = jnp.stack(words, axis=-1).reshape(seeds.shape[0], 2 * num_pairs)[:, :vocab_size]
    # Uniform in (0, 1) with full precision near 0, where -log(1 - u) gives the large noise.
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    uniform = jnp.minimum(uniform, jnp.float32(1 - 2**-24))
    return -jnp.log(-jnp.log1p(-uniform))


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Draws a token a row from `softmax(logits / temperature)` by the Gumbel-max rule.

    Args:
        logits: float32 [B, V].
        temperature: float32 [B]; 0 takes the most likely token, the lowest id among equals.
        seeds: uint32 [B, 2].
        positions: int32 [B], where the new token will stand.

    Returns:
        int32 [B].
    """
    greedy = temperature == 0
    divisor = jnp.where(greedy, 1, temperature)[:, None]
    noise = gumbel_noise(seeds, positions, logits.shape[1])
    noisy = jnp.where(greedy[:, None], logits, logits / divisor + noise)
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)


def logprobs_of(logits: jax.Array, tokens: jax.Array, count: int) -> SampledLogprobs:
    """Returns the log-probabilities of chosen tokens and of the likeliest.

    Args:
        logits: float32 [B, V], raw.
        tokens: int32 [B], the chosen ones.
        count: k, how many of the likeliest to return; all V where that is fewer.

    Returns:
        Arrays with N = 1.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, 1]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)  # [B, 1]
    rank = jnp.sum(logits >= chosen, axis=-1, dtype=jnp.int32)
    top, top_ids = jax.lax.top_k(logits, min(count, logits.shape[1]))
    return SampledLogprobs(
        chosen=chosen - total,
        rank=rank[:, None],
        top_ids=top_ids.astype(jnp.int32)[:, None],
        top=(top - total)[:, None],
    )
