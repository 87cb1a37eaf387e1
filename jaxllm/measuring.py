"""A layout run on the devices that are here, with random weights, and what it took."""

import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.llm import LLM
from jaxllm.planner import Planner, config_dict
from jaxllm.replicas import engines_of
from jaxllm.sampling_params import SamplingParams
from jaxllm.sharding.layouts import Layout

STEPS = 16
"""Decode steps of a measurement."""

FEWEST_STEPS = 4
"""Of which a measurement is still one, where not all of them fit."""

REPEATS = 3
"""Of which the fastest counts: others of the machine's work only add."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What running a layout took here."""

    prefill_seconds: float
    """Of all prompts, with the first token of each."""

    decode_seconds: float
    """Of one step, in which every prompt gets a token."""

    kv_tokens: int
    """That the engine's cache holds."""


def measure(planner: Planner, layout: Layout, batch: int, context: int) -> Measured:
    """Runs a layout on the devices that are here, with random weights and random prompts.

    A time is the shortest of several, after one in which programs are compiled.

    Args:
        planner: Of the model.
        layout: Of all engines.
        batch: Prompts, over all engines.
        context: Tokens of each at the end; the last ones are generated.

    Raises:
        ConfigError: There are not the devices, it does not fit on them, or the prompts are
            never decoded all at once.
    """
    wishes = planner.wishes
    steps = min(STEPS, context - 2)
    if steps < 1:
        raise ConfigError(f"context={context} leaves no step to measure. Use 3 or more.")
    random = np.random.default_rng(0)
    vocab = int(planner.hf.vocab_size)
    prompts = random.integers(0, vocab, (batch, context - steps - 1)).tolist()
    with tempfile.TemporaryDirectory(prefix="jaxllm-sweep-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_dict(planner.hf)))
        llm = LLM(
            folder,
            layout=layout,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=wishes.dtype,
            max_model_len=wishes.max_model_len,
            max_num_seqs=wishes.max_num_seqs,
            max_num_batched_tokens=wishes.max_num_batched_tokens,
            gpu_memory_utilization=wishes.memory_fraction,
            kv_cache_memory_bytes=wishes.cache_bytes,
            block_size=wishes.page_size,
            enable_prefix_caching=False,
        )
    with llm:
        page_size = engines_of(llm._live_engine())[0].config.page_size
        _prefill_seconds(llm, prompts)
        # While one engine still compiles, another may come to the end of its prompts.
        with contextlib.suppress(ConfigError):
            _decode_seconds(llm, prompts, steps)
        seconds = [
            (_prefill_seconds(llm, prompts), _decode_seconds(llm, prompts, steps))
            for _ in range(REPEATS)
        ]
        prefill, decode = map(min, zip(*seconds, strict=True))
        return Measured(
            prefill_seconds=prefill,
            decode_seconds=decode,
            kv_tokens=llm.stats()["num_pages"] // layout.num_replicas * page_size,
        )


def _prefill_seconds(llm: LLM, prompts: Sequence[list[int]]) -> float:
    start = time.perf_counter()
    llm.generate(prompts, _greedy(1), use_tqdm=False)
    return time.perf_counter() - start


def _decode_seconds(llm: LLM, prompts: Sequence[list[int]], steps: int) -> float:
    """Returns the seconds of a step, over some that begin when the last prompt has a token.

    What comes before decodes some rows beside chunks of the prompts of others: other steps.
    """
    engine, limits = llm._live_engine(), engines_of(llm._live_engine())[0].config
    longest = limits.max_model_len - len(prompts[0])
    requests = llm._requests(prompts, _greedy(longest), None, on_error="raise")
    preemptions = llm.stats()["num_preemptions"]
    seen: list[tuple[float, int]] = []
    """Seconds, and tokens generated until then, while all prompts are decoded."""
    with engine.call(requests):
        while not any(request.is_finished for request in requests):
            engine.step()
            counts = [len(request.sequences[0].output_token_ids) for request in requests]
            if all(counts):
                seen.append((time.perf_counter(), sum(counts)))
                if seen[-1][1] - seen[0][1] >= steps * len(prompts):
                    break
        engine.abort_later(request.request_id for request in requests)
        while not all(request.is_finished for request in requests):
            engine.step()
    failed = next((request.error for request in requests if request.error is not None), None)
    if failed is not None:
        raise failed
    (start, before), (end, after) = (seen[0], seen[-1]) if seen else ((0, 0), (0, 0))
    fewest = min(steps, FEWEST_STEPS)
    is_preempted = llm.stats()["num_preemptions"] > preemptions
    if is_preempted or after - before < fewest * len(prompts):
        raise ConfigError(
            f"The {len(prompts)} prompts of {len(prompts[0])} tokens were not decoded all at once "
            f"for {fewest} steps: max_model_len={limits.max_model_len} or a cache of "
            f"{llm.stats()['num_pages'] * limits.page_size:,} tokens ends some, or puts them off, "
            "before others have begun. Raise what is short, or use a smaller batch or context."
        )
    return (end - start) * len(prompts) / (after - before)


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
