"""On CPU, with programs that do what the report is to find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.program_report import report

CACHE = jax.ShapeDtypeStruct((64, 32), jnp.float32)
ROW = jax.ShapeDtypeStruct((1, 32), jnp.float32)


def write(cache, row):
    return jax.lax.dynamic_update_slice(cache, row, (3, 0))


def compiled(function, *shapes, **jit):
    return report(jax.jit(function, **jit).lower(*shapes).compile())


def test_a_donated_cache_is_written_in_place():
    found = compiled(write, CACHE, ROW, donate_argnums=0)

    assert found.alias_bytes == 64 * 32 * 4
    assert found.rewritten(at_least=1024) == []


def test_a_cache_that_is_not_donated_is_copied():
    found = compiled(write, CACHE, ROW)

    assert found.alias_bytes == 0
    assert [w.rewrites for w in found.rewritten(at_least=1024)] == ["cache"]


@pytest.mark.parametrize("form", [jnp.transpose, lambda w: w.astype(jnp.bfloat16), lambda w: w * 3])
def test_a_weight_in_another_form_is_found(form):
    found = compiled(lambda weight: form(weight), CACHE)

    assert [w.rewrites for w in found.rewritten(at_least=1024)] == ["weight"]


def test_a_product_of_the_size_of_a_weight_is_none():
    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    found = compiled(jnp.matmul, square, square)

    assert found.rewritten(at_least=1024) == []


def test_a_slice_of_a_stack_only_moves():
    stack = jax.ShapeDtypeStruct((4, 64, 32), jnp.float32)

    found = compiled(lambda stack, i: jax.lax.dynamic_index_in_dim(stack, i), stack, 2)

    assert [str(w.array) for w in found.moves(at_least=1024)] == ["f32[1,64,32]"]


def test_a_loop_says_how_often_it_runs_if_that_is_known():
    fixed = compiled(lambda x: jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(x), x), CACHE)
    open_ended = compiled(
        lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x), CACHE
    )

    assert [loop.trip_count for loop in fixed.loops] == [5]
    assert [loop.trip_count for loop in open_ended.loops] == [None]


def test_collectives_are_counted_by_where_they_come_from():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))

    def shape(spec, *sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    @jax.jit
    def layer(x, w):
        return x @ w

    found = compiled(
        lambda x, w: layer(x, w) + 1,
        shape(PartitionSpec(None, "x"), 8, 32),
        shape(PartitionSpec("x"), 32, 16),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

    assert found.count("all-reduce", within="layer") == 1
    assert found.count("all-gather") == 0
    assert [c.num_bytes for c in found.collectives] == [8 * 16 * 4]


def test_a_platform_that_says_nothing_is_refused():
    class Silent:
        def memory_analysis(self):
            return None

        def as_text(self):
            return None

    with pytest.raises(ValueError, match="gives no HLO or no memory analysis"):
        report(Silent())
