"""Products of 16 bits where the processor has no instructions for them: through float32, and rounded once."""

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.utils import run_and_get_code

from larosa_compile.kernels import half, lowering, ops
from larosa_compile.kernels.cpp_gemm import multiplies_pairs
from larosa_compile.kernels.formats import FORMATS, pack, unpack

assert lowering  # importing it is what registers the lowerings

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def _no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "is_slow", lambda dtype: dtype.itemsize == 2)


@pytest.mark.usefixtures("_no_instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight_t = torch.randn(20, 300).to(dtype), torch.randn(300, 70).to(dtype)
    with torch.no_grad():
        y = half.product(x, weight_t)
    expected = x.double() @ weight_t.double()
    assert y.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2.0**-18 * (x.double().abs() @ weight_t.double().abs())
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.usefixtures("_no_instructions")
def test_gradients_are_those_of_the_product() -> None:
    with torch.enable_grad():
        x, weight_t = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(8, 5).bfloat16()
        half.product(x, weight_t).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3, 5).bfloat16() @ weight_t.T)


@pytest.mark.usefixtures("_no_instructions")
@pytest.mark.parametrize("packed", [False, True])
def test_many_rows_are_multiplied_in_float32(packed: bool) -> None:
    form = FORMATS["int8"]
    # with narrow vectors no processor multiplies pairs
    with inductor_config.patch({"cpp.simdlen": 256}):
        x, weight_t = torch.randn(20, 300).bfloat16(), torch.randn(300, 70).bfloat16()
        if packed:
            stored = pack(weight_t, form)
            weight_t = unpack(stored, 300, 70, form)
            made = torch.compile(lambda x, w: ops.sparse_linear_packed(x, w, 300, 70, form.name))
            y, (code,) = run_and_get_code(made, x, stored)
        else:
            y, (code,) = run_and_get_code(torch.compile(lambda x, w: ops.sparse_linear(x, w, 300)), x, weight_t)
    assert "extern_kernels.mm(" in code and "torch.float32" in code
    expected = x.double() @ weight_t.double()
    assert bool(((y.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-3).all())


def test_what_this_processor_has() -> None:
    assert not half.is_slow(torch.float32)
    # what has instructions for the template has them for the library
    assert not (multiplies_pairs() and half.is_slow(torch.bfloat16))
