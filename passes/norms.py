"""What stands between a residual stream and a linear that reads it: scales and shifts along features.

A norm is `x * r * g + b`, in whatever way it is spelled: a row factor `r`, which a rotation leaves alone, then a
scale `g` and perhaps a shift `b` along features, which must move into the linear before it can read a rotated stream
(method: folds 1 and 2).
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from larosa_compile.passes.equivariance import Kind, equivariance
from larosa_compile.passes.graph import ParameterGraph, aten, is_call, value, width
from larosa_compile.passes.parameters import ParameterExpression, Parameters, parameter_expression


@dataclass(frozen=True)
class FeatureStep:
    """`node = source * vector` or `node = source + vector`, vector of shape [features] up to leading ones."""

    node: Node
    source: Node
    vector: ParameterExpression
    scales: bool


@dataclass(frozen=True)
class FeatureAffine:
    """`x ↦ x * scale + shift` along features, between a stream and a linear.

    steps: the scales and shifts, from the stream's side to the linear's. path: the other nodes on the way, which
    select, cast or scale rows; what the linear reads is their result on `source`, scaled and shifted.
    """

    steps: tuple[FeatureStep, ...]
    path: tuple[Node, ...]

    @property
    def source(self) -> Node:
        """What the first step is applied to."""
        return self.steps[0].source

    @property
    def shifts(self) -> bool:
        return not all(step.scales for step in self.steps)

    @property
    def parameter_paths(self) -> tuple[str, ...]:
        return tuple(step.vector.path for step in self.steps)

    def evaluate(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scale, shift), each [features] in float64; None for no shift."""
        scale, shift = torch.ones((), dtype=torch.float64), None
        for step in self.steps:
            vector = step.vector.evaluate(parameters).double().reshape(-1)
            if step.scales:
                scale, shift = scale * vector, None if shift is None else shift * vector
            else:
                shift = vector if shift is None else shift + vector
        return scale, shift

    def __str__(self) -> str:
        return " ".join(f"{'*' if step.scales else '+'} {step.vector}" for step in self.steps)


def feature_step(node: Node, graph: ParameterGraph) -> FeatureStep | None:
    """The node as an activation times, or plus, a parameter along features; None where it is neither."""
    if not is_call(node, aten.mul.Tensor, aten.add.Tensor) or node.kwargs:
        return None
    left, right = node.args[:2]
    for source, factor in ((left, right), (right, left)):
        vector, shape = parameter_expression(factor, graph), value(factor)
        if vector is None or shape is None or not isinstance(source, Node) or parameter_expression(source, graph):
            continue
        along_features = shape.ndim > 0 and shape.numel() == shape.shape[-1] and shape.ndim <= node.meta["val"].ndim
        if along_features and width(factor) == width(source) == width(node):
            return FeatureStep(node, source, vector, is_call(node, aten.mul.Tensor))
    return None


def feature_affine(activation: Node, graph: ParameterGraph) -> FeatureAffine | None:
    """The scales and shifts that `activation` went through; None where there is no scale.

    A shift below every scale belongs to the stream, which may carry it on, and so does a scale whose result has
    other users than the norm above it. Where a residual add carries the scaled and shifted value itself (a norm
    after the add), that value is the stream.
    """
    steps: list[FeatureStep] = []
    path: list[Node] = []
    found: FeatureAffine | None = None
    # a shift does not commute with what scales or sums rows after it
    movable = True
    node = activation
    while not found or len(node.users) == 1:
        step = feature_step(node, graph)
        if step is not None:
            if (not step.scales and not movable) or _is_carried_on(node, graph):
                break
            steps.append(step)
            node = step.source
            if step.scales:
                found = FeatureAffine(tuple(reversed(steps)), tuple(reversed(path)))
            continue
        below = equivariance(node)
        if below is None or below.kind is Kind.SHIFT or len(below.operands) != 1:
            break
        movable = movable and below.kind is Kind.MOVE
        path.append(node)
        (node,) = below.operands
    return found


def _is_carried_on(node: Node, graph: ParameterGraph) -> bool:
    """Whether a residual add takes the value, perhaps by way of views and casts."""
    for user in node.users:
        below = equivariance(user)
        if below is None or node not in below.operands or feature_step(user, graph):
            continue
        if len(below.operands) > 1 or (below.kind is Kind.MOVE and _is_carried_on(user, graph)):
            return True
    return False
