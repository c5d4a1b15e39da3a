"""The CPU lowerings: generated kernels against float64, over rows, dtypes, layouts and fused epilogues."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from larosa_compile.kernels import lowering, ops, reference
from tests.support.products import assert_is_product, special_rows

assert lowering.__name__ in sys.modules  # importing it is what registers the lowerings

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IN, OUT, K = 96, 330, 40


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compile_and_run(fn: Callable[..., Any], *args: Tensor, dynamic: bool | None = None) -> tuple[Any, str]:
    """What the compiled `fn` returns, and all code Inductor generated for it."""
    result, codes = run_and_get_code(torch.compile(fn, dynamic=dynamic), *args)
    return result, "\n".join(codes)


def kernels_in(code: str) -> int:
    return code.count("async_compile.cpp_pybinding(")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_streams_the_kept_rows(dtype: torch.dtype) -> None:
    features, ks = 101, (1, 40, 101, None)
    weight_t = torch.randn(features, 333).to(dtype)

    def fn(x: Tensor, weight_t: Tensor) -> list[Tensor]:
        return [ops.sparse_linear(x, weight_t, k) for k in ks]

    compiled = torch.compile(fn)
    _, codes = run_and_get_code(compiled, torch.ones(1, features, dtype=dtype), weight_t)
    assert "larosa_sparse_gemv" in codes[0]
    assert "extern_kernels." not in codes[0] and "torch.ops.larosa" not in codes[0]
    for row in special_rows(features, dtype).values():
        for k, y in zip(ks, compiled(row, weight_t), strict=True):
            assert_is_product(y, row, weight_t, k)


@pytest.mark.parametrize("build", ["avx2", "plain"])
def test_narrower_vectors_or_none(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if build == "plain":
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    x, weight_t = torch.randn(2, IN).bfloat16(), torch.randn(IN, OUT).bfloat16()

    def fn(x: Tensor, weight_t: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sparse_linear(x[:1], weight_t, K), ops.sparsify(x, K)

    with inductor_config.patch({"cpp.simdlen": 256} if build == "avx2" else {}):
        (y, kept), code = compile_and_run(fn, x, weight_t)
    assert "larosa_sparse_gemv" in code and "larosa_sparsify" in code
    assert_is_product(y, x[:1], weight_t, K)
    assert torch.equal(kept, reference.sparsify(x, K))


@pytest.mark.parametrize("columns", [1, 9001])
def test_column_splits_with_tails(columns: int) -> None:
    x, weight_t = torch.randn(1, 64).bfloat16(), torch.randn(64, columns).bfloat16()
    y, _ = compile_and_run(lambda x, w: ops.sparse_linear(x, w, 32), x, weight_t)
    assert isinstance(y, Tensor)
    assert_is_product(y, x, weight_t, 32)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 3), (torch.float16, 2), (torch.float32, 8)])
def test_a_few_rows_share_one_pass_over_the_weight(dtype: torch.dtype, rows: int) -> None:
    """Each row with its own selection, special rows among them, over columns that fill no vector; with an epilogue.
    Two that differ in k alone have one kernel."""
    features, columns, ks = 101, 205, (1, 40, 101, None)
    weight_t, r = torch.randn(features, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    special = torch.cat([row for name, row in special_rows(features, dtype).items() if name != "infinity"])

    def fn(x: Tensor, weight_t: Tensor, r: Tensor) -> list[Tensor]:
        products = [ops.sparse_linear(x, weight_t, k) for k in ks]
        return [*products, F.relu(ops.sparse_linear(x, weight_t, 7) + r)]

    compiled = torch.compile(fn)
    _, codes = run_and_get_code(compiled, torch.ones(rows, features, dtype=dtype), weight_t, r)
    assert "larosa_sparse_gemv" in codes[0] and "extern_kernels." not in codes[0] and kernels_in(codes[0]) == 4
    for x in (torch.randn(rows, features).to(dtype), special.repeat(2, 1)[:rows], special[-rows:].repeat(2, 1)[:rows]):
        *products, activated = compiled(x, weight_t, r)
        for k, y in zip(ks, products, strict=True):
            assert_is_product(y, x, weight_t, k)
        wide = F.relu(reference.sparsify(x, 7).double() @ weight_t.double() + r.double())
        assert torch.allclose(activated.double(), wide, rtol=0.02, atol=0.1, equal_nan=True)


def _rope(y: Tensor, r: Tensor) -> Tensor:
    heads, cos = y.view(1, 11, 30), r.view(1, 11, 30)
    return heads * cos + torch.cat([-heads[..., 15:], heads[..., :15]], dim=-1)


def _realized_twice(y: Tensor, transform: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    activated = F.silu(y)
    return activated, transform(activated)


# name -> (what follows the linear y [1, OUT], given r [1, OUT]; whether it must be fused into one kernel)
EPILOGUES: dict[str, tuple[Callable[[Tensor, Tensor], object], bool]] = {
    "bias": (lambda y, r: y + r[0], True),
    "residual": (lambda y, r: y + r, True),
    "silu": (lambda y, r: F.silu(y), True),
    "view": (lambda y, r: y.view(1, 1, OUT) * 2 + r, True),
    "heads transposed": (lambda y, r: y.view(1, 1, 11, 30).transpose(1, 2) * 2, True),
    "result used too": (lambda y, r: (y, F.silu(y) + r), True),
    "two pointwise users and a reduction": (lambda y, r: (y + 1, F.silu(y) + r, y.amax()), False),
    "slice": (lambda y, r: y[:, 10:200] * 3, False),
    "different slices": (lambda y, r: (y[:, :100] * 2, F.silu(y[:, 100:]), y[:, 50:150]), False),
    "swiglu halves": (lambda y, r: F.silu(y[:, : OUT // 2]) * y[:, OUT // 2 :], False),
    "rope": (_rope, False),
    "broadcast of an activation": (lambda y, r: _realized_twice(y, lambda a: a + r.view(-1, 1)[:4]), False),
    "permuted copy": (
        lambda y, r: _realized_twice(y, lambda a: (a.view(11, 30).t() * 2).contiguous()),
        False,
    ),
    "norm after residual": (lambda y, r: (y + r, F.rms_norm(y + r, (OUT,))), False),
    "float32 out": (lambda y, r: y.float() * 2.5, True),
}


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogue(name: str) -> None:
    epilogue, fused = EPILOGUES[name]
    x, weight_t, r = (
        torch.randn(1, IN).bfloat16(),
        torch.randn(IN, OUT).bfloat16(),
        torch.randn(1, OUT).bfloat16(),
    )
    result, code = compile_and_run(lambda x, w, r: epilogue(ops.sparse_linear(x, w, K), r), x, weight_t, r)
    # bfloat16 values are float32 values of the same order: the selection is the same
    expected = epilogue(ops.sparse_linear(x.float(), weight_t.float(), K), r.float())
    results, expecteds = (list(t) if isinstance(t, tuple) else [t] for t in (result, expected))
    for got, want in zip(results, expecteds, strict=True):
        # at most four bfloat16 roundings (half an eps each) of values no larger than twice the largest result
        bound = 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert ((got.float() - want).abs() <= bound).all()
    assert "larosa_sparse_gemv" in code and "extern_kernels." not in code
    if fused:
        assert kernels_in(code) == 1


def test_gemvs_feed_each_other() -> None:
    x, w1, w2, w3 = torch.randn(1, IN), torch.randn(IN, OUT), torch.randn(IN, OUT), torch.randn(OUT, 50)

    def mlp(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(ops.sparse_linear(x, w1, K)) * ops.sparse_linear(x, w2, K)
        return hidden, ops.sparse_linear(hidden, w3, 100)

    (hidden, y), codes = run_and_get_code(torch.compile(mlp), x, w1, w2, w3)
    assert kernels_in(codes[0]) == 3  # silu and the product are fused behind one of the first two
    expected = mlp(x, w1, w2, w3)[0]
    # two factors, each a sum of K terms
    tolerance = 2 * K * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(hidden, expected, rtol=0, atol=tolerance)
    assert_is_product(y, hidden, w3, 100)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[2:3, 7 : 7 + IN],  # an offset
        lambda x: x[1:2, ::5],  # neither stride is one
        lambda x: x.view(-1)[: 5 * IN].view(IN, 5)[:, 2:3].t(),  # a column
    ],
    ids=["offset", "strided", "column"],
)
def test_views_of_the_input(view: Callable[[Tensor], Tensor]) -> None:
    x, weight_t = torch.randn(3, 5 * IN).bfloat16(), torch.randn(IN, 50).bfloat16()
    y, code = compile_and_run(lambda x, w: ops.sparse_linear(view(x), w, K), x, weight_t)
    assert isinstance(y, Tensor)
    assert "larosa_sparse_gemv" in code
    assert_is_product(y, view(x), weight_t, K)


def test_a_transposed_weight_is_made_contiguous() -> None:
    x, weight = torch.randn(1, IN), torch.randn(50, IN)
    y, code = compile_and_run(lambda x, w: ops.sparse_linear(x, w.t(), K), x, weight)
    assert isinstance(y, Tensor)
    assert "larosa_sparse_gemv" in code
    assert_is_product(y, x, weight.t(), K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_weight_is_read_as_modules_store_it(dtype: torch.dtype) -> None:
    """One dot product per output, over features and outputs that fill no vector and no tile."""
    x, weight, bias = torch.randn(1, 101).to(dtype), torch.randn(331, 101).to(dtype), torch.randn(331).to(dtype)
    (y, biased), code = compile_and_run(
        lambda x, w, b: (ops.sparse_linear(x, w.t(), 101), ops.sparse_linear(x, w[:7].t(), 101) + b[:7]),
        x,
        weight,
        bias,
    )  # type: ignore[misc]
    assert "larosa_dot_gemv" in code and "larosa_sparse_gemv" not in code
    assert_is_product(y, x, weight.t(), 101)
    close = torch.allclose(biased.double(), x.double() @ weight[:7].double().t() + bias[:7], rtol=0.02, atol=0.1)
    assert close and kernels_in(code) == 2


def test_last_token_of_a_dynamic_sequence_is_one_row() -> None:
    hidden, weight_t = torch.randn(7, IN), torch.randn(IN, 50)
    torch._dynamo.mark_dynamic(hidden, 0)
    compiled = torch.compile(lambda h, w: ops.sparse_linear(h[-1:], w, K))
    y, codes = run_and_get_code(compiled, hidden, weight_t)
    assert "larosa_sparse_gemv" in codes[0]
    assert_is_product(y, hidden[-1:], weight_t, K)
    longer = torch.randn(12, IN)
    assert_is_product(compiled(longer, weight_t), longer[-1:], weight_t, K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparsify_is_exactly_the_reference(dtype: torch.dtype) -> None:
    features, ks = 101, (1, 40, 101)
    compiled = torch.compile(lambda x: [ops.sparsify(x, k) for k in ks])
    x = torch.cat(list(special_rows(features, dtype).values()))
    torch._dynamo.mark_dynamic(x, 0)
    results, codes = run_and_get_code(compiled, x)
    assert "larosa_sparsify" in codes[0] and "torch.ops.larosa" not in codes[0]
    for more_rows in (x, x.repeat(20, 1)):
        for k, y in zip(ks, compiled(more_rows), strict=True):
            expected = reference.sparsify(more_rows, k)
            assert y.is_contiguous()
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert len(results) == len(ks)


def test_sparsify_layouts_and_epilogues() -> None:
    x = torch.randn(IN, 17).bfloat16()

    def fn(x: Tensor) -> list[Tensor]:
        kept, activated = ops.sparsify(x.t(), K), F.silu(ops.sparsify(x.t(), K + 1))
        return [kept * 2 + 1, kept, activated, (activated.t() * 2).contiguous()]

    results, code = compile_and_run(fn, x)
    assert "larosa_sparsify" in code
    assert isinstance(results, list)
    for got, want in zip(results, fn(x), strict=True):
        torch.testing.assert_close(got, want)


def test_lane_counters_do_not_overflow() -> None:
    x = torch.randn(1, 1_100_003).bfloat16()  # more than 32767 entries in each of 32 lanes
    k = 1_090_000
    y, _ = compile_and_run(lambda x: ops.sparsify(x, k), x)
    assert isinstance(y, Tensor)
    assert torch.equal(y, reference.sparsify(x, k))


def test_symbolic_weights_fall_back_to_eager() -> None:
    x, weight_t = torch.randn(5, IN), torch.randn(IN, 50)
    y, code = compile_and_run(lambda x, w: ops.sparse_linear(x, w, K), x, weight_t, dynamic=True)
    assert "torch.ops.larosa.sparse_linear" in code
    assert isinstance(y, Tensor)
    assert torch.equal(y, ops.sparse_linear(x, weight_t, K))
