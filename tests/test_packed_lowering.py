"""The CPU kernels over weights in fewer bits, against float64 products with the weights that they stand for."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from larosa_compile.kernels import half, lowering, ops, reference
from larosa_compile.kernels.cpp_gemm import multiplies_pairs
from larosa_compile.kernels.formats import FORMATS, KNOWN, WeightFormat, pack, unpack

assert lowering.__name__ in sys.modules  # importing it is what registers the lowerings

EACH = pytest.mark.parametrize("form", KNOWN.values(), ids=lambda form: form.name)
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def assert_is_product(y: Tensor, x: Tensor, weight: Tensor, k: int | None) -> None:
    """Each output within the rounding of its terms' magnitudes: one to `y`'s dtype, and float32 sums."""
    kept = (x if k is None else reference.sparsify(x, k)).double()
    expected, size = kept @ weight.double(), kept.abs() @ weight.double().abs()
    assert y.shape == expected.shape
    # codes of 4 bits are multiplied with an offset of up to 136, which comes off again
    rounding = EPSILON[y.dtype] * expected.abs().clamp(min=torch.finfo(y.dtype).smallest_normal)
    bound = rounding + 2.0**-18 * size + kept.abs().amax() * 2.0**-18
    assert bool(((y.double() - expected).abs() <= bound).all())


def as_multiplied(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense product of many rows reads weights that were rounded to x's dtype, unless it is made in float32."""
    return weight if half.is_slow(dtype) else weight.to(dtype)


def products(form: WeightFormat, columns: int, ks: tuple[int | None, ...]) -> Callable[..., Any]:
    def fn(x: Tensor, packed: Tensor) -> list[Tensor]:
        return [ops.sparse_linear_packed(x, packed, k, columns, form.name) for k in ks]

    return torch.compile(fn)


@EACH
@pytest.mark.parametrize("dtype", EPSILON)
def test_one_row_at_odd_sizes(form: WeightFormat, dtype: torch.dtype) -> None:
    features, columns, ks = 101, 333, (1, 40, 101, None)
    weight = torch.randn(features, columns)
    packed = pack(weight, form)
    meant = unpack(packed, features, columns, form)
    compiled = products(form, columns, ks)
    x = torch.randn(1, features).to(dtype)
    results, codes = run_and_get_code(compiled, x, packed)
    assert "larosa_packed_gemv" in codes[0]
    assert "extern_kernels." not in codes[0] and "torch.ops.larosa" not in codes[0]
    for k, y in zip(ks, results, strict=True):
        assert_is_product(y, x, meant, k)
    spiky = x * 4 ** torch.randn(1, features).to(dtype) * (torch.rand(1, features) < 0.7)
    for k, y in zip(ks, compiled(spiky, packed), strict=True):
        assert_is_product(y, spiky, meant, k)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "features", "columns"), [(5, 130, 200), (12, 131, 200), (12, 130, 200), (515, 1030, 9)]
)
def test_more_rows(form: WeightFormat, dtype: torch.dtype, rows: int, features: int, columns: int) -> None:
    """Many rows read codes as they are where pairs are multiplied, else a weight that was unpacked first."""
    k = 50
    packed = pack(torch.randn(features, columns), form)
    x = torch.randn(rows, features).to(dtype)
    (y,), codes = run_and_get_code(products(form, columns, (k,)), x, packed)
    in_pairs = dtype == torch.bfloat16 and features % 2 == 0 and multiplies_pairs()
    many = "larosa_packed_gemm" if in_pairs else "larosa_unpack"
    assert ("larosa_packed_gemv" if rows <= 8 else many) in codes[0]
    assert ("extern_kernels.mm(" in codes[0]) == (rows > 8 and not in_pairs)
    meant = unpack(packed, features, columns, form)
    assert_is_product(y, x, meant if rows <= 8 else as_multiplied(meant, dtype), k)


