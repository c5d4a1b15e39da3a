"""The law of every rule, on numbers: rotating what `equivariance` names rotates the result. Forms it must refuse."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node, symbolic_trace
from torch.fx.node import map_arg

from larosa_compile.passes import equivariance as module
from larosa_compile.passes.equivariance import (
    Equivariance,
    Kind,
    equivariance,
    is_feature_sum,
    is_row_constant,
    is_squared_length,
    is_zero,
    rotation_operands,
)
from larosa_compile.passes.graph import aten, prims, width
from tests.support.graphs import capture_graph
from tests.support.operations import MIX, MOVE, OPERATIONS, SHIFT, TWICE, D, inputs
from tests.support.stages import orthogonal, placeholder_values

NAMES = {"torch": torch, "F": F, "D": D, "aten": aten, "prims": prims}


def traced(expression: str) -> tuple[Node, dict[Node, Any]]:
    """The last operation of the expression as written, and the real value of every node."""
    function = eval(f"lambda {', '.join(inputs())}: {expression}", NAMES)
    given = iter(inputs().values())
    values: dict[Node, Any] = {}
    last = None
    for node in symbolic_trace(function).graph.nodes:
        if node.op == "output":
            (last,) = node.all_input_nodes
            continue
        values[node] = next(given) if node.op == "placeholder" else call(node, values)
        node.meta["val"] = values[node]
    assert last is not None
    return last, values


def call(node: Node, values: Mapping[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: values[operand])  # type: ignore[misc]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def changed(node: Node, operands: tuple[Node, ...], values: Mapping[Node, Any], change: Any) -> Tensor:
    """The operation on changed operands: wherever it reads them, for a rewrite replaces all of its reads."""
    new = {operand: change(values[operand].double()).to(values[operand].dtype) for operand in operands}
    return call(node, {**values, **new}).double()


def shifted(node: Node, operands: tuple[Node, ...], values: Mapping[Node, Any], q: Tensor) -> Tensor:
    """`node(x Q, r · 1 Q)`, in the form that takes tensors."""
    (x,) = operands
    left, right = (values.get(operand, operand) if isinstance(operand, Node) else operand for operand in node.args[:2])
    ones = q.sum(0)
    pair = [values[x] @ q, right * ones] if node.args[0] is x else [left * ones, values[x] @ q]
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    operation = torch.add if "add" in str(node.target) else torch.sub
    result: Tensor = operation(*pair, alpha=alpha)
    return result


def check_law(node: Node, found: Equivariance, values: Mapping[Node, Any]) -> None:
    """Exact to the coarser precision of what goes in and what comes out."""
    result = values[node].double()
    q, gain, offset = orthogonal(result.shape[-1]), torch.rand(result.shape[-1]) + 0.5, torch.randn(result.shape[-1])

    def same(found: Tensor, expected: Tensor) -> bool:
        eps = torch.finfo(values[node].dtype).eps
        return bool((found - expected).norm() <= 16 * eps * expected.norm())

    assert found.operands, node.format_node()
    if found.kind is SHIFT:
        assert same(shifted(node, found.operands, values, q), result @ q), node.format_node()
        return
    assert same(changed(node, found.operands, values, lambda u: u @ q), result @ q), node.format_node()
    # what norms rely on: scales along features commute with both kinds, shifts with the one that only moves rows
    assert same(changed(node, found.operands, values, lambda u: u * gain), result * gain), node.format_node()
    if found.kind is MOVE:
        assert same(changed(node, found.operands, values, lambda u: u + offset), result + offset), node.format_node()


@pytest.mark.parametrize(("expression", "kind"), OPERATIONS.items())
def test_operations(expression: str, kind: Kind | None) -> None:
    node, values = traced(expression)
    found = equivariance(node)
    assert (found.kind if found else None) == kind
    assert rotation_operands(node) == (found.operands if found else ())
    if found:
        assert all(width(operand) == width(node) for operand in found.operands)
        check_law(node, found, values)


def test_every_rule_is_tested() -> None:
    met = {(traced(expression)[0].target, kind) for expression, kind in OPERATIONS.items()}
    rules = {(target, kind) for target, rules in module._RULES.items() for kind, _ in rules}
    assert rules - met == {(aten.add.Scalar, MIX), (aten.sub.Scalar, MIX)}, "what adds a number only shifts"


@pytest.mark.parametrize(("expression", "kind"), TWICE.items())
def test_a_value_that_is_read_twice(expression: str, kind: Kind | None) -> None:
    """It cannot be rotated in one place and not in the other."""
    test_operations(expression, kind)


# what a model may write, in several operations -> whether the result is x, y, … rotated where those are
SPELLINGS: dict[str, bool] = {
    "x.flatten(0, 1)": True,
    "x.transpose(0, 1).reshape(6, D)": True,
    "x[:, index % 3]": True,
    "x[index % 2, index % 3]": True,
    "table[::2]": True,
    "torch.stack([x, y], 1)": True,
    "x * row[0, 0, 0]": True,
    "x / (row.abs() + 1)": True,
    "x.transpose(0, 1).contiguous()": True,
    "x.roll(1, 1)": True,
    "x.flip(1)": True,
    "x.repeat_interleave(2, 1)": True,
    "x.lerp(y, 0.5)": True,
    "x.diff(dim=1)": True,
    "x.masked_fill(rows_on, 0)": True,
    "torch.where(rows_on, x, 0)": True,
    "x.masked_scatter(rows_on, y)": False,
    "F.pad(x, (0, 0, 1, -1))": True,
    "torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)": True,
    "x.index_copy(1, torch.arange(3), y)": True,
    "table.index_add(0, index, square[:4], alpha=3)": True,
    "torch.zeros_like(x).scatter_add(1, ids[..., None].expand(2, 3, D), y)": True,
    "table.scatter(0, index[:, None].expand(4, D), square[:4])": True,
    "F.embedding(ids, table, padding_idx=0)": True,
    "wide.view(2, 3, 2, D).sum(2)": False,
    "wide[..., :D] + wide[..., D:]": False,
    "wide.view(2, 3, D, 2)[..., 0]": False,
    "cube.mT.reshape(4, 2 * D, D)": False,
    "square.T.view(4, 2, D)": False,
    "x[..., None].expand(2, 3, D, D)": False,
    "row.repeat(1, 1, D) * x": False,
    "torch.stack([feature, feature], -1)": False,
    "torch.cat([square, square], 1)[:, :D]": False,
    "torch.cat([x, y], -1).sum(-1, keepdim=True).expand(2, 3, D)": False,
    "x.index_put((on,), number)": False,
    "x.scatter(1, on.long(), y)": False,
    "x.roll(1, -1)": False,
    "x.flip(-1)": False,
    "x[..., 0]": False,
    "x.exp()": False,
    "x.softmax(-1)": False,
    "torch.where(on, x, y)": False,
    "x.long().double()": False,
    "x.cumsum(-1)": False,
    "x.prod(1)": False,
    "torch.tril(square)": False,
    "torch.einsum('btd,bt->bd', x, row[..., 0])": False,
}


class Function(nn.Module):
    def __init__(self, expression: str) -> None:
        super().__init__()
        self.function = eval(f"lambda {', '.join(inputs())}: {expression}", NAMES)

    def forward(self, *given: Tensor) -> Tensor:
        return torch.exp(self.function(*given))  # an output that is a view of an input is no node of the graph


@pytest.mark.parametrize(("expression", "expected"), SPELLINGS.items())
def test_what_carries_a_rotation_from_the_inputs_to_the_result(expression: str, expected: bool) -> None:
    captured = capture_graph(Function(expression), *inputs().values())
    given = iter(placeholder_values(captured, ()))
    values: dict[Node, Any] = {}
    for node in captured.graph.graph.nodes:
        if node.op != "output":
            values[node] = next(given) if node.op == "placeholder" else call(node, values)
        found = equivariance(node)
        if found:
            check_law(node, found, values)
    (exponential,) = captured.graph.graph.output_node().all_input_nodes
    reached, pending = set(), list(exponential.all_input_nodes)
    while pending:
        node = pending.pop()
        pending += rotation_operands(node)
        reached.add(node.op)
    assert ("placeholder" in reached) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("aten.sum.dim_IntList(aten.mul.Tensor(x, x), [2])", True),
        ("aten.sum.dim_IntList(aten.mul.Tensor(x, x), [-1, 1], True)", True),
        ("aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)", True),
        ("aten.mean.dim(aten.pow.Tensor_Scalar(x, 2.0), [0, 1, 2])", True),
        ("aten.sum.dim_IntList(aten.mul.Tensor(x, x), [2], dtype=torch.int64)", False),
        ("aten.sum.dim_IntList(aten.mul.Tensor(x, y), [2])", False),
        ("aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x, 3), [2])", False),
        ("aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x, 2), [1])", False),
        ("aten.amax.default(aten.pow.Tensor_Scalar(x, 2), [2])", False),
        ("aten.mul.Tensor(x, x)", False),
    ],
)
def test_squared_lengths(expression: str, expected: bool) -> None:
    """They stay what they are when their operand is rotated."""
    last, values = traced(expression)
    x = next(iter(values))
    (user,) = x.users
    # an operation whose result nothing reads cannot tell; here the graph's output reads it
    assert is_squared_length(user, x) == expected
    if expected:
        rotated = {**values, x: values[x] @ orthogonal(D)}
        rotated[user] = call(user, rotated)
        assert torch.allclose(call(last, rotated), values[last], rtol=1e-12)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("aten.sum.dim_IntList(x, [2])", True),
        ("aten.mean.dim(x, [-1], True)", True),
        ("aten.mean.dim(x, [0, 2])", True),
        ("aten.sum.dim_IntList(x, [2], dtype=torch.float32)", True),
        ("aten.sum.dim_IntList(x, [2], dtype=torch.int64)", False),
        ("aten.sum.dim_IntList(x, [1])", False),
        ("aten.sum.dim_IntList(cube, [0, 1])", False),
        ("aten.amax.default(x, [2])", False),
    ],
)
def test_sums_over_features(expression: str, expected: bool) -> None:
    """`Σ x = Σ (x Q) ⊙ (1 Q)`."""
    last, values = traced(expression)
    (x,) = last.all_input_nodes
    assert is_feature_sum(last, x) == expected
    if expected:
        q = orthogonal(D)
        found = call(last, {**values, x: values[x] @ q * q.sum(0)}).double()
        assert torch.allclose(found, values[last].double(), rtol=8 * torch.finfo(values[last].dtype).eps)


@pytest.mark.parametrize(
    ("expression", "constant", "zero"),
    [
        ("aten.neg.default(row)", True, False),
        ("aten.neg.default(number)", True, False),
        ("aten.expand.default(row, [4, 2, 3, D])", True, False),
        ("aten.neg.default(x)", False, False),
        ("aten.expand.default(feature, [3, D])", False, False),
        ("aten.new_zeros.default(x, [3, D])", False, True),
        ("aten.view.default(aten.new_full.default(x, [3, D], 0), [D, 3])", False, True),
        ("aten.full_like.default(x, 1)", False, False),
        ("aten.clone.default(aten.zeros_like.default(row))", True, True),
    ],
)
def test_constants(expression: str, constant: bool, zero: bool) -> None:
    node, values = traced(expression)
    assert (is_row_constant(node), is_zero(node)) == (constant, zero)
    assert not constant or bool((values[node] == values[node][..., None if values[node].ndim == 0 else slice(1)]).all())
    assert not zero or not values[node].any()


def test_numbers_are_row_constants() -> None:
    assert is_row_constant(2) and is_row_constant(0.5)
    assert not is_row_constant(None) and not is_zero(0)


def test_a_placeholder_has_no_operands() -> None:
    _, values = traced("aten.neg.default(x)")
    assert all(equivariance(node) is None for node in values if node.op == "placeholder")
