"""What a decode step computes for one row besides the sites: attention and dense products, against eager."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv

from larosa_compile.capture import Captured
from larosa_compile.kernels import ops
from larosa_compile.passes.decode import specialise_one_row
from larosa_compile.passes.graph import aten, is_call
from larosa_compile.passes.rewriting import GraphEditor
from tests.support.graphs import capture_graph

ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function  # type: ignore[method-assign]


def specialised(module: nn.Module, *inputs: Tensor, dynamic: bool | None = None) -> Captured:
    captured = capture_graph(module, *inputs, dynamic=dynamic)
    specialise_one_row(GraphEditor(captured.graph, captured.fake_mode))
    captured.graph.graph.lint()
    captured.graph.module.recompile()
    return captured


def has(captured: Captured, *targets: Callable[..., object]) -> bool:
    return any(is_call(node, *targets) for node in captured.graph.graph.nodes)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False, scale: float = 0.3) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def tensors(dtype: torch.dtype, queries: int = 1, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(batch, 6, queries, 8), torch.randn(batch, 2, 37, 8), torch.randn(batch, 2, 37, 8)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", ["no", "some", "a row"])
def test_attention_of_one_query(dtype: torch.dtype, masked: str) -> None:
    q, k, v = tensors(dtype)
    mask = None
    if masked != "no":
        mask = torch.rand(2, 1, 1, 37) < 0.5
        mask[0] &= masked != "a row"
    captured = specialised(Function(lambda q, k, v: attention(q, k, v, mask)), q, k, v)
    assert has(captured, ops.attend) and not has(captured, ATTENTION)
    (found,) = captured.graph.module(*captured.inputs)
    expected = attention(q.double(), k.double(), v.double(), mask)
    if masked == "a row":
        assert (found[0] == attention(q, k, v, mask)[0]).all(), "seeing nothing is defined by the op"
        found, expected = found[1:], expected[1:]
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_share_keys_without_copies_of_them(masked: bool) -> None:
    """As transformers calls it where there is no mask: k and v as they are cached."""
    q, k, v = tensors(torch.float32)
    mask = torch.randn(2, 1, 1, 37) if masked else None

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)

    captured = specialised(Function(grouped), q, k, v)
    assert not has(captured, ATTENTION)
    (found,) = captured.graph.module(*captured.inputs)
    assert torch.allclose(found, attention(q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("case", ["a mask", "no mask", "any length"])
def test_copies_of_the_cache_for_each_head_are_not_made(case: str) -> None:
    """As transformers calls it with a static cache, whose mask keeps it from saying that heads share."""
    q, k, v = tensors(torch.float32)
    mask = torch.randn(2, 1, 1, 37) if case == "a mask" else None
    for cached in (k, v) if case == "any length" else ():
        torch._dynamo.mark_dynamic(cached, 2)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k, 3), repeat_kv(v, 3), attn_mask=mask, scale=0.3)

    captured = specialised(Function(repeated), q, k, v)
    captured.graph.graph.eliminate_dead_code()
    assert has(captured, ops.attend) and not has(captured, aten.expand.default, aten.clone.default)
    (found,) = captured.graph.module(*captured.inputs)
    assert torch.allclose(found, repeated(q, k, v), atol=1e-6)


def test_keys_that_are_repeated_otherwise_are_taken_as_they_are() -> None:
    """Heads that share a group lie apart, or keys alone are repeated."""
    q, k, v = tensors(torch.float32)
    for function in (
        lambda q, k, v: attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), None),
        lambda q, k, v: attention(q, repeat_kv(k, 3), v.repeat(1, 3, 1, 1), None),
    ):
        captured = specialised(Function(function), q, k, v)
        assert has(captured, ops.attend)
        (found,) = captured.graph.module(*captured.inputs)
        assert torch.allclose(found, function(q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    "why, function",
    [
        ("two queries", lambda q, k, v: attention(torch.cat([q, q], 2), k, v, None)),
        ("causal: one query would see one key", lambda q, k, v: attention(q, k, v, None, causal=True)),
    ],
)
def test_attention_that_stays(why: str, function: Callable[..., Tensor]) -> None:
    captured = specialised(Function(function), *tensors(torch.float32))
    assert has(captured, ATTENTION), why


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_product_of_one_row_reads_its_weight_as_it_is(bias: bool) -> None:
    linear, x = nn.Linear(24, 50, bias=bias), torch.randn(1, 24)
    captured = specialised(linear, x)
    assert has(captured, ops.sparse_linear) and not has(captured, aten.mm.default, aten.addmm.default)
    (found,) = captured.graph.module(*captured.inputs)
    assert torch.allclose(found, linear(x), atol=1e-6)


def test_dense_products_that_stay() -> None:
    weight = torch.randn(24, 50)
    input_major = specialised(Function(lambda x: x @ weight), torch.randn(1, 24))
    rows = specialised(nn.Linear(24, 50), torch.randn(2, 24))
    symbolic = specialised(nn.Linear(24, 50), torch.randn(3, 24), dynamic=True)
    for captured in (input_major, rows, symbolic):
        assert not has(captured, ops.sparse_linear)
