"""What one node of an ATen graph is and does. Predicates only: nothing here rewrites.

The analyses ask one question of every operation: does it commute with an orthogonal rotation of the last
dimension? `rotation_operands` answers it, and it is the only place that lists operations for that purpose.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
prims = torch.ops.prims


class GraphInvariantError(RuntimeError):
    """The graph broke a rule that a pass relies on: a defect of this package, never of the user's model."""

    def __init__(self, stage: str, node: Node | None, rule: str) -> None:
        where = f" at node '{node.name}'" if node is not None else ""
        super().__init__(f"larosa pass '{stage}'{where}: {rule}")


@dataclass(frozen=True)
class Refusal:
    """A place that stays dense and exact, and why. `site` is a parameter path or a node name."""

    site: str
    reason: str


@dataclass(frozen=True)
class ParameterGraph:
    """An ATen graph together with what its parameter placeholders are.

    module: the functional ATen graph, Inductor's decompositions applied.
    paths: placeholder -> parameter path ("model.layers.0.self_attn.q_proj.weight").
    """

    module: GraphModule
    paths: dict[Node, str]

    @property
    def graph(self) -> Graph:
        return self.module.graph


def value(node: object) -> torch.Tensor | None:
    """The fake tensor a node produces; None for what is no node or does not produce exactly one tensor."""
    fake = node.meta.get("val") if isinstance(node, Node) else None
    return fake if isinstance(fake, torch.Tensor) else None


def width(node: object) -> int | None:
    """Static size of the last dimension of a floating tensor of rank >= 1; None for anything else."""
    fake = value(node)
    if fake is None or fake.ndim == 0 or not fake.is_floating_point():
        return None
    last = fake.shape[-1]
    return last if isinstance(last, int) else None


def is_call(node: object, *targets: Callable[..., Any]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_row_scale(operand: object) -> bool:
    """A number, or a tensor that is constant along the last dimension (broadcast from size 1)."""
    if isinstance(operand, int | float):
        return True
    fake = value(operand)
    return fake is not None and (fake.ndim == 0 or fake.shape[-1] == 1)


def _dim(node: Node, index: int, default: int, rank_of: Node) -> int:
    fake = value(rank_of)
    assert fake is not None
    dim = node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)
    return int(dim) % fake.ndim  # type: ignore[arg-type]


def _reshape(node: Node) -> Sequence[object]:
    # row-major reshapes, expands and squeezes keep rows whole exactly when the last size is unchanged
    return (node.args[0],)


def _permute(node: Node) -> Sequence[object]:
    order: Any = node.args[1]
    return (node.args[0],) if order[-1] % len(order) == len(order) - 1 else ()


def _along_rows(node: Node) -> Sequence[object]:
    source = node.args[0]
    assert isinstance(source, Node)
    fake = value(source)
    return (source,) if fake is not None and _dim(node, 1, 0, source) != fake.ndim - 1 else ()


def _unsqueeze(node: Node) -> Sequence[object]:
    fake = value(node)
    return (node.args[0],) if fake is not None and _dim(node, 1, 0, node) != fake.ndim - 1 else ()


def _index(node: Node) -> Sequence[object]:
    source, indices = node.args[:2]
    fake = value(source)
    keeps_last = fake is not None and len(indices) < fake.ndim  # type: ignore[arg-type]
    return (source,) if keeps_last else ()


def _cat(node: Node) -> Sequence[object]:
    tensors: Any = node.args[0]
    return tuple(tensors) if _dim(node, 1, 0, node) != len(node.meta["val"].shape) - 1 else ()


def _scale(node: Node) -> Sequence[object]:
    left, right = node.args[:2]
    if is_row_scale(right):
        return (left,)
    return (right,) if is_call(node, aten.mul.Tensor) and is_row_scale(left) else ()


def _add(node: Node) -> Sequence[object]:
    left, right = node.args[:2]
    return (left, right) if width(left) == width(right) == width(node) else ()


def _sum(node: Node) -> Sequence[object]:
    source = node.args[0]
    fake = value(source)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if fake is None or not dims or any(d % fake.ndim == fake.ndim - 1 for d in dims):
        return ()
    return (source,)


_ROTATION_RULES: dict[object, Callable[[Node], Sequence[object]]] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.expand.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.clone.default: _reshape,
    aten.alias.default: _reshape,
    aten.neg.default: _reshape,
    prims.convert_element_type.default: _reshape,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.slice.Tensor: _along_rows,
    aten.select.int: _along_rows,
    aten.index_select.default: _along_rows,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
    aten.mul.Tensor: _scale,
    aten.mul.Scalar: _scale,
    aten.div.Tensor: _scale,
    aten.div.Scalar: _scale,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.sum.dim_IntList: _sum,
}


def rotation_operands(node: Node) -> tuple[Node, ...]:
    """Operands `u` with `node(u @ Q) == node(u) @ Q` for every orthogonal Q on the last dimension.

    Rotating all of them rotates the result; every other operand stays as it is. Empty where the operation
    does not commute with a rotation (it mixes, gates, or reshapes features).
    """
    rule = _ROTATION_RULES.get(node.target) if node.op == "call_function" else None
    features = width(node)
    if rule is None or features is None or features < 2:
        return ()
    operands = [operand for operand in rule(node) if isinstance(operand, Node)]
    return tuple(operands) if all(width(operand) == features for operand in operands) else ()


def rows(node: Node) -> int | torch.SymInt:
    """Number of feature vectors a tensor holds: the product of all its sizes but the last."""
    fake = value(node)
    assert fake is not None
    return math.prod(fake.shape[:-1])
