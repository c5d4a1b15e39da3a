"""CPU products of more rows than can share what they keep: every weight is read, in panels or by Inductor's product."""

import sys

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from larosa_compile.kernels import lowering, ops
from larosa_compile.kernels.cpp_gemm import multiplies_pairs
from tests.support.products import assert_is_product

assert lowering.__name__ in sys.modules  # importing it is what registers the lowerings

IN, OUT, K = 96, 330, 40

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_more_rows_sparsify_then_multiply() -> None:
    weight_t, bias = torch.randn(IN, 50).bfloat16(), torch.randn(50).bfloat16()
    x = torch.randn(300, IN).bfloat16()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_static(weight_t)
    compiled = torch.compile(lambda x, w, b: (ops.sparse_linear(x, w, K), ops.sparse_linear(x, w, IN) + b))
    (y, dense), codes = run_and_get_code(compiled, x, weight_t, bias)
    assert "larosa_sparsify" in codes[0] and "larosa_sparse_gemv" not in codes[0]
    if multiplies_pairs():
        assert "larosa_gemm" in codes[0] and "extern_kernels." not in codes[0]
    else:
        assert codes[0].count("extern_kernels.mm(") == 2
    assert_is_product(y, x, weight_t, K)
    # where the bias is added before the only rounding
    assert torch.allclose(dense.double(), x.double() @ weight_t.double() + bias.double(), rtol=2**-7, atol=0.15)
    fewer = torch.randn(3, IN).bfloat16()
    assert_is_product(compiled(fewer, weight_t, bias)[0], fewer, weight_t, K)


@pytest.mark.skipif(not multiplies_pairs(), reason="needs AVX512_BF16")
@pytest.mark.parametrize(("rows", "features", "columns"), [(9, 2, 1), (130, 1030, 205), (515, 96, 330)])
def test_many_rows_go_by_panels(rows: int, features: int, columns: int) -> None:
    """Sizes beyond one block, panel and chunk, none of them a multiple; with an epilogue."""
    x, weight_t = torch.randn(rows, features).bfloat16(), torch.randn(features, columns).bfloat16()
    r, k = torch.randn(rows, columns).bfloat16(), features // 2

    def fn(x: Tensor, weight_t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sparse_linear(x, weight_t, k), ops.sparse_linear(x, weight_t, None) + r

    (y, added), (code,) = run_and_get_code(torch.compile(fn, dynamic=False), x, weight_t, r)
    assert "larosa_gemm" in code and "extern_kernels." not in code and code.count("async_compile.cpp_pybinding(") == 3
    assert_is_product(y, x, weight_t, k)
    assert torch.allclose(added.double(), x.double() @ weight_t.double() + r.double(), rtol=2**-7, atol=0.3)


def test_many_rows_where_features_are_odd_or_the_weight_is_as_modules_store_it() -> None:
    """Neither is copied for a kernel of ours: Inductor's product takes both as they are."""
    x, odd, stored = (
        torch.randn(12, IN).bfloat16(),
        torch.randn(IN - 1, OUT).bfloat16(),
        torch.randn(OUT, IN).bfloat16(),
    )

    def fn(x: Tensor, odd: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sparse_linear(x[:, 1:], odd, K), ops.sparse_linear(x, stored.t(), None)

    (y, whole), (code,) = run_and_get_code(torch.compile(fn), x, odd, stored)
    assert code.count("extern_kernels.mm(") == 2 and "larosa_gemm" not in code
    assert_is_product(y, x[:, 1:], odd, K)
    assert_is_product(whole, x, stored.t(), None)
