"""Norms between a residual stream and its readers, in whatever way they are spelled.

An RMSNorm is `x * r * g`: a row factor `r` computed from `sum(x²)`, which a rotation leaves alone, and a scale `g`
along features, which must move into the readers before they can be rotated (method: fold 1).
"""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from larosa_compile.passes.graph import ParameterGraph, aten, is_call, value, width
from larosa_compile.passes.parameters import ParameterExpression, parameter_expression


@dataclass(frozen=True)
class FeatureScale:
    """`node = source * scale`, scale a parameter expression of shape [features] (possibly with leading ones)."""

    node: Node
    source: Node
    scale: ParameterExpression


def feature_scale(node: Node, graph: ParameterGraph) -> FeatureScale | None:
    """The node as a product of an activation with a parameter along features, or None."""
    if not is_call(node, aten.mul.Tensor):
        return None
    left, right = node.args[:2]
    for source, factor in ((left, right), (right, left)):
        scale, shape = parameter_expression(factor, graph), value(factor)
        if scale is None or shape is None or parameter_expression(source, graph):
            continue
        along_features = shape.ndim > 0 and shape.numel() == shape.shape[-1] and shape.ndim <= node.meta["val"].ndim
        if isinstance(source, Node) and along_features and width(factor) == width(source) == width(node):
            return FeatureScale(node, source, scale)
    return None


def is_squared_length(user: Node, source: Node) -> bool:
    """Whether `user` only takes part in `sum(source²)` or `mean(source²)` over features: invariant to rotation."""
    power = is_call(user, aten.pow.Tensor_Scalar) and user.args[1] == 2
    product = is_call(user, aten.mul.Tensor) and user.args[0] is source and user.args[1] is source
    return (power or product) and all(_sums_features(consumer) for consumer in user.users)


def _sums_features(node: Node) -> bool:
    if not is_call(node, aten.mean.dim, aten.sum.dim_IntList):
        return False
    dims: Any = node.args[1] if len(node.args) > 1 else None
    fake = value(node.args[0])
    return fake is not None and any(dim % fake.ndim == fake.ndim - 1 for dim in dims or [])
