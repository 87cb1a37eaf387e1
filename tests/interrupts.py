"""Interrupts at chosen moments of our own code."""

import inspect
import sys
from pathlib import Path

import jaxllm

PACKAGE = str(Path(jaxllm.__file__).parent)


class Interrupts:
    """Raises KeyboardInterrupt at the n-th event in jaxllm's code, for each n of `at`.

    An event is the start or the end of a call, of Python or of C. That is where
    Python looks for signals: a call that was interrupted at its end has done its
    work, and its result is lost.
    """

    def __init__(self, *at):
        self.at, self.count = set(at), 0

    def profile(self, frame, event, arg):
        code = frame.f_code
        # What is raised while an object or a generator is thrown away, Python ignores.
        ignored = code.co_name == "__del__" or code.co_flags & inspect.CO_GENERATOR
        if code.co_filename.startswith(PACKAGE) and not ignored:
            self.count += 1
            if self.count in self.at:
                raise KeyboardInterrupt

    def trace(self, frame, event, arg):
        if sys.getprofile() is None:
            sys.setprofile(self.profile)  # Python drops a profile function that raises
        return self.trace if frame.f_code.co_filename.startswith(PACKAGE) else None

    def __enter__(self):
        self.former = sys.gettrace(), sys.getprofile()
        sys.settrace(self.trace)
        sys.setprofile(self.profile)
        return self

    def __exit__(self, *_):
        sys.settrace(self.former[0])
        sys.setprofile(self.former[1])


def count_events(function):
    with Interrupts() as interrupts:
        function()
    return interrupts.count
