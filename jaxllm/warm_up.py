"""Which programs an engine can need, and compiling them before they are needed.

`program_keys` lists them from the config alone; `warm_up` compiles a list before it
returns, `Background` in a thread, the likeliest first.
"""

import atexit
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from tqdm.auto import tqdm

from jaxllm import interrupts
from jaxllm.buckets import Bucket, Buckets, powers_of_two
from jaxllm.config import DECODE_STEPS, EngineConfig
from jaxllm.flags import NO_FLAGS, SamplingFlags
from jaxllm.logs import shows_progress
from jaxllm.program_cache import ProgramCache
from jaxllm.programs import MIN_COUNTED, CountKey, Key, ProgramKey

logger = logging.getLogger("jaxllm")


def program_keys(
    config: EngineConfig, flags: Sequence[SamplingFlags] = (NO_FLAGS,)
) -> tuple[Key, ...]:
    """Returns every program that plans of this engine can need, the likeliest first.

    Args:
        config: Of the engine.
        flags: What batches ask of the sampler, the likeliest first.
    """
    buckets = Buckets(config)
    steps = (1, *(n for n in DECODE_STEPS if n <= config.max_decode_steps))
    ranked = [
        (rank + order, ProgramKey(bucket, count, asked))
        for order, asked in enumerate(flags)
        for rank, bucket in (*_decodes(buckets), *_mixed(buckets))
        for count in (steps if bucket.is_decode else (1,))
    ]
    keys: list[Key] = [key for _, key in sorted(ranked, key=lambda pair: pair[0])]
    if any(asked.penalties for asked in flags):
        keys += map(CountKey, powers_of_two(MIN_COUNTED, config.max_model_len))
    return tuple(keys)


def _decodes(buckets: Buckets) -> Iterator[tuple[int, Bucket]]:
    """Decode buckets, each with a rank: one stream and short contexts come first."""
    for i, rows in enumerate(buckets.rows):
        for j, width in enumerate(buckets.widths):
            yield i + j, buckets.decode(rows, width)


def _mixed(buckets: Buckets) -> Iterator[tuple[int, Bucket]]:
    """Mixed buckets that some plan falls into, each with a rank."""
    token_sizes = tuple(zip((0, *buckets.tokens), buckets.tokens, strict=False))
    row_sizes = tuple(zip((0, *buckets.mixed_rows), buckets.mixed_rows, strict=False))
    for i, (fewer_tokens, tokens) in enumerate(token_sizes):
        for j, (fewer_rows, rows) in enumerate(row_sizes):
            for k, width in enumerate(buckets.widths):
                # The longest row is at least as long as the mean one.
                if fewer_tokens >= rows * width * buckets.page_size:
                    continue
                for with_decodes in (False, True):
                    # Chunks have two tokens or more; beside a decode, one row may have one.
                    fewest = (fewer_rows + 1) * (1 if with_decodes else 2)
                    if fewest <= tokens:
                        bucket = buckets.mixed(tokens, rows, width, with_decodes=with_decodes)
                        yield i + 2 * j + k + with_decodes, bucket


def warm_up(tables: Sequence[ProgramCache], keys: Sequence[Key], *, show_progress: bool) -> None:
    """Compiles programs in each table before it returns; an interrupt leaves those done."""
    shown = show_progress and shows_progress()
    with (
        interrupts.noticed(),
        tqdm(total=len(keys) * len(tables), desc="Compiling programs", disable=not shown) as bar,
    ):
        for key, table in product(keys, tables):
            interrupts.check()
            bar.set_postfix_str(str(key), refresh=shown)
            table.compile(key)
            bar.update()


class Background:
    """A thread that compiles programs while the engine runs others.

    It knows the table and no arrays. `close` lets it end after the program that it is at;
    the process waits for that too when it exits, as XLA cannot be cut off.
    """

    def __init__(self, programs: ProgramCache, keys: Iterable[Key]) -> None:
        """Starts.

        Args:
            programs: The table to fill; its `prefer` is set.
            keys: What to compile, in this order.
        """
        self._programs = programs
        self._wanted: deque[Key] = deque(keys)
        self._preferred: set[Key] = set()
        self._news, self._idle, self._closed = (threading.Event() for _ in range(3))
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name="jaxllm-compile", daemon=True)
        programs.prefer = self.prefer
        atexit.register(self._end)
        self._thread.start()

    def prefer(self, key: Key) -> None:
        """Asks for a program before all others; once, for it may not compile at all."""
        if key not in self._preferred:
            self._preferred.add(key)
            self._idle.clear()
            self._wanted.appendleft(key)
            self._news.set()

    def close(self) -> None:
        """Stops after the program that is being compiled; does not wait for it."""
        self._programs.prefer = None
        self._closed.set()
        self._news.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until nothing is left to compile, or for so long; returns which."""
        return self._idle.wait(seconds)

    @property
    def is_running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def _end(self) -> None:
        self.close()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                key = self._wanted.popleft()
            except IndexError:
                self._idle.set()
                self._news.wait()
                self._news.clear()
            else:
                self._compile(key)
        self._idle.set()
        atexit.unregister(self._end)

    def _compile(self, key: Key) -> None:
        try:
            self._programs.compile(key)
        except Exception as error:  # whatever XLA raises: the step that needs it will raise it too
            if not self._has_warned:
                self._has_warned = True
                logger.warning("%s could not be compiled in the background: %s", key, error)
