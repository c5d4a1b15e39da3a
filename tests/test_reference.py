"""The reference is checked against torch.topk on float64 magnitudes, and against its own laws."""

import pytest
import torch

from larosa_compile.kernels import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_bits_order_is_magnitude_order(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    ascending = torch.tensor([0.0, tiny / 4, tiny / 2, tiny, 1.0, 1.5, 3e4, float("inf"), float("nan")], dtype=dtype)
    bits = reference.magnitude_bits(ascending)
    assert (bits.diff() > 0).all()
    assert torch.equal(reference.magnitude_bits(-ascending), bits)


def test_magnitude_bits_names_the_allowed_dtypes() -> None:
    with pytest.raises(TypeError, match=r"bfloat16.*float16.*float32.*got torch.float64"):
        reference.magnitude_bits(torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 50, 99, 100])
def test_keep_mask_is_topk_with_all_ties(dtype: torch.dtype, k: int) -> None:
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(k)).to(dtype)
    magnitude = x.double().abs()
    kth = magnitude.topk(k, dim=-1).values[:, -1:]
    assert torch.equal(reference.keep_mask(x, k), magnitude >= kth)


def test_ties_are_all_kept() -> None:
    x = torch.tensor([[3.0, -2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, 0.0, 0.0]])
    mask = reference.keep_mask(x, 2)
    assert mask.tolist() == [[True, True, True, False, True], [True] * 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_kept_and_nan_propagates(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, -nan, 2.0, 3.0], [1.0, -inf, 2.0, 3.0]], dtype=dtype)
    kept = reference.sparsify(x, 1)
    assert kept[0].isnan().tolist() == [False, True, False, False]
    assert kept[1].tolist() == [0.0, -inf, 0.0, 0.0]
    assert reference.sparse_linear(x, torch.ones(4, 3, dtype=dtype), 1)[0].isnan().all()


def test_subnormals_are_ranked_exactly() -> None:
    step = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    x = torch.arange(1, 9, dtype=torch.float32)[None] * step
    assert reference.keep_mask(x, 3).tolist() == [[False] * 5 + [True] * 3]


def test_any_rank_and_any_strides() -> None:
    x = torch.randn(3, 5, 16)
    transposed = x.transpose(0, 2)
    assert torch.equal(reference.sparsify(transposed, 2), reference.sparsify(transposed.contiguous(), 2))
    assert torch.equal(reference.sparsify(x, 16), x)


@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_outside_the_features_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=rf"\[1, 8\], got {k}"):
        reference.sparsify(torch.ones(2, 8), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_linear_is_the_product_of_the_kept(dtype: torch.dtype) -> None:
    x, weight_t = torch.randn(3, 64).to(dtype), torch.randn(64, 33).to(dtype)
    kept = reference.sparsify(x, 20).double()
    bound = 2 * torch.finfo(dtype).eps * (kept.abs() @ weight_t.double().abs())
    error = (reference.sparse_linear(x, weight_t, 20).double() - kept @ weight_t.double()).abs()
    assert (error <= bound).all()
