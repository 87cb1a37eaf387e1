"""From logits to tokens, on the device.

The order of operations is vLLM's: mask, edits, penalties, temperature, min-p, top-k,
top-p, choice. What the program's flags leave out is not in the program.

The random number of a token is a function of (seed, position, token id) alone:
neither the batch, nor its padding, nor the size of the vocabulary, nor how often
a sequence was preempted can change it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm import truncation
from jaxllm.flags import SamplingFlags
from jaxllm.inputs import (
    IN_PROMPT,
    SampledLogprobs,
    SamplingInputs,
    Scores,
    StepInputs,
    StepOutputs,
)
from jaxllm.pallas_kernels.greatest import compiled_greatest
from jaxllm.sharding.apply import Sharder

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

Words = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How the columns of logits [B, V] are to be read."""

    size: int | None = None
    """Columns that are tokens; the others, at the end, are minus infinity. None: all are."""

    sharder: Sharder | None = None
    """Where equal parts lie on devices of their own. Whatever is asked of a row is asked of each
    part, and the answers are combined: a row is never gathered."""

    greatest: str = ""
    """What finds the greatest of a row, as `native.build.target_for` names it; empty: XLA."""


WHOLE = Vocabulary()


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


def greatest(logits: jax.Array, vocabulary: Vocabulary = WHOLE) -> tuple[jax.Array, jax.Array]:
    """Returns the first of each row's greatest tokens, and whether it is a finite number.

    A NaN is greater than all, as in NumPy.

    Args:
        logits: float32 [B, V].
        vocabulary: Of the logits.

    Returns:
        int32 [B] and bool [B].
    """
    if vocabulary.greatest:
        return compiled_greatest(logits, vocabulary.greatest)
    sharder = vocabulary.sharder
    if sharder is not None and sharder.layout.split("vocab") > 1:
        return _greatest(logits)  # each device its own, and once combined
    return jax.lax.platform_dependent(logits, cpu=_greatest_integers, default=_greatest)


def _greatest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, jnp.isfinite(jnp.max(logits, axis=-1))


