"""Rewrite 1: makes every change of basis explicit. Exact by itself.

Where an edge of a stream leads from a node in basis `a` to one in basis `b`, the features are multiplied by
`Q_aᵀ Q_b`; where it leaves the stream, by `Q_aᵀ`. `fold` then absorbs the products next to linears, and what is
left are the residual adapters and the rotations at the ends of the stream (method: folds 4 and 6).

Inside a rotated stream two operations change: a number added to all features of a row is added along `1 Q`, and a
sum over features is weighed by it. So the mean that a LayerNorm subtracts needs no rotation back, nor writers that
are centred (method: fold 2), and values that leave the stream keep their mean.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from larosa_compile.passes.algebra import Rotations, change_of_basis, fold_weight, matrix, precision
from larosa_compile.passes.bases import BasisChange, Place
from larosa_compile.passes.equivariance import Kind, equivariance, is_feature_sum, is_row_constant
from larosa_compile.passes.graph import aten, value
from larosa_compile.passes.parameters import Parameters, parameter_expression
from larosa_compile.passes.plan import Plan
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor


@dataclass(frozen=True)
class OnlineRotation:
    """A change of basis in the graph: `result = change.source @ Q_startᵀ Q_end`.

    product: its `mm` over [rows, features]; matrix: the placeholder of `Q_startᵀ Q_end`.
    """

    change: BasisChange
    product: Node
    result: Node
    matrix: Node


def insert_rotations(editor: GraphEditor, plan: Plan) -> list[OnlineRotation]:
    """Inserts every change of basis of the plan; what can be computed from parameters alone becomes one."""
    for node, basis in plan.bases.items():
        if basis is not None:
            _weigh_sums(editor, node, basis)
            _shift_along_ones(editor, node, basis)
    made = []
    for change in plan.changes:
        if change.place is Place.PARAMETER:
            result = _rotated_parameter(editor, change)
        else:
            made.append(rotate_node(editor, change))
            result = made[-1].result
        for user in change.users:
            user.replace_input_with(change.source, result)
    return made


def rotate_node(editor: GraphEditor, change: BasisChange) -> OnlineRotation:
    """Adds `source @ Q_startᵀ Q_end` right after the source; changes no user."""
    node, start, end = change.source, change.start, change.end
    fake = value(node)
    assert fake is not None
    dtype, device = fake.dtype, fake.device
    name = f"rotate {start or 'model'} -> {end or 'model'}"

    def build(_: Parameters, rotations: Rotations) -> torch.Tensor:
        adapter = change_of_basis(matrix(rotations, start), matrix(rotations, end), precision(dtype))
        return adapter.to(device, dtype).contiguous()

    features = int(fake.shape[-1])
    adapter = FoldedTensor(f"{name} {dtype}", (), (features, features), dtype, device, build)
    adapter_node = editor.folded_input(name, adapter)
    with editor.inserting_after(node):
        product = editor.call(f"{node.name}_rotated", aten.mm.default, editor.as_rows(node), adapter_node)
        result = editor.like(product, node)
    return OnlineRotation(change, product, result, adapter_node)


def _rotated_parameter(editor: GraphEditor, change: BasisChange) -> Node:
    expression = parameter_expression(change.source, editor.source)
    fake = value(change.source)
    assert expression is not None and fake is not None
    dtype, device = fake.dtype, fake.device

    def build(parameters: Parameters, rotations: Rotations) -> torch.Tensor:
        adapter = change_of_basis(matrix(rotations, change.start), matrix(rotations, change.end))
        rotated = fold_weight(expression.evaluate(parameters), write=adapter)
        return rotated.to(device, dtype).contiguous()

    key = f"rotated {expression} {change.start} -> {change.end}"
    folded = FoldedTensor(key, (expression.path,), tuple(map(int, fake.shape)), dtype, device, build)
    return editor.folded_input(f"rotated {expression.path}", folded)


def _ones(editor: GraphEditor, node: Node, basis: str) -> Node:
    """`1 Q`, [features], in the dtype of `node`."""
    fake = value(node)
    assert fake is not None
    dtype, device = fake.dtype, fake.device

    def build(_: Parameters, rotations: Rotations) -> torch.Tensor:
        return rotations[basis].double().sum(0).to(device, dtype)

    key = f"ones in {basis} {dtype}"
    folded = FoldedTensor(key, (), (int(fake.shape[-1]),), dtype, device, build)
    return editor.folded_input(f"ones in {basis}", folded)


def _weigh_sums(editor: GraphEditor, node: Node, basis: str) -> None:
    """`Σ x = Σ (x Q) ⊙ (1 Q)`: sums and means over the features of a node in `basis`."""
    sums = [user for user in node.users if is_feature_sum(user, node)]
    if sums:
        with editor.inserting_after(node):
            weighed = editor.call(f"{node.name}_weighed", aten.mul.Tensor, node, _ones(editor, node, basis))
        for user in sums:
            user.replace_input_with(node, weighed)


def _shift_along_ones(editor: GraphEditor, node: Node, basis: str) -> None:
    """`(x + r 1) Q = x Q + r (1 Q)`: a node in `basis` that adds one number to all features of a row."""
    found = equivariance(node)
    if found is None or found.kind is not Kind.SHIFT:
        return
    ones = _ones(editor, node, basis)
    position = next(index for index, operand in enumerate(node.args[:2]) if is_row_constant(operand))
    with editor.graph.inserting_before(node):
        along = editor.call(f"{node.name}_along_ones", aten.mul.Tensor, ones, node.args[position])
    node.update_arg(position, editor.cast_like(along, node))
    # a number has become a tensor
    if node.target is aten.add.Scalar:
        node.target = aten.add.Tensor
    elif node.target is aten.sub.Scalar:
        node.target = aten.sub.Tensor
