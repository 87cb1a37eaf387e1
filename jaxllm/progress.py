"""What is shown of long work: a bar for a call's requests, a line for a program's compilation."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from jaxllm.logs import shows_progress
from jaxllm.sequence import Request

Progress = bool | Callable[..., Any]

PATIENCE = 1.0
"""Seconds before a compilation is worth a line."""

TICK = 0.25
"""Seconds between two looks of that line."""


class ProgressBar:
    """Shows nothing where the caller wants nothing or there is nothing to do."""

    def __init__(self, requests: Sequence[Request], use_tqdm: Progress) -> None:
        """Starts the bar.

        Args:
            requests: Those of the call.
            use_tqdm: Whether to show it, or what to call in place of `tqdm`.
        """
        make = use_tqdm if callable(use_tqdm) else tqdm
        self._bar = (
            make(
                total=sum(len(r.sequences) for r in requests),
                desc="Processed prompts",
                dynamic_ncols=True,
                postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
            )
            if requests and (callable(use_tqdm) or (use_tqdm and shows_progress()))
            else None
        )
        self._start = time.perf_counter()
        self._num_in = self._num_out = 0

    def finish(self, request: Request) -> None:
        """Counts a finished request."""
        if self._bar is None:
            return
        count = len(request.sequences)
        self._num_in += count * len(request.prompt_token_ids)
        self._num_out += sum(len(seq.output_token_ids) for seq in request.sequences)
        seconds = time.perf_counter() - self._start
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_in / seconds:.2f} toks/s, "
            f"output: {self._num_out / seconds:.2f} toks/s",
            refresh=False,
        )
        self._bar.update(count)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """A stretch that compiles: where it is long and somebody looks on, a line counts seconds.

    The line goes when it is done. Nothing is shown where stderr is a file or a pipe.
    """
    if not (shows_progress() and _is_watched()):
        yield
        return
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(what, done), daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()


def _tick(what: str, done: threading.Event) -> None:
    start = time.perf_counter()
    if done.wait(PATIENCE):
        return
    with tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True) as line:
        while not done.is_set():
            line.set_description_str(f"compiling {what} ... {time.perf_counter() - start:.1f} s")
            done.wait(TICK)


def _is_watched() -> bool:
    """Whether stderr is a terminal or a notebook's."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
