"""Parameter expressions: weights and scales as a model spells them.

A linear's weight may arrive as `permute(param)`, as `convert_element_type(permute(param))` or as the plain
parameter (`[in, out]` storage); a norm's scale as `weight` or `1 + weight`. All are the same to the folds: a
chain of operations from one parameter, evaluated once on the real tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from larosa_compile.passes.graph import ParameterGraph, aten, is_call, prims, value

Parameters = Mapping[str, torch.Tensor]
"""Parameter path -> the real tensor."""


class _Operand:
    """Stands for the result of the step before in the arguments of a step."""

    def __repr__(self) -> str:
        return "·"


_OPERAND = _Operand()


def _fill(argument: Any, operand: Any) -> Any:
    return operand if argument is _OPERAND else argument


@dataclass(frozen=True)
class Step:
    """One operation of an expression, with `_OPERAND` where its tensor goes."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, operand: Any) -> Any:
        """Several tensors where the operation gives several; the next step takes one of them."""
        filled: Any = map_aggregate((self.args, dict(self.kwargs)), partial(_fill, operand=operand))
        return self.target(*filled[0], **filled[1])

    def __str__(self) -> str:
        return f"{self.target}{self.args}{dict(self.kwargs) or ''}"


@dataclass(frozen=True)
class ParameterExpression:
    """`steps` applied to the parameter at `path`; independent of the graph it was read from."""

    path: str
    steps: tuple[Step, ...]

    def evaluate(self, parameters: Parameters) -> torch.Tensor:
        tensor: Any = parameters[self.path].detach()
        for step in self.steps:
            tensor = step(tensor)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def __str__(self) -> str:
        return " ; ".join([self.path, *map(str, self.steps)])


def parameter_expression(node: object, graph: ParameterGraph) -> ParameterExpression | None:
    """What `node` is as an expression over one parameter, or None where it depends on anything else."""
    steps: list[Step] = []
    while isinstance(node, Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        (operand,) = node.all_input_nodes
        assert callable(node.target)
        fill = partial(_filled, operand=operand)
        steps.append(Step(node.target, tuple(map_arg(node.args, fill)), dict(map_arg(node.kwargs, fill))))
        node = operand
    path = graph.paths.get(node) if isinstance(node, Node) else None
    return ParameterExpression(path, tuple(reversed(steps))) if path is not None else None


def _filled(node: Node, operand: Node) -> Any:
    return _OPERAND if node is operand else node


def looked_up_parameter(node: Node, graph: ParameterGraph) -> str | None:
    """The path of the parameter [entries, features] whose rows an embedding looks up as they are."""
    table = node.args[0] if is_call(node, aten.embedding.default) else None
    return graph.paths.get(table) if isinstance(table, Node) else None


@dataclass(frozen=True)
class SelectedParameter:
    """`expression`, of which `selection` picks entries along the first dimension; None picks all, in order.

    selection: a node `index(stack, [ids])` or `index_select(stack, 0, ids)`. Operations between it and the product
    that leave the first dimension alone are in the expression: they commute with the choice.
    shape: of the expression's value, None where it is not static.
    """

    expression: ParameterExpression
    selection: Node | None
    shape: tuple[int, ...] | None


def selected_parameter(node: object, graph: ParameterGraph) -> SelectedParameter | None:
    """What `node` is as a choice of entries from one parameter expression, or None where it is neither."""
    whole = parameter_expression(node, graph)
    if whole is not None:
        return SelectedParameter(whole, None, _static_shape(node))
    above: list[Node] = []
    while isinstance(node, Node) and not _selects_entries(node):
        if not _keeps_first_dimension(node):
            return None
        above.append(node)
        (node,) = node.all_input_nodes
    stack = parameter_expression(node.args[0], graph) if isinstance(node, Node) else None
    shape = _static_shape(above[0] if above else node)
    if stack is None or not isinstance(node, Node) or shape is None:
        return None
    steps = []
    for step in reversed(above):
        fill = partial(_filled, operand=step.all_input_nodes[0])
        assert callable(step.target)
        steps.append(Step(step.target, tuple(map_arg(step.args, fill)), dict(map_arg(step.kwargs, fill))))
    entries = value(node.args[0])
    assert entries is not None
    expression = ParameterExpression(stack.path, (*stack.steps, *steps))
    return SelectedParameter(expression, node, (int(entries.shape[0]), *shape[1:]))


def _selects_entries(node: Node) -> bool:
    if is_call(node, aten.index_select.default):
        return bool(node.args[1] == 0)
    indices: Any = node.args[1] if is_call(node, aten.index.Tensor) else ()
    ids = value(indices[0]) if len(indices) == 1 else None
    return ids is not None and ids.ndim == 1 and ids.dtype != torch.bool


def _keeps_first_dimension(node: Node) -> bool:
    if is_call(node, aten.permute.default):
        order: Any = node.args[1]
        return bool(order[0] == 0)
    return is_call(node, aten.clone.default, prims.convert_element_type.default)


def _static_shape(node: object) -> tuple[int, ...] | None:
    """Sizes but the first, which is that of a choice and may be symbolic."""
    fake = value(node)
    if fake is None or not all(isinstance(size, int) for size in fake.shape[1:]):
        return None
    return tuple(fake.shape)
