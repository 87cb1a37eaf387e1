"""Interrupts that Python drops: they are noticed, and raised at the next step.

A signal that comes while Python runs a finalizer or a callback of the garbage
collector (JAX has one) is raised in there, printed and dropped. In a call that makes
many objects that was the fate of one Ctrl-C in five. Here a handler remembers that
it came; long loops ask, once a turn.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    signal.default_int_handler(number, frame)


@contextmanager
def noticed() -> Iterator[None]:
    """A stretch in which no interrupt is lost; it ends with one that would have been.

    Only where Python's own handler is in place: another is the application's business.
    """
    global _came
    in_place = (signal.default_int_handler, _interrupt)
    if not _is_main_thread() or signal.getsignal(signal.SIGINT) not in in_place:
        yield
        return
    _came, is_left = False, True
    try:
        signal.signal(signal.SIGINT, _interrupt)
        yield
        check()
    except GeneratorExit:
        # Its beginning was cut off, and the collector ends it: wherever it comes, in a later
        # stretch or in another thread. The next stretch takes the handler as it finds it.
        is_left = False
        raise
    finally:
        if is_left:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check() -> None:
    """Raises the interrupt that was lost since `noticed` began, if there was one."""
    global _came
    if _came and _is_main_thread():  # signals are for the main thread alone
        _came = False
        raise KeyboardInterrupt


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
