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
    torch.library.opcheck(ops.sparse_linear, (x, weight_t, None))
    torch.library.opcheck(ops.keep_above, (x, 0.5, True))
    torch.library.opcheck(ops.keep_above, (x.t(), 0.5, False))
    query, cache = torch.randn(12, 8).to(dtype), torch.randn(2, 3, 5, 8).to(dtype)
    torch.library.opcheck(ops.attend, (query, cache, cache, None, 0.5))
    torch.library.opcheck(ops.attend, (query, cache, cache[..., :4], torch.zeros(1, 1, 1, 5), 0.5))


def test_eager_is_the_reference() -> None:
    x, weight_t = torch.randn(4, 32), torch.randn(32, 9)
    assert torch.equal(ops.sparsify(x, 7), reference.sparsify(x, 7))
    assert torch.equal(ops.sparse_linear(x, weight_t, 7), reference.sparse_linear(x, weight_t, 7))


def test_a_threshold_keeps_what_reaches_it() -> None:
    x = torch.tensor([[3.0, -2.0, 1.0, float("nan")], [0.0, -0.0, 0.0, 0.0]])
    assert torch.equal(ops.keep_above(x, 2.0, False).nan_to_num(9.0), torch.tensor([[3.0, -2.0, 0, 9], [0, 0, 0, 0]]))
    assert torch.equal(ops.keep_above(x, 0.0, False).nan_to_num(9.0), x.nan_to_num(9.0))
    # root mean square 5: what is kept does not change with the scale of the row
    x = torch.tensor([[7.0, -1.0]])
    for scale in (1.0, 1e-3):
        assert torch.equal(ops.keep_above(x * scale, 0.5, True), torch.tensor([[7.0, 0.0]]) * scale)
    assert torch.equal(ops.keep_above(torch.zeros(1, 4), 0.5, True), torch.zeros(1, 4))


def test_nothing_is_selected_where_k_is_none() -> None:
    x, weight_t = torch.randn(4, 32), torch.randn(32, 9)
    assert torch.equal(ops.sparse_linear(x, weight_t, None), x @ weight_t)


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
    cache = torch.empty(1, 2, 5, 8, device="meta")
    with pytest.raises(RuntimeError, match=r"for queries of width 4"):
        ops.attend(x[:, :4], cache, cache, None, 1.0)
    with pytest.raises(RuntimeError, match=r"query is torch\.float32 but key and values are torch\.bfloat16"):
        ops.attend(x, cache.bfloat16(), cache, None, 1.0)
