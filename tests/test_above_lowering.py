"""The lowering of `keep_above` on a CPU: what it keeps is the reference's, and it is no kernel of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from larosa_compile.kernels import ops, reference
from tests.support.products import assert_is_product, special_rows
from tests.test_lowering import IN, compile_and_run, kernels_in

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_reaches_a_threshold_is_kept_and_read(dtype: torch.dtype) -> None:
    """Of one row and of many, every special row among them."""
    features, relatives = 101, (False, True)
    weight_t = torch.randn(features, 33).to(dtype)

    def fn(x: Tensor, weight_t: Tensor) -> list[Tensor]:
        kept = [ops.keep_above(x, 0.9, relative) for relative in relatives]
        return [*kept, *(ops.sparse_linear(y, weight_t, None) for y in kept)]

    rows = special_rows(features, dtype)
    compiled = torch.compile(fn, dynamic=False)
    # the library that multiplies many rows takes subnormals for zeros
    many = torch.cat([row for name, row in rows.items() if name != "subnormals"]).repeat(2, 1)
    for x in (*rows.values(), many):
        found = compiled(x, weight_t)
        for relative, kept, product in zip(relatives, found[:2], found[2:], strict=True):
            expected = reference.keep_above(x, 0.9, relative)
            torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)
            assert_is_product(product, kept, weight_t, None)


def test_a_threshold_adds_no_kernel() -> None:
    """It joins the activation function in front of it, whose result alone is stored."""
    gate, up, weight_t = torch.randn(1, IN).bfloat16(), torch.randn(1, IN).bfloat16(), torch.randn(IN, 50).bfloat16()

    def fn(gate: Tensor, up: Tensor, weight_t: Tensor) -> Tensor:
        return ops.sparse_linear(ops.keep_above(F.silu(gate) * up, 0.3, False), weight_t, None)

    y, code = compile_and_run(fn, gate, up, weight_t)
    assert kernels_in(code) == 2
    torch.testing.assert_close(y.float(), fn(gate.float(), up.float(), weight_t.float()), rtol=0.05, atol=0.05)
