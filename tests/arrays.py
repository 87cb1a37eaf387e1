"""What is left on the devices."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def no_new_arrays() -> Iterator[None]:
    """A stretch that leaves no array; those of before may be collected in it, or deleted."""
    held = jax.live_arrays()  # keeps them, so that no new one has the id of one that is gone
    yield
    known = {id(array) for array in held}
    left = [array.shape for array in jax.live_arrays() if id(array) not in known]
    assert not left, left
