"""The byte reader, against bytes counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.hlo import Module
from jaxllm.traffic import accesses

# Three trips, each: look two rows up in a table, multiply with a weight through a library
# that takes a workspace, write the result into a cache. A weight is read once before.
CARRY = "(s32[], f32[100,4]{1,0}, bf16[8,4]{1,0}, bf16[50,8]{1,0}, /*index=4*/s32[2]{0})"
ARGUMENTS = "params: f32[100,4], weight.1: bf16[8,4], state: bf16[50,8], buffer: s32[2]"
TRIPS = 'backend_config={"known_trip_count":{"n":"3"}}'
TEXT = """HloModule jit_f, is_scheduled=true

%fused_gather (p.0: f32[100,4], p.1: s32[2]) -> bf16[2,4] {
  %p.0 = f32[100,4]{1,0} parameter(0)
  %p.1 = s32[2]{0} parameter(1)
  %rows = f32[2,4]{1,0} gather(%p.0, %p.1), slice_sizes={1,4}
  %twice = f32[2,4]{1,0} add(%rows, %rows)
  ROOT %narrow = bf16[2,4]{1,0} convert(%twice)
}

%fused_scatter (p.2: bf16[50,8], p.3: s32[2], p.4: bf16[2,8]) -> bf16[50,8] {
  %p.2 = bf16[50,8]{1,0} parameter(0)
  %p.3 = s32[2]{0} parameter(1)
  %p.4 = bf16[2,8]{1,0} parameter(2)
  %negative = bf16[2,8]{1,0} negate(%p.4)
  ROOT %scatter.1 = bf16[50,8]{1,0} scatter(%p.2, %p.3, %negative), to_apply=%second
}

%body (arg: CARRY) -> CARRY {
  %arg = CARRY parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %table = f32[100,4]{1,0} get-tuple-element(%arg), index=1
  %weight = bf16[8,4]{1,0} get-tuple-element(%arg), index=2
  %cache = bf16[50,8]{1,0} get-tuple-element(%arg), index=3
  %slots = s32[2]{0} get-tuple-element(%arg), index=4
  %x = bf16[2,4]{1,0} fusion(%table, %slots), kind=kLoop, calls=%fused_gather
  %gemm = (bf16[2,8]{1,0}, s8[4096]{0}) custom-call(%x, %weight), custom_call_target="mm"
  %y = bf16[2,8]{1,0} get-tuple-element(%gemm), index=0
  %written = bf16[50,8]{1,0} fusion(%cache, %slots, %y), kind=kInput, calls=%fused_scatter
  ROOT %tuple.1 = CARRY tuple(%i, %table, %weight, %written, %slots)
}

