"""The registered ops: their contract with torch.compile, and eager equals the reference."""

import pytest
import torch

from larosa_compile.kernels import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight_t = torch.randn(3, 16).to(dtype), torch.randn(16, 8).to(dtype)
    torch.library.opcheck(ops.sparsify, (x, 5))
    torch.library.opcheck(ops.sparsify, (x.t(), 2))
    torch.library.opcheck(ops.sparse_linear, (x, weight_t, 5))
    torch.library.opcheck(ops.sparse_linear, (x, weight_t, 16))


def test_eager_is_the_reference() -> None:
    x, weight_t = torch.randn(4, 32), torch.randn(32, 9)
    assert torch.equal(ops.sparsify(x, 7), reference.sparsify(x, 7))
    assert torch.equal(ops.sparse_linear(x, weight_t, 7), reference.sparse_linear(x, weight_t, 7))


def test_k_equal_to_features_is_dense() -> None:
    x, weight_t = torch.randn(4, 32), torch.randn(32, 9)
    assert torch.equal(ops.sparsify(x, 32), x)
    assert torch.equal(ops.sparse_linear(x, weight_t, 32), x @ weight_t)


@pytest.mark.parametrize("k", [3, 8])
def test_sparsify_is_contiguous_and_does_not_alias(k: int) -> None:
    x = torch.randn(8, 4).t()
    kept = ops.sparsify(x, k)
    assert kept.is_contiguous()
    assert kept.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("k", [0, 9])
def test_eager_rejects_k(k: int) -> None:
    with pytest.raises(ValueError, match=r"\[1, 8\]"):
        ops.sparsify(torch.ones(2, 8), k)
    with pytest.raises(ValueError, match=r"\[1, 8\]"):
        ops.sparse_linear(torch.ones(2, 8), torch.ones(8, 4), k)


def test_fake_rejects_what_does_not_fit() -> None:
    x, weight_t = torch.empty(2, 8, device="meta"), torch.empty(8, 4, device="meta")
    with pytest.raises(RuntimeError, match="x has 8 features but weight_t has 4 rows"):
        ops.sparse_linear(x, weight_t.t(), 3)
    with pytest.raises(RuntimeError, match="at most in = 8, got 9"):
        ops.sparse_linear(x, weight_t, 9)
    with pytest.raises(RuntimeError, match="at most features = 8, got 9"):
        ops.sparsify(x, 9)
    with pytest.raises(RuntimeError, match=r"must be \[rows, features\]"):
        ops.sparsify(x[0], 3)
    with pytest.raises(RuntimeError, match=r"float32 but weight_t is torch\.bfloat16"):
        ops.sparse_linear(x, weight_t.bfloat16(), 3)
