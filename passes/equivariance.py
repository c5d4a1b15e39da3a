"""Which operations commute with an orthogonal rotation of the features, and how. Predicates only.

The analyses ask one question of every operation `f`: is `f(x Q) = f(x) Q`? The tables here are the only place that
lists operations for that purpose. Three more kinds of operation look at a rotated value and need no rotation back:
adding one number to all features of a row (the number times `1 Q` is added instead), the sum over features (`1 Q`
weighs them), and the squared length (which does not change).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from larosa_compile.passes.graph import aten, is_call, prims, value, width


class Kind(Enum):
    """What an operation does to rows of features.

    MOVE: selects, reorders, repeats or casts rows. MIX: linear in rows (scales, sums, concatenates them).
    SHIFT: adds one number to all features of a row.
    """

    MOVE = auto()
    MIX = auto()
    SHIFT = auto()


@dataclass(frozen=True)
class Equivariance:
    """`node(u Q, …) == node(u, …) Q` when all `operands` u are rotated and nothing else is."""

    kind: Kind
    operands: tuple[Node, ...]


def is_row_constant(operand: object) -> bool:
    """A number, or a tensor that is the same for all features of a row."""
    if isinstance(operand, int | float):
        return True
    fake = value(operand)
    if fake is None:
        return False
    if fake.ndim == 0 or fake.shape[-1] == 1:
        return True
    return is_call(operand, aten.expand.default) and is_row_constant(operand.args[0])


def is_zero(operand: object) -> bool:
    """A constant of zeros: the same in every basis."""
    if is_call(operand, aten.full.default, aten.new_full.default, aten.full_like.default):
        return bool(operand.args[-1] == 0)
    if is_call(operand, aten.expand.default, aten.view.default, aten.clone.default):
        return is_zero(operand.args[0])
    return is_call(operand, aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


def _argument(node: Node, position: int, name: str = "dim", default: Any = 0) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _first(node: Node) -> Sequence[object]:
    # row-major reshapes, expands and squeezes keep rows whole exactly when the last size is unchanged
    return (node.args[0],)


def _permute(node: Node) -> Sequence[object]:
    order = _argument(node, 1)
    return (node.args[0],) if order[-1] % len(order) == len(order) - 1 else ()


def _not_along_features(node: Node, position: int, operands: Sequence[object]) -> Sequence[object]:
    fake = value(node.args[0])
    return operands if fake is not None and _argument(node, position) % fake.ndim != fake.ndim - 1 else ()


def _along_rows(node: Node) -> Sequence[object]:
    return _not_along_features(node, 1, (node.args[0],))


def _unsqueeze(node: Node) -> Sequence[object]:
    fake, dim = value(node), _argument(node, 1)
    return (node.args[0],) if fake is not None and dim % fake.ndim != fake.ndim - 1 else ()


def _index(node: Node) -> Sequence[object]:
    fake = value(node.args[0])
    # a mask takes as many dimensions as it has
    taken = sum(_mask_rank(index) or 1 for index in _argument(node, 1))
    return (node.args[0],) if fake is not None and taken < fake.ndim else ()


def _mask_rank(index: object) -> int:
    mask = value(index)
    return mask.ndim if mask is not None and mask.dtype in (torch.bool, torch.uint8) else 0


def _gather(node: Node) -> Sequence[object]:
    return _along_rows(node) if is_row_constant(node.args[2]) else ()


def _no_padded_features(node: Node) -> Sequence[object]:
    padding, fill = _argument(node, 1), _argument(node, 2, "value")
    return (node.args[0],) if list(padding[:2]) == [0, 0] and fill == 0 else ()


def _flip(node: Node) -> Sequence[object]:
    return () if _takes_features(node) else (node.args[0],)


def _cat(node: Node) -> Sequence[object]:
    fake, dim = value(node), _argument(node, 1)
    return _argument(node, 0) if fake is not None and dim % fake.ndim != fake.ndim - 1 else ()


def _scale(node: Node) -> Sequence[object]:
    left, right = node.args[:2]
    if is_row_constant(right):
        return (left,)
    return (right,) if is_call(node, aten.mul.Tensor) and is_row_constant(left) else ()


def _add(node: Node) -> Sequence[object]:
    left, right = node.args[:2]
    return (left, right) if width(left) == width(right) == width(node) else ()


def _shift(node: Node) -> Sequence[object]:
    left, right = node.args[:2]
    wide = [operand for operand in (left, right) if width(operand) == width(node)]
    narrow = [operand for operand in (left, right) if is_row_constant(operand)]
    return wide if len(wide) == len(narrow) == 1 else ()


def _where(node: Node) -> Sequence[object]:
    condition, *choices = node.args
    return choices if is_row_constant(condition) else ()


def _reduce_rows(node: Node) -> Sequence[object]:
    return (node.args[0],) if _argument(node, 1) and not _takes_features(node) else ()


def _scatter(node: Node) -> Sequence[object]:
    target, _, index, source = node.args[:4]
    fake = value(index)
    whole_rows = fake is not None and fake.ndim > 0 and fake.shape[-1] == width(node) and is_row_constant(index)
    return _not_along_features(node, 1, (target, source)) if whole_rows else ()


def _index_add(node: Node) -> Sequence[object]:
    return _not_along_features(node, 1, (node.args[0], node.args[3]))


def _index_put(node: Node) -> Sequence[object]:
    return (*_index(node), node.args[2]) if _index(node) else ()


def _slice_scatter(node: Node) -> Sequence[object]:
    return _not_along_features(node, 2, (node.args[0], node.args[1]))


def _mix_rows(node: Node) -> Sequence[object]:
    # rows of the right operand are summed with weights from the left; a weight on the right is no activation
    return () if _is_stored(node.args[1]) else (node.args[1],)


def _is_stored(node: object) -> bool:
    """Whether a value is computed from one input of the graph alone, or is a choice from such a value."""
    while isinstance(node, Node) and node.op == "call_function":
        moves = any(kind is Kind.MOVE for kind, _ in _RULES.get(node.target, ()))
        node = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else node.args[0] if moves else None
    return isinstance(node, Node)


_Rule = Callable[[Node], Sequence[object]]

_RULES: dict[object, tuple[tuple[Kind, _Rule], ...]] = {
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.expand.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.clone.default,
            aten.alias.default,
            aten.embedding.default,
            aten.repeat.default,
            prims.convert_element_type.default,
        ),
        ((Kind.MOVE, _first),),
    ),
    aten.unsqueeze.default: ((Kind.MOVE, _unsqueeze),),
    aten.permute.default: ((Kind.MOVE, _permute),),
    **dict.fromkeys(
        (aten.slice.Tensor, aten.select.int, aten.index_select.default),
        ((Kind.MOVE, _along_rows),),
    ),
    aten.index.Tensor: ((Kind.MOVE, _index),),
    aten._unsafe_index.Tensor: ((Kind.MOVE, _index),),
    aten.gather.default: ((Kind.MOVE, _gather),),
    **dict.fromkeys((aten.flip.default, prims.rev.default), ((Kind.MOVE, _flip),)),
    aten.neg.default: ((Kind.MIX, _first),),
    aten.cat.default: ((Kind.MIX, _cat),),
    aten.constant_pad_nd.default: ((Kind.MIX, _no_padded_features),),
    aten.cumsum.default: ((Kind.MIX, _along_rows),),
    **dict.fromkeys(
        (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
        ((Kind.MIX, _scale),),
    ),
    **dict.fromkeys(
        (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar),
        ((Kind.MIX, _add), (Kind.SHIFT, _shift)),
    ),
    aten.bmm.default: ((Kind.MIX, _mix_rows),),
    aten.where.self: ((Kind.MIX, _where),),
    aten.sum.dim_IntList: ((Kind.MIX, _reduce_rows),),
    aten.mean.dim: ((Kind.MIX, _reduce_rows),),
    **dict.fromkeys(
        (aten.scatter.src, aten.scatter_add.default),
        ((Kind.MIX, _scatter),),
    ),
    aten.index_add.default: ((Kind.MIX, _index_add),),
    **dict.fromkeys((aten.index_put.default, aten._unsafe_index_put.default), ((Kind.MIX, _index_put),)),
    **dict.fromkeys((aten.slice_scatter.default, aten.select_scatter.default), ((Kind.MIX, _slice_scatter),)),
}


def equivariance(node: Node) -> Equivariance | None:
    """How a node commutes with rotations of its last dimension; None where it does not.

    It does not where it mixes, gates or reshapes features, or where a value of another width takes part.
    """
    rules = _RULES.get(node.target) if node.op == "call_function" else None
    features = width(node)
    if rules is None or features is None or features < 2 or not _is_precise(node):
        return None
    for kind, rule in rules:
        operands = [operand for operand in rule(node) if not is_zero(operand)]
        # what is also read in another way, as its own row factor, cannot be rotated in one place alone
        once = all(_reads(node, operand) == operands.count(operand) for operand in operands)
        alike = all(width(operand) == features and _is_precise(operand) for operand in operands)
        if operands and once and alike:
            return Equivariance(kind, tuple(operand for operand in operands if isinstance(operand, Node)))
    return None


def _is_precise(node: object) -> bool:
    """Whether a rotation of the value is a rounding error at most: no format of eight bits or less."""
    fake = value(node)
    return fake is not None and fake.dtype.itemsize > 1


def _reads(node: Node, operand: object) -> int:
    reads: list[object] = []
    map_arg((node.args, node.kwargs), reads.append)
    return reads.count(operand)


def rotation_operands(node: Node) -> tuple[Node, ...]:
    """Operands `u` with `node(u @ Q) == node(u) @ Q` for every orthogonal Q; empty where there are none."""
    found = equivariance(node)
    return found.operands if found else ()


def is_feature_sum(user: Node, source: Node) -> bool:
    """Whether `user` is the sum or the mean of `source` over features (and perhaps over rows)."""
    return _reduces_features(user) and user.args[0] is source


def is_squared_length(user: Node, source: Node) -> bool:
    """Whether `user` only takes part in `sum(source²)` or `mean(source²)` over features: invariant to rotation."""
    power = is_call(user, aten.pow.Tensor_Scalar) and user.args[1] == 2
    product = is_call(user, aten.mul.Tensor) and user.args[0] is source and user.args[1] is source
    return (power or product) and all(_reduces_features(consumer) for consumer in user.users)


def _reduces_features(node: Node) -> bool:
    # a sum of integers rounds every feature first
    sums = is_call(node, aten.mean.dim, aten.sum.dim_IntList) and _takes_features(node)
    result = value(node)
    return sums and result is not None and result.is_floating_point()


def _takes_features(node: Node) -> bool:
    """Whether the features are among the dimensions that an operation on its first operand names."""
    fake, dims = value(node.args[0]), _argument(node, 1, "dims")
    return fake is not None and any(dim % fake.ndim == fake.ndim - 1 for dim in dims or ())
