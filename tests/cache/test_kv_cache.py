"""The cache's arrays: what is in them, and what memory they take before they are used."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.cache.kv_cache import abstract_caches, allocate
from jaxllm.cache.spec import CacheSpec
from jaxllm.pallas_kernels.attention import tuning_for
from tests.tiny import sharder

SPEC = CacheSpec(kind="paged", num_kv_heads=2, head_dim=64)


def shapes(num_pages):
    """One layer's keys and values, of 8 KiB a page each."""
    return abstract_caches([SPEC], num_pages, 16, "float32", sharder(), tuning_for("cpu"))


def resident():
    """Bytes of this process's own memory that are in use."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells of it another way")
def test_a_cache_takes_the_memory_of_the_pages_that_are_used():
    allocate(shapes(8))  # what compiling takes is not counted
    before = resident()

    ((keys, values),) = allocate(shapes(8192))
    assert keys.nbytes + values.nbytes == 128 << 20
    assert resident() - before < 16 << 20

    write = jax.jit(lambda pages: pages.at[:, :4096].set(1), donate_argnums=0)
    keys = write(keys).block_until_ready()
    assert resident() - before > 30 << 20
    found = np.asarray(keys)
    assert found[:, :4096].min() == 1
    assert not found[:, 4096:].any()
    assert not np.asarray(values).any()


def advice(address):
    """Flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has none"
)
@pytest.mark.parametrize("huge_pages", [False, True])
def test_huge_pages_are_asked_for_where_pages_in_use_lie_side_by_side(huge_pages):
    for array in allocate(shapes(8192), huge_pages=huge_pages)[0]:
        middle = array.unsafe_buffer_pointer() + array.nbytes // 2
        assert ("hg" in advice(middle)) == huge_pages
        assert not np.asarray(array).any()


def test_what_a_test_fills_it_with_is_kept():
    ((keys, values),) = allocate(shapes(64), lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    assert np.isnan(keys).all()
    assert np.isnan(values).all()
