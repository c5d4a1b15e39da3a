"""The law behind rotation_operands, checked on numbers: rotating those operands rotates the result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from larosa_compile.capture import Captured
from larosa_compile.passes.graph import is_row_scale, rotation_operands, rows, width
from tests.support.graphs import capture_graph

D = 8


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def inputs() -> dict[str, Tensor]:
    """What the expressions below are over."""
    torch.manual_seed(0)
    shapes = {"x": (2, 3, D), "y": (2, 3, D), "row": (2, 3, 1), "table": (5, D), "feature": (D,)}
    floats = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return {**floats, "index": torch.tensor([0, 2, 1, 1])}


def traced(expression: str) -> Captured:
    function = eval(f"lambda {', '.join(inputs())}: {expression}", {"torch": torch, "F": F, "D": D})
    return capture_graph(Function(function), *inputs().values())


COMMUTING = [
    "x.view(6, D)",
    "x.view(3, 1, 2, D)",
    "x.transpose(0, 1).reshape(6, D)",
    "x.flatten(0, 1)",
    "table[:1].expand(7, D)",
    "feature.expand(3, D)",
    "x[:, 1:]",
    "table[::2]",
    "x[:, -1]",
    "x.select(-2, 0)",
    "table[index]",
    "x[:, index % 3]",
    "x[index % 2, index % 3]",
    "table.index_select(0, index)",
    "torch.cat([x, y, x], 1)",
    "torch.cat([x, y], -2)",
    "torch.stack([x, y], 1)",
    "x.permute(1, 0, 2)",
    "x.permute(1, 0, -1)",
    "x.transpose(0, 1)",
    "x.unsqueeze(1)",
    "x.unsqueeze(-2)",
    "table[:1].unsqueeze(1).squeeze(1)",
    "x * row",
    "row * x",
    "3 * x",
    "x * row[0, 0, 0]",
    "feature * row",
    "x / (row.abs() + 1)",
    "x / 3",
    "-x",
    "x + y",
    "torch.add(x, y, alpha=2)",
    "x + feature",
    "x + x",
    "x - y",
    "x.sum(1)",
    "x.sum(-2, keepdim=True)",
    "x.sum((0, 1))",
    "x.float()",
    "x.transpose(0, 1).contiguous()",
]

MIXING = [
    "x.view(2, 6, 4)",
    "x.view(2, 3 * D)",
    "x.permute(0, 2, 1)",
    "torch.cat([table, table[:3]]).T",
    "torch.cat([x, y], -1)",
    "torch.stack([x, y], -1)",
    "x[..., 2:]",
    "x[..., ::2]",
    "x[..., 0]",
    "x[..., index]",
    "x.flip(-1)",
    "x.roll(1, -1)",
    "x.sum(-1)",
    "x.sum()",
    "x.sum((1, 2), keepdim=True)",
    "row.expand(2, 3, D)",
    "x * feature",
    "x * y",
    "x * x",
    "x / feature",
    "row / x",
    "1 / x",
    "x + row",
    "x + 1",
    "1 - x",
    "feature + row",
    "x.exp()",
    "F.gelu(x)",
    "x.relu()",
    "x.abs()",
    "x.softmax(-1)",
    "x**2",
    "torch.where(x > 0, x, y)",
    "x.long()",
    "x @ table.T",
    "x.amax(1)",
    "x.prod(1)",
]


def evaluate(captured: Captured) -> dict[Node, Any]:
    """The real value of every node; which of two inputs of one shape is which does not matter."""
    unused = list(inputs().values())
    values: dict[Node, Any] = {}
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta["val"].shape
            values[node] = unused.pop(next(i for i, tensor in enumerate(unused) if tensor.shape == shape))
        elif node.op == "call_function":
            values[node] = call(node, values)
    return values


def call(node: Node, values: dict[Node, Any], changed: dict[Node, Tensor] | None = None) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: {**values, **(changed or {})}[operand])  # type: ignore[misc]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def commutes(node: Node, operands: tuple[Node, ...], values: dict[Node, Any]) -> bool:
    """Whether `node(u @ Q) == node(u) @ Q`, to the coarser precision of what goes in and what comes out."""
    features = values[node].shape[-1]
    q = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64)).Q
    rotated = {operand: (values[operand].double() @ q).to(values[operand].dtype) for operand in operands}
    found, expected = call(node, values, rotated).double(), values[node].double() @ q
    eps = torch.finfo(values[node].dtype).eps
    return bool((found - expected).norm() <= 16 * eps * expected.norm())


@pytest.mark.parametrize("expression", [*COMMUTING, *MIXING])
def test_rotating_the_operands_rotates_the_result(expression: str) -> None:
    values = evaluate(traced(expression))
    for node in values:
        operands = rotation_operands(node)
        assert not operands or commutes(node, operands, values), node.format_node()


@pytest.mark.parametrize(("expression", "expected"), [*((e, True) for e in COMMUTING), *((e, False) for e in MIXING)])
def test_what_carries_a_rotation_from_the_inputs_to_the_result(expression: str, expected: bool) -> None:
    (output,) = traced(expression).graph.graph.output_node().all_input_nodes
    reached, pending = set(), [output]
    while pending:
        node = pending.pop()
        pending += rotation_operands(node)
        reached.add(node.op)
    assert ("placeholder" in reached) == expected


def test_a_placeholder_has_no_operands() -> None:
    captured = capture_graph(Function(lambda x: x.exp()), torch.randn(2, D))
    assert all(not rotation_operands(node) for node in captured.graph.graph.nodes)


@pytest.mark.parametrize(("size", "scale"), [(1, True), (D, False)])
def test_is_row_scale(size: int, scale: bool) -> None:
    captured = capture_graph(Function(lambda x: x.exp()), torch.randn(3, size))
    (node,) = (node for node in captured.graph.graph.nodes if node.op == "call_function")
    assert is_row_scale(node) == scale
    assert is_row_scale(2) and is_row_scale(0.5)
    assert not is_row_scale(None)


def test_width_and_rows_of_a_dynamic_tensor() -> None:
    def function(x: Tensor) -> Tensor:
        return x.relu() @ torch.ones(D, 2)

    captured = capture_graph(Function(function), torch.randn(2, 3, D), dynamic=True)
    node = next(node for node in captured.graph.graph.nodes if "relu" in node.name)
    assert width(node) == D
    assert str(rows(node)) == "*".join(str(size) for size in sorted(map(str, node.meta["val"].shape[:-1])))
    assert width(3) is None
