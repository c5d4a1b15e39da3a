"""One spelling for what graphs spell in several ways: exact, in place, and only where it is known to be right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from larosa_compile.capture import Captured
from larosa_compile.passes.canonical import canonicalise
from larosa_compile.passes.graph import aten, is_call
from larosa_compile.passes.rewriting import GraphEditor
from tests.support.decoder import error
from tests.support.exact import in_float64
from tests.support.graphs import capture_graph
from tests.support.stages import evaluate, placeholder_values

IN, OUT, EXPERTS, ROWS = 6, 8, 3, 5


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.stack = nn.Parameter(torch.randn(EXPERTS, OUT, IN))
        self.table = nn.Parameter(torch.randn(3 * OUT, IN))

    def forward(self, *inputs: Tensor) -> Any:
        found = self.function(self, *inputs)
        return found if isinstance(found, tuple) else (found,)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def canonical(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> tuple[Captured, set[str]]:
    """The rewritten graph, checked, and the operations that are left in it."""
    captured = capture_graph(Function(function), *inputs, dynamic=dynamic or None)
    values = placeholder_values(captured, ())
    exact, before = in_float64(captured, captured.graph.graph, values), evaluate(captured, captured.graph.graph, {}, {})
    assert canonicalise(GraphEditor(captured.graph, captured.fake_mode)) is captured.graph
    captured.graph.graph.lint()
    after = evaluate(captured, captured.graph.graph, {}, {})
    assert all(x.dtype == y.dtype for x, y in zip(after, before, strict=True))
    eps = torch.finfo(before[0].dtype).eps
    assert error(after, exact) <= 4 * (error(before, exact) + eps)
    for node in captured.graph.graph.nodes:
        assert node.op == "output" or "val" in node.meta
    return captured, {str(node.target) for node in captured.graph.graph.nodes if node.op == "call_function"}


VARIANCES: dict[str, Callable[..., Any]] = {
    "var": lambda m, x: x.var(-1),
    "var, kept": lambda m, x: x.var(-1, keepdim=True),
    "biased": lambda m, x: x.var(2, correction=0),
    "corrected by three": lambda m, x: x.var((-1,), correction=3),
    "std": lambda m, x: x.std(-1, keepdim=True),
    "var_mean": lambda m, x: torch.var_mean(x, -1),
    "var_mean, kept": lambda m, x: torch.var_mean(x, -1, keepdim=True, correction=0),
    "mean alone": lambda m, x: torch.var_mean(x, 2)[1],
    "difference": lambda m, x: x - torch.var_mean(x, -1, keepdim=True)[1],
    "other differences": lambda m, x: (
        (mean := torch.var_mean(x, -1, keepdim=True)[1]) - x,
        torch.sub(x, mean, alpha=2),
        x.exp() - mean,
    ),
    "no correction given": lambda m, x: torch.ops.aten.var_mean.correction(x, [-1]),
    "correction of None": lambda m, x: torch.ops.aten.var_mean.correction(x, [-1], correction=None),
    "of a parameter": lambda m, x: m.table.var(-1),
}


@pytest.mark.parametrize("name", VARIANCES)
def test_variances_become_means(name: str) -> None:
    _, left = canonical(VARIANCES[name], torch.randn(2, ROWS, IN))
    assert not {target for target in left if "var" in target}
    assert left & {"aten.mean.dim"}


def test_a_difference_to_the_mean_is_computed_once() -> None:
    def layer_norm(m: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (IN,))

    captured, _ = canonical(layer_norm, torch.randn(2, ROWS, IN))
    assert sum(is_call(node, aten.sub.Tensor) for node in captured.graph.graph.nodes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_to_lose_the_variance(dtype: torch.dtype) -> None:
    """The operation itself computes in single precision; rows far from zero show it."""
    x = (torch.randn(2, ROWS, IN) + 30).to(dtype)
    canonical(lambda m, x: torch.var_mean(x, -1, keepdim=True), x)
    canonical(lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1).sqrt(), x)


KEPT: dict[str, Callable[..., Any]] = {
    "over rows": lambda m, x: x.var(1),
    "over rows and features": lambda m, x: torch.var_mean(x, (1, 2)),
    "of everything": lambda m, x: x.var(),
    "along a size that is not known": lambda m, x: x.mT.var(-1, keepdim=True),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_variances_stay(name: str, dynamic: bool) -> None:
    captured, left = canonical(KEPT[name], torch.randn(2, ROWS, IN), dynamic=dynamic)
    if dynamic or "known" not in name:
        assert {target for target in left if "var" in target}
    for node in captured.graph.graph.nodes:
        assert all(isinstance(arg, int | float | torch.fx.Node) for arg in node.args if "Sym" in type(arg).__name__)


def test_a_variance_without_degrees_of_freedom_stays() -> None:
    """It is no number, or infinite: nothing that another spelling could bring to light."""
    captured = capture_graph(Function(lambda m, x: x.var(-1, correction=IN)), torch.randn(ROWS, IN))
    before = str(captured.graph.graph)
    canonicalise(GraphEditor(captured.graph, captured.fake_mode))
    assert str(captured.graph.graph) == before


PARTS: dict[str, Callable[..., Any]] = {
    "split": lambda m, x: tuple(part.relu() for part in x.split(2, -1)),
    "unevenly": lambda m, x: tuple(part.relu() for part in x.split([1, 3, 2], -1)),
    "a rest": lambda m, x: tuple(part.relu() for part in x.split(4, 2)),
    "rows": lambda m, x: tuple(part.relu() for part in x.split(2, 1)),
    "one of several": lambda m, x: x.split([1, 3, 2], -1)[1].relu(),
    "chunk": lambda m, x: tuple(part.relu() for part in x.chunk(3, -1)),
    "unbind": lambda m, x: tuple(part.relu() for part in x.unbind(-2)),
    "unbind features": lambda m, x: x.unbind(2)[-1].relu(),
    "of a parameter": lambda m, x: tuple(part.relu() for part in m.table.chunk(3)),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_become_slices_and_selects(name: str) -> None:
    _, left = canonical(PARTS[name], torch.randn(2, ROWS, IN))
    assert not {target for target in left if "split" in target or "unbind" in target or "getitem" in target}


def test_parts_of_a_size_that_is_not_known_stay() -> None:
    canonical(lambda m, x: tuple(part.relu() for part in x.split(2, -1)), torch.randn(4, ROWS, IN), dynamic=True)
    canonical(lambda m, x: x.chunk(2, 0)[1].relu(), torch.randn(4, ROWS, IN), dynamic=True)


PRODUCTS: dict[str, Callable[..., Any]] = {
    "rows as columns": lambda m, x, ids: torch.bmm(m.stack[ids], x.unsqueeze(-1)).squeeze(-1),
    "one column": lambda m, x, ids: torch.bmm(m.stack[ids], x[..., None])[..., 0],
    "several columns": lambda m, x, ids: torch.bmm(m.stack[ids], x[..., None] * torch.ones(2)),
    "whole stack": lambda m, x, ids: torch.bmm(m.stack, x.T.expand(EXPERTS, -1, -1)),
    "transposed stack": lambda m, x, ids: torch.bmm(m.stack.mT[ids], torch.ones(OUT, 1) * x[:, None, :1]),
    "selected": lambda m, x, ids: torch.bmm(m.stack.index_select(0, ids), x.unsqueeze(2)).squeeze(2),
    "both sides": lambda m, x, ids: torch.bmm(m.stack, m.stack.mT) * x.sum(),
    "no weight": lambda m, x, ids: torch.bmm(y := x[:, None] * torch.ones(3, 1), y.mT),
    "weight on the right": lambda m, x, ids: torch.bmm(x[:, None], m.stack.mT[ids]),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_stand_on_the_right(name: str, dynamic: bool) -> None:
    ids = torch.tensor([0, 2, 1, 1, 0])
    captured, _ = canonical(PRODUCTS[name], torch.randn(ROWS, IN), ids, dynamic=dynamic)
    (product,) = (node for node in captured.graph.graph.nodes if is_call(node, aten.bmm.default))
    parameters = set(captured.tensors)
    sides = [reaches(operand, parameters) for operand in product.args]
    expected = {"both sides": [True, True], "no weight": [False, False]}
    assert sides == expected.get(name, [False, True])


def reaches(node: Any, parameters: set[Any]) -> bool:
    return node in parameters or any(reaches(operand, parameters) for operand in node.all_input_nodes)


def test_what_is_canonical_stays_as_it_is() -> None:
    captured = capture_graph(Function(lambda m, x: (x @ m.table.T).relu().mean(-1)), torch.randn(ROWS, IN))
    before = str(captured.graph.graph)
    canonicalise(GraphEditor(captured.graph, captured.fake_mode))
    assert str(captured.graph.graph) == before