@EACH
@pytest.mark.parametrize("build", ["avx2", "plain"])
def test_narrower_vectors_or_none(form: WeightFormat, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if build == "plain":
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    features, columns, k = 96, 330, 40
    packed = pack(torch.randn(features, columns), form)
    x = torch.randn(2, features).bfloat16()

    def fn(x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        one = ops.sparse_linear_packed(x[:1], packed, k, columns, form.name)
        return one, ops.sparse_linear_packed(x.repeat(5, 1), packed, k, columns, form.name)

    with inductor_config.patch({"cpp.simdlen": 256} if build == "avx2" else {}):
        (one, many), codes = run_and_get_code(torch.compile(fn), x, packed)
    assert "larosa_packed_gemv" in codes[0] and "larosa_unpack" in codes[0]
    meant = unpack(packed, features, columns, form)
    assert_is_product(one, x[:1], meant, k)
    assert_is_product(many, x.repeat(5, 1), as_multiplied(meant, x.dtype), k)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", ["widest", "avx2"])
def test_entries_far_apart_and_no_numbers(form: WeightFormat, dtype: torch.dtype, build: str) -> None:
    """Entries that are no whole numbers of one unit, and such as have none: sums are of the same exactness."""
    features, columns = 150, 130
    packed = pack(torch.randn(features, columns), form)
    meant = unpack(packed, features, columns, form)
    compiled = products(form, columns, (None,))
    tiny, large = torch.finfo(dtype).smallest_normal / 4, 2.0**13 if dtype == torch.float16 else 1e33
    x = torch.randn(1, features).to(dtype)
    rows = {
        "zero": torch.zeros_like(x),
        "far apart": torch.where(torch.arange(features) % 5 == 1, x * 2**10, x),
        "below the normal range": x * tiny,
        "large": torch.where(torch.arange(features) == 77, torch.tensor(large, dtype=dtype), x),
    }
    with inductor_config.patch({"cpp.simdlen": 256} if build == "avx2" else {}):
        for row in rows.values():
            assert_is_product(compiled(row, packed)[0], row, meant, None)
        for special in (torch.nan, torch.inf):
            row = torch.where(torch.arange(features) == 140, torch.tensor(special, dtype=dtype), x)
            y = compiled(row, packed)[0]
            assert not y[0, meant[140] != 0].isfinite().any()


@EACH
@pytest.mark.parametrize("build", ["widest", "avx2"])
def test_sums_of_the_largest_codes(form: WeightFormat, build: str) -> None:
    """Lowest and highest codes side by side in every combination, met by entries of all bits, 64 lines of one scale."""
    features, columns = 256, 256
    signs = torch.stack([torch.arange(columns) >> bit & 1 for bit in range(8)]).repeat(features // 8, 1) * 2.0 - 1
    packed = pack(signs, form)
    meant = unpack(packed, features, columns, form)
    assert torch.equal(meant.sign(), signs)
    x = torch.full((3, features), 255.0).bfloat16()
    x[1], x[2, ::3] = -x[1], -1.0
    with inductor_config.patch({"cpp.simdlen": 256} if build == "avx2" else {}):
        compiled = products(form, columns, (None, 200))
        for rows in (x, x[:1], x[2:]):
            for k, y in zip((None, 200), compiled(rows, packed), strict=True):
                assert_is_product(y, rows, meant, k)


@EACH
def test_an_epilogue_is_fused_and_columns_are_split(form: WeightFormat) -> None:
    features, columns, k = 80, 20000, 30
    packed, x = pack(torch.randn(features, columns), form), torch.randn(1, features).bfloat16()

    def fn(x: Tensor, packed: Tensor) -> Tensor:
        return torch.relu(ops.sparse_linear_packed(x, packed, k, columns, form.name)) * 2

    y, codes = run_and_get_code(torch.compile(fn), x, packed)
    assert codes[0].count("async_compile.cpp_pybinding(") == 1
    product = reference.sparse_linear_packed(x, packed, k, columns, form.name).double()
    assert torch.allclose(y.double(), product.relu() * 2, rtol=2**-6, atol=2**-6 * float(product.abs().max()))


def test_what_a_weight_does_not_fit_is_refused() -> None:
    form = FORMATS["int4"]
    packed = pack(torch.ones(64, 64), form)
    with pytest.raises(ValueError, match=r"\[1, 64\]"):
        ops.sparse_linear_packed(torch.ones(1, 64), packed, 65, 64, "int4")
    with pytest.raises(ValueError, match="one of 'int8', 'int4'"):
        ops.sparse_linear_packed(torch.ones(1, 64), packed, 5, 64, "int5")
    with pytest.raises(ValueError, match="is uint8"):
        ops.sparse_linear_packed(torch.ones(1, 64), packed, 5, 700, "int4")
    on_meta = packed.to("meta")
    with pytest.raises(RuntimeError, match="x has 63 features but packed holds 64"):
        ops.sparse_linear_packed(torch.ones(1, 63, device="meta"), on_meta, 5, 64, "int4")
    with pytest.raises(RuntimeError, match="700 columns take 384 bytes, packed has 64"):
        ops.sparse_linear_packed(torch.ones(1, 64, device="meta"), on_meta, 5, 700, "int4")


@EACH
def test_opcheck(form: WeightFormat) -> None:
    torch.library.opcheck(
        ops.sparse_linear_packed, (torch.randn(3, 70), pack(torch.randn(70, 9), form), 5, 9, form.name)
    )
