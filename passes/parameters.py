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
from torch.fx.node import map_arg

from larosa_compile.passes.graph import ParameterGraph

Parameters = Mapping[str, torch.Tensor]
"""Parameter path -> the real tensor."""


class _Operand:
    """Stands for the result of the step before in the arguments of a step."""

    def __repr__(self) -> str:
        return "·"


_OPERAND = _Operand()


@dataclass(frozen=True)
class Step:
    """One operation of an expression, with `_OPERAND` where its tensor goes."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, operand: torch.Tensor) -> torch.Tensor:
        filled = [operand if arg is _OPERAND else arg for arg in self.args]
        result = self.target(*filled, **self.kwargs)
        assert isinstance(result, torch.Tensor)
        return result

    def __str__(self) -> str:
        return f"{self.target}{self.args}{dict(self.kwargs) or ''}"


@dataclass(frozen=True)
class ParameterExpression:
    """`steps` applied to the parameter at `path`; independent of the graph it was read from."""

    path: str
    steps: tuple[Step, ...]

    def evaluate(self, parameters: Parameters) -> torch.Tensor:
        tensor = parameters[self.path].detach()
        for step in self.steps:
            tensor = step(tensor)
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
