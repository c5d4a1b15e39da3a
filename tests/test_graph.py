"""The vocabulary of graphs: what a node's value is, how wide, and how many rows it has."""

import torch
from torch import Tensor, nn

from larosa_compile.passes.graph import GraphInvariantError, aten, is_call, rows, value, width
from tests.support.graphs import capture_graph

D = 8


class Function(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        largest = x.max(-1)
        return x.relu() @ torch.ones(D, 2), largest.values, largest.indices, x.sum()


def test_widths_and_rows_of_a_dynamic_graph() -> None:
    captured = capture_graph(Function(), torch.randn(2, 3, D), dynamic=True)
    relu = next(node for node in captured.graph.graph.nodes if is_call(node, aten.relu.default))
    assert width(relu) == D
    assert str(rows(relu)) == "*".join(str(size) for size in sorted(map(str, relu.meta["val"].shape[:-1])))


def test_what_has_no_width() -> None:
    """Integers, numbers, several tensors, and a last size that is not known."""
    captured = capture_graph(Function(), torch.randn(2, 3, D), dynamic=True)
    product, values, indices, total = captured.graph.graph.output_node().args[0]
    assert width(product) == 2
    assert width(values) is None  # as wide as there are tokens
    assert width(indices) is None
    assert width(total) is None
    pair = values.all_input_nodes[0]
    assert value(pair) is None and width(pair) is None
    assert value(3) is None and width(3) is None and width(None) is None


def test_is_call_asks_for_the_operation() -> None:
    captured = capture_graph(Function(), torch.randn(2, D))
    nodes = list(captured.graph.graph.nodes)
    assert sum(is_call(node, aten.relu.default, aten.exp.default) for node in nodes) == 1
    assert not any(is_call(node) for node in nodes)
    assert not is_call(aten.relu.default, aten.relu.default)


def test_a_broken_invariant_names_pass_and_node() -> None:
    captured = capture_graph(Function(), torch.randn(2, D))
    relu = next(node for node in captured.graph.graph.nodes if is_call(node, aten.relu.default))
    assert str(GraphInvariantError("fold", relu, "a rule")) == "larosa pass 'fold' at node 'relu': a rule"
    assert str(GraphInvariantError("fold", None, "a rule")) == "larosa pass 'fold': a rule"
