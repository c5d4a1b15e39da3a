"""`larosa::attend`: its definition against torch's attention, and the C++ template against the definition."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from larosa_compile.kernels import heuristics, lowering, ops

assert lowering.__name__ in sys.modules  # importing it is what registers the lowerings

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Case = tuple[Tensor, Tensor, Tensor, Tensor | None]
BLOCK = heuristics.ATTENTION_BLOCK


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def case(
    shape: tuple[int, int, int, int], width: int, value_width: int, mask: Tensor | None, dtype: torch.dtype
) -> Case:
    """shape: batch, heads, groups, length."""
    batch, heads, groups, length = shape
    query = torch.randn(batch * heads, width).to(dtype)
    key, values = (torch.randn(batch, groups, length, size).to(dtype) for size in (width, value_width))
    return query, key, values, mask


def hiding(length: int, seen: int, batch: int = 1) -> Tensor:
    """A mask that shows the first keys."""
    mask = torch.zeros(batch, 1, 1, length)
    mask[..., seen:] = -torch.inf
    return mask


def cases(dtype: torch.dtype) -> list[Case]:
    nobody = hiding(BLOCK + 1, 0, batch=2)
    nobody[1] = 0
    turned = torch.randn(1, 130, 2, 64).to(dtype).transpose(1, 2)
    return [
        case((1, 9, 3, 4 * BLOCK), 64, 64, hiding(4 * BLOCK, BLOCK + 7).to(dtype), dtype),  # heads that share keys
        (torch.randn(14, 64).to(dtype), turned, turned, None),  # keys that lie apart
        case((2, 6, 6, 70), 40, 24, torch.randn(2, 6, 1, 70).to(dtype), dtype),  # a mask of every head; odd widths
        case((3, 4, 4, BLOCK + 1), 33, 7, torch.randn(1, 1, 1, BLOCK + 1), dtype),  # a wider mask
        case((2, 11, 1, BLOCK + 1), 8, 8, nobody, dtype),  # a row that sees nothing
    ]


def exact(query: Tensor, key: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """In float64, by torch, which leaves open what a row is that sees nothing: 0 here."""
    batch, groups = key.shape[:2]
    sharing = query.shape[0] // (batch * groups)
    key, values = (each.double().repeat_interleave(sharing, 1) for each in (key, values))
    rows = query.double().view(batch, groups * sharing, 1, -1)
    mask = None if mask is None else mask.double()
    return F.scaled_dot_product_attention(rows, key, values, mask, scale=0.3).flatten(0, 2).nan_to_num(0.0)


def assert_close(found: Tensor, given: Case) -> None:
    expected = exact(*given)
    assert found.dtype == given[0].dtype and found.shape == expected.shape
    # scores of some tens, whose rounding errors the exponential makes relative ones
    bound = torch.finfo(found.dtype).eps + 64 * torch.finfo().eps
    assert (found - expected).abs().max() <= bound * given[2].abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition(dtype: torch.dtype) -> None:
    for given in cases(dtype):
        assert_close(ops.attend(*given, 0.3), given)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_template_and_what_serves_small_caches(
    dtype: torch.dtype, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "MIN_ATTENTION_BYTES", 2**30 if small else 0)
    given = cases(dtype)
    run: Any = torch.compile(lambda given: [ops.attend(*one, 0.3) for one in given])
    found, codes = run_and_get_code(run, given)
    assert "\n".join(codes).count("larosa_attend_block(") == (0 if small else 2 * len(given))
    for one, each in zip(found, given, strict=True):
        assert_close(one, each)


def test_what_the_mask_hides_is_not_read_but_what_is_seen_spreads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of hidden keys may hold anything; what is no number in a key that is seen reaches all who see it."""
    monkeypatch.setattr(heuristics, "MIN_ATTENTION_BYTES", 0)
    query, key, values, mask = case((1, 4, 2, 3 * BLOCK), 16, 16, hiding(3 * BLOCK, BLOCK), torch.float32)
    key[:, :, BLOCK:], values[:, :, BLOCK:] = torch.nan, torch.nan
    attend = torch.compile(lambda *given: ops.attend(*given, 0.3))
    seen = (query, key[:, :, :BLOCK], values[:, :, :BLOCK], None)
    assert_close(attend(query, key, values, mask), seen)
    key[:, 1, 3] = torch.nan
    assert attend(query, key, values, mask).isnan().any(1).tolist() == [False, False, True, True]


def test_operations_behind_it_are_fused_and_lengths_may_be_dynamic() -> None:
    query, *_ = case((1, 6, 2, 40), 16, 16, None, torch.float32)
    run: Any = torch.compile(lambda *given: ops.attend(*given, None, 0.3).sigmoid() + 1, dynamic=True)
    for length in (40, 70, 200):
        key, values = torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
        found, codes = run_and_get_code(run, query, key, values)
        assert (found - 1 - exact(query, key, values, None).sigmoid()).abs().max() < 1e-6
        assert not codes or "\n".join(codes).count("async_compile.cpp_pybinding(") == 1


def test_a_query_is_computed_once_rather_than_for_every_key() -> None:
    query, key, values, _ = case((1, 6, 2, 40), 16, 16, None, torch.float32)
    run: Any = torch.compile(lambda query: ops.attend(query.cos(), key, values, None, 0.3))
    found, (code,) = run_and_get_code(run, query)
    assert (found - exact(query.cos(), key, values, None)).abs().max() < 1e-6
    assert code.index(".cos()") < code.index("tmp_acc0"), "in a loop before that over the keys"
