"""Products of 16 bits where the processor has no instructions for them: through float32, and rounded once."""

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

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
@pytest.mark.parametrize("output_major", [False, True])
def test_a_product_is_rounded_once(dtype: torch.dtype, output_major: bool) -> None:
    x, weight_t, bias = torch.randn(20, 300).to(dtype), torch.randn(300, 70).to(dtype), torch.randn(70).to(dtype)
    weight_t = weight_t.T.contiguous().T if output_major else weight_t
    with torch.no_grad():
        found = half.product(x, weight_t), half.product_and_bias(bias, x, weight_t)
    size = 2.0**-18 * (x.double().abs() @ weight_t.double().abs() + bias.double().abs())
    for y, added in zip(found, (torch.zeros_like(bias), bias), strict=True):
        expected = x.double() @ weight_t.double() + added.double()
        assert y.dtype == dtype
        assert bool(((y.double() - expected).abs() <= torch.finfo(dtype).eps / 2 * expected.abs() + size).all())


@pytest.mark.usefixtures("_no_instructions")
@pytest.mark.parametrize("rows", [2, 20])
def test_products_of_a_graph(rows: int) -> None:
    """Those that are products alone; what they compute stays the same."""

    def fn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x @ weight.t(), torch.addmm(bias, x, weight.t()), torch.addmm(bias, x, weight.t(), beta=2)

    values = torch.randn(rows, 8).bfloat16(), torch.randn(6, 8).bfloat16(), torch.randn(6).bfloat16()
    module = make_fx(fn)(*values)
    half.replace_products(module.graph)
    module.recompile()
    called = {node.target for node in module.graph.nodes if node.op == "call_function"}
    assert called == {half.product, half.product_and_bias, torch.ops.aten.addmm.default, torch.ops.aten.t.default}
    with torch.no_grad():
        for found, expected in zip(module(*values), fn(*(value.double() for value in values)), strict=True):
            assert found.dtype == torch.bfloat16
            assert torch.allclose(found.double(), expected, rtol=2**-7, atol=2**-6)


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