def _greatest_integers(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As integers in the same order: first how great, and then where.

    XLA:CPU carries the place of a maximum along one value at a time, and so takes three times as
    long (64 rows of 49,152); its maximum of floats alone is fast, but loses a NaN, depending on
    where that stands.
    """
    ordered, size = _ordered(logits), logits.shape[1]
    most = jnp.max(ordered, axis=-1)
    at = jnp.arange(size, dtype=jnp.int32)[None]
    tokens = jnp.min(jnp.where(ordered == most[:, None], at, size), axis=-1)
    least, top = _ordered(jnp.array([-jnp.inf, jnp.inf], jnp.float32))
    return tokens, (most > least) & (most < top)


def _ordered(x: jax.Array) -> jax.Array:
    """Returns int32 in the order of float32: zeros are equal, and a NaN is above infinity."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    most = jnp.iinfo(jnp.int32).max
    ordered = bits ^ (bits >> 31 & most)  # the more negative, the greater are a float's bits
    return jnp.where(jnp.isnan(x), most, jnp.where(x == 0, 0, ordered))


def choose(
    logits: jax.Array,
    inputs: StepInputs,
    counts: jax.Array | None,
    flags: SamplingFlags,
    logprobs_mode: str,
    vocabulary: Vocabulary = WHOLE,
) -> StepOutputs:
    """Returns a token a row, for rows that may generate one.

    Args:
        logits: float32 [B, V], of the model.
        inputs: Of the step.
        counts: int32 [B, V], of `DeviceState.token_counts`; None without penalties.
        flags: Of the program.
        logprobs_mode: One of `config.LOGPROBS_MODES`.
        vocabulary: Of the logits.
    """
    live = inputs.limits > 0
    sampling = inputs.sampling
    processed = process(logits, sampling, counts, inputs.kv_lens, flags)
    noisy = processed
    if flags.sampled:
        noise = gumbel_noise(sampling.seeds, inputs.kv_lens, logits.shape[1])
        noisy = jnp.where((sampling.temperature == 0)[:, None], processed, processed + noise)
    tokens, finite = greatest(noisy, vocabulary)
    if noisy is not logits:
        finite = greatest(logits, vocabulary)[1]
    # A NaN or +inf makes the maximum so; rows that do not sample may hold anything.
    finite |= ~live
    possible = finite
    if flags.edits or flags.mask_words:
        possible = (jnp.max(processed, axis=-1) > -jnp.inf) | ~finite | ~live
    logprobs = None
    if flags.logprobs is not None:
        source = processed if logprobs_mode.startswith("processed") else logits
        logprobs = logprobs_of(
            source,
            tokens,
            flags.logprobs,
            sampling.logprob_ids,
            normalize=logprobs_mode.endswith("logprobs"),
            vocabulary=vocabulary,
        )
    return StepOutputs(tokens[:, None], live.astype(jnp.int32), finite, possible, logprobs)


def process(
    logits: jax.Array,
    sampling: SamplingInputs,
    counts: jax.Array | None,
    positions: jax.Array,
    flags: SamplingFlags,
) -> jax.Array:
    """Applies everything that comes before the choice.

    Args:
        logits: float32 [B, V], of the model.
        sampling: How each row's token is chosen.
        counts: int32 [B, V], of `DeviceState.token_counts`; None without penalties.
        positions: int32 [B], where the new token will stand.
        flags: Which of the operations the program has.

    Returns:
        float32 [B, V], minus infinity for tokens that cannot be chosen.
    """
    if sampling.mask is not None:
        logits = jnp.where(_bits(sampling.mask, logits.shape[1]), logits, -jnp.inf)
    if sampling.edit_ids is not None:
        logits = _edited(logits, sampling, positions)
    if flags.penalties and counts is not None:
        logits = _penalized(logits, sampling, counts)
    if flags.sampled:
        temperature = jnp.where(sampling.temperature == 0, 1, sampling.temperature)
        logits = logits / temperature[:, None]
    if sampling.min_p is not None:
        logits = truncation.min_p(logits, sampling.min_p)
    if sampling.top_k is not None:
        logits = truncation.top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = truncation.top_p(logits, sampling.top_p)
    return logits


def _bits(words: jax.Array, size: int) -> jax.Array:
    """uint32 [B, ceil(V/32)] -> bool [B, V], the lowest bit first."""
    words = jnp.pad(words, ((0, 0), (0, -(-size // 32) - words.shape[1])))  # the padding's
    bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :] & 1
    return bits.reshape(words.shape[0], -1)[:, :size] == 1


def _edited(logits: jax.Array, sampling: SamplingInputs, positions: jax.Array) -> jax.Array:
    ids, values, until = sampling.edit_ids, sampling.edit_values, sampling.edit_until
    if ids is None or values is None or until is None:
        return logits
    live = positions[:, None] < until
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, ids].add(jnp.where(live, values, 0), mode="drop")


def _penalized(logits: jax.Array, sampling: SamplingInputs, counts: jax.Array) -> jax.Array:
    """Repetition (prompt and output), then frequency and presence (output only)."""
    repetition, frequency, presence = (
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    if repetition is None or frequency is None or presence is None:
        return logits
    factor = repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(counts > 0, repeated, logits)
    in_output = counts & (IN_PROMPT - 1)
    logits = logits - frequency[:, None] * in_output.astype(jnp.float32)
    return logits - presence[:, None] * (in_output > 0).astype(jnp.float32)


def logprobs_of(
    logits: jax.Array,
    tokens: jax.Array,
    count: int,
    named: jax.Array | None = None,
    *,
    normalize: bool = True,
    vocabulary: Vocabulary = WHOLE,
) -> SampledLogprobs:
    """Returns the log-probabilities of chosen tokens and of the likeliest.

    Args:
        logits: float32 [B, V].
        tokens: int32 [B], the chosen ones.
        count: k, how many of the likeliest to return; all V where that is fewer.
        named: int32 [B, J], further tokens to return; None for none.
        normalize: Return logits as they are where false.
        vocabulary: Of the logits.

    Returns:
        Arrays with N = 1.
    """
    total = jnp.float32(0)
    if normalize:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, 1]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)  # [B, 1]
    rank = _rank(logits, chosen, vocabulary)
    top, top_ids = _likeliest(logits, min(count, logits.shape[1]), vocabulary.sharder)
    values = ranks = None
    if named is not None:
        values = jnp.take_along_axis(logits, named, axis=-1)  # [B, J]
        ranks = _rank(logits[:, None, :], values[:, :, None], vocabulary)
        values, ranks = (values - total)[:, None], ranks[:, None]
    return SampledLogprobs(
        chosen=chosen - total,
        rank=rank[:, None],
        top_ids=top_ids[:, None],
        top=(top - total)[:, None],
        named=values,
        named_rank=ranks,
    )


def _rank(logits: jax.Array, values: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Returns how many tokens are at least as likely, int32 [...] for logits [..., V]."""
    count = jnp.sum(logits >= values, axis=-1, dtype=jnp.int32)
    # Only minus infinity is as little as padding, and all tokens are at least as likely as it.
    return count if vocabulary.size is None else jnp.minimum(count, vocabulary.size)


def _likeliest(
    logits: jax.Array, count: int, sharder: Sharder | None
) -> tuple[jax.Array, jax.Array]:
    """Returns values and int32 ids of the likeliest tokens, [B, count] each; ties by id."""
    shards = sharder.layout.split("vocab") if sharder else 1
    if sharder is None or shards == 1:
        top, ids = jax.lax.top_k(logits, count)
        return top, ids.astype(jnp.int32)
    num_rows, size = logits.shape[0], logits.shape[1] // shards
    few = min(count, size)

    def of_part(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        top, ids = jax.lax.top_k(part, few)
        return top[:, None], ids.astype(jnp.int32)[:, None]

    # The partitioner knows no top_k: it would gather the row.
    split = sharder.layout.spec((None, "vocab"))
    top, ids = jax.shard_map(of_part, mesh=sharder.mesh, in_specs=split, out_specs=(split, split))(
        logits
    )  # [B, shards, few]
    ids = ids + size * jnp.arange(shards, dtype=jnp.int32)[None, :, None]
    top, ids = sharder.everywhere((top.reshape(num_rows, -1), ids.reshape(num_rows, -1)))
    top, at = jax.lax.top_k(top, count)
    return top, jnp.take_along_axis(ids, at, axis=1)


def score_tokens(
    hidden: jax.Array,
    logits_of: Callable[[jax.Array], jax.Array],
    scored: jax.Array,
    targets: jax.Array,
    num_scored: jax.Array,
    count: int,
    chunk: int,
    vocabulary: Vocabulary = WHOLE,
) -> Scores:
    """Returns the log-probabilities of given tokens, a few rows of logits at a time.

    Args:
        hidden: [T, E].
        logits_of: [chunk, E] -> float32 [chunk, V].
        scored: int32 [T], tokens of the step whose successors are scored; the first ones count.
        targets: int32 [T], the successors.
        num_scored: int32 [].
        count: k, likeliest alternatives to return.
        chunk: Rows of logits that exist at once.
        vocabulary: Of the logits.
    """
    num_tokens = scored.shape[0]
    padded = -(-num_tokens // chunk) * chunk
    scored, targets = (jnp.pad(x, (0, padded - num_tokens)) for x in (scored, targets))

    def one(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = i * chunk
        rows = jax.lax.dynamic_slice_in_dim(scored, at, chunk)
        wanted = jax.lax.dynamic_slice_in_dim(targets, at, chunk)
        lp = logprobs_of(logits_of(hidden[rows]), wanted, count, vocabulary=vocabulary)
        parts = tuple(x[:, 0] for x in (lp.chosen, lp.rank, lp.top_ids, lp.top))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=0)
            for x, part in zip(found, parts, strict=True)
        )

    found = (
        jnp.zeros(padded, jnp.float32),
        jnp.zeros(padded, jnp.int32),
        jnp.zeros((padded, count), jnp.int32),
        jnp.zeros((padded, count), jnp.float32),
    )
    num_chunks = (num_scored + chunk - 1) // chunk
    found = jax.lax.fori_loop(0, num_chunks, one, found)
    return Scores(*(x[:num_tokens] for x in found))