%always (arg.1: CARRY) -> pred[] {
  %arg.1 = CARRY parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

ENTRY %main (ARGUMENTS) -> bf16[50,8] {
  %params = f32[100,4]{1,0} parameter(0), metadata={op_name="params[0]"}
  %weight.1 = bf16[8,4]{1,0} parameter(1), metadata={op_name="params[1]"}
  %state = bf16[50,8]{1,0} parameter(2), metadata={op_name="state"}
  %buffer = s32[2]{0} parameter(3), metadata={op_name="buffer"}
  %total = bf16[8]{0} negate(%weight.1)
  %zero = s32[] constant(0)
  %tuple.2 = CARRY tuple(%zero, %params, %weight.1, %state, %buffer)
  %while.1 = CARRY while(%tuple.2), condition=%always, body=%body, TRIPS
  ROOT %done = bf16[50,8]{1,0} get-tuple-element(%while.1), index=3
}
"""
for word, text in {"CARRY": CARRY, "ARGUMENTS": ARGUMENTS, "TRIPS": TRIPS}.items():
    TEXT = TEXT.replace(word, text)

F32 = jnp.float32


def of(found):
    """(read, written) by argument; what is made on the way is "made"."""
    return {a.argument or "made": (a.read, a.written) for a in found}


def compiled(function, *shapes, **jit):
    text = jax.jit(function, **jit).lower(*shapes).compile().as_text()
    return of(accesses(Module(text)))


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_every_byte_of_a_program_written_by_hand():
    found = of(accesses(Module(TEXT)))

    assert found == {
        "params[0]": (3 * 2 * 4 * 4, 0),  # two rows a trip, and not the table
        "params[1]": (3 * 8 * 4 * 2 + 8 * 4 * 2, 0),  # once a trip, and once before
        "state": (0, 3 * 2 * 8 * 2),  # updates only, read or written
        "buffer": (3 * (2 + 2) * 4, 0),  # by the gather and by the scatter
        # x and y, written and read again in each trip, no workspace; `total` before.
        "made": (3 * (2 * 4 + 2 * 8) * 2, 3 * (2 * 4 + 2 * 8) * 2 + 8 * 2),
    }


def test_a_loop_whose_length_is_not_known_counts_once():
    once = of(accesses(Module(TEXT.replace("known_trip_count", "unknown"))))

    assert once["params[1]"] == (2 * 8 * 4 * 2, 0)


def test_a_product_reads_its_weight_once():
    found = compiled(lambda x, w: x @ w, array(8, 64), array(64, 32))

    assert found == {"x": (8 * 64 * 4, 0), "w": (64 * 32 * 4, 0), "made": (0, 8 * 32 * 4)}


def test_a_weight_that_two_products_read_counts_twice():
    assert compiled(lambda x, w: (x @ w) @ w, array(8, 64), array(64, 64))["w"] == (
        2 * 64 * 64 * 4,
        0,
    )


@pytest.mark.parametrize("steps", [1, 5])
def test_a_loop_reads_its_weight_in_each_step(steps):
    def run(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=steps)[0]

    assert compiled(run, array(8, 64), array(64, 64))["w"] == (steps * 64 * 64 * 4, 0)


def test_loops_in_loops_multiply():
    def inner(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    def outer(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: inner(x, w), x)

    assert compiled(outer, array(8, 64), array(64, 64))["w"] == (15 * 64 * 64 * 4, 0)


def test_a_lookup_reads_rows_of_the_table():
    found = compiled(
        lambda table, i: 2 * jnp.take(table, i, axis=0, mode="clip"),
        array(1000, 16),
        array(4, dtype=jnp.int32),
    )

    assert found["table"] == (4 * 16 * 4, 0)


def test_a_table_that_is_looked_up_and_multiplied_is_read_whole_and_by_rows():
    found = compiled(
        lambda i, table: jnp.take(table, i, axis=0, mode="clip") @ table.T,
        array(4, dtype=jnp.int32),
        array(1000, 64),
    )

    assert found["table"] == (1000 * 64 * 4 + 4 * 64 * 4, 0)


def test_a_slice_is_read_and_not_what_it_is_of():
    found = compiled(
        lambda w, i: jnp.sin(jax.lax.dynamic_slice_in_dim(w, i, 2)),
        array(100, 64),
        array(dtype=jnp.int32),
    )

    assert found["w"] == (2 * 64 * 4, 0)


@pytest.mark.parametrize("form", ["scatter", "slice"])
def test_an_update_in_place_costs_its_updates(form):
    def scatter(cache, rows, i):
        return cache.at[i + jnp.arange(4, dtype=jnp.int32)].set(rows, mode="promise_in_bounds")

    def update_slice(cache, rows, i):
        return jax.lax.dynamic_update_slice(cache, rows, (i, 0))

    function = {"scatter": scatter, "slice": update_slice}[form]
    shapes = array(1000, 16), array(4, 16), array(dtype=jnp.int32)

    assert compiled(function, *shapes, donate_argnums=0)["cache"] == (0, 4 * 16 * 4)


def test_updates_in_a_loop_count_once_a_trip():
    def fill(cache, row):
        return jax.lax.fori_loop(
            0, 6, lambda i, cache: jax.lax.dynamic_update_slice(cache, row, (i, 0)), cache
        )

    found = compiled(fill, array(1000, 16), array(1, 16), donate_argnums=0)

    assert found["cache"] == (0, 6 * 16 * 4)


def test_a_cache_that_is_not_donated_is_read_to_be_copied():
    found = compiled(
        lambda cache, row: jax.lax.dynamic_update_slice(cache, row, (3, 0)),
        array(1000, 16),
        array(1, 16),
    )

    assert found["cache"] == (1000 * 16 * 4, 0)
    assert found["made"][1] >= 1000 * 16 * 4


PAGED_TEXT = """HloModule jit_g

ENTRY %main (q: f32[2,3,4], new: f32[2,1,4], keys: f32[9,1,4,8], values: f32[9,1,8,4], i: s32[2], \
table: s32[2,3]) -> (f32[2,3,4], f32[9,1,4,8], f32[9,1,8,4]) {
  %q = f32[2,3,4]{2,1,0} parameter(0), metadata={op_name="q"}
  %new = f32[2,1,4]{2,1,0} parameter(1), metadata={op_name="new"}
  %keys = f32[9,1,4,8]{3,2,1,0} parameter(2), metadata={op_name="keys"}
  %values = f32[9,1,8,4]{3,2,1,0} parameter(3), metadata={op_name="values"}
  %i = s32[2]{0} parameter(4), metadata={op_name="i"}
  %table = s32[2,3]{1,0} parameter(5), metadata={op_name="table"}
  ROOT %call = (f32[2,3,4], f32[9,1,4,8], f32[9,1,8,4]) custom-call(%q, %new, %new, %keys, \
%values, /*index=5*/%i, %table), custom_call_target="TARGET", \
output_to_operand_aliasing={{1}: (3, {}), {2}: (4, {})}, api_version=API_VERSION_TYPED_FFI
}
"""


@pytest.mark.parametrize(
    ("target", "cache_read", "cache_written"),
    [
        ("jaxllm_paged_attention_float32_0123", 6 * 4 * 8 * 4, 2 * 4 * 4),  # pages of the table
        ("another", 9 * 4 * 8 * 4, 9 * 4 * 8 * 4),
    ],
)
def test_attention_s_kernel_reads_pages_and_writes_tokens(target, cache_read, cache_written):
    found = {a.argument: a for a in accesses(Module(PAGED_TEXT.replace("TARGET", target)))}

    for name in ("keys", "values"):
        assert (found[name].read, found[name].written) == (cache_read, cache_written)
    assert found["new"].read == 2 * 2 * 4 * 4  # keys and values
    assert found[None].written == 2 * 3 * 4 * 4
