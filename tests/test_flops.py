"""Operations of compiled programs: every product as often as it runs."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.flops import flops
from jaxllm.hlo import Module
from jaxllm.native.build import target, unavailable
from jaxllm.pallas_kernels.linear import linear

ONE = 2 * 8 * 16 * 32
X, W = jnp.ones((8, 32)), jnp.ones((16, 32))


def product(x, w):
    return jnp.einsum("tk,nk->tn", x, w)


def counted(function, *arrays):
    return flops(Module(jax.jit(function).lower(*arrays).compile().as_text()))


def test_a_product_is_two_operations_a_pair():
    assert counted(product, X, W) == ONE


@pytest.mark.skipif(bool(unavailable("float32")), reason="no C++ compiler here")
def test_a_product_of_our_kernel_is_counted_as_any_other():
    kernel = target("linear", "float32")
    assert counted(lambda x, w: linear(x, w, None, jnp.float32, kernel), X, W) == ONE


def test_a_loop_multiplies_what_is_in_it():
    def seven(x, w):
        def body(i, x):
            return x + 1e-3 * product(x, w) @ jnp.ones((16, 32))

        return jax.lax.fori_loop(0, 7, body, x)

    assert counted(seven, X, W) == 7 * 2 * ONE


def test_loops_in_loops_multiply():
    def nested(x, w):
        def inner(i, x):
            return x + 1e-3 * product(x, w).sum() * x

        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.fori_loop(0, 5, inner, x), x)

    assert counted(nested, X, W) == 3 * 5 * ONE


def test_batched_products_and_fused_ones_count():
    def batched(x, w):
        return jax.nn.relu(jnp.einsum("btk,bnk->btn", x, w)) + 1

    assert counted(batched, jnp.ones((4, 8, 32)), jnp.ones((4, 16, 32))) == 4 * ONE


def test_what_multiplies_no_matrices_is_of_no_account():
    assert counted(lambda x: jnp.sin(x) * x + x.sum(), X) == 0


CUBLAS = """
ENTRY %main (a: bf16[8,32], b: bf16[16,32]) -> bf16[8,16] {
  %a = bf16[8,32]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %gemm = (bf16[8,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%gemm), index=0
}
"""


def test_products_of_cublas_count():
    assert flops(Module(CUBLAS)) == ONE
