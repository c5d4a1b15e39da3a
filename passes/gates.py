"""Activated gates: where what a linear reads is `act(gate) · up`, both of one activation (method: CATS).

Found by structure: one factor is a linear and nothing else, the other a nonlinear function, entry by entry, of a linear
that reads the same. The two linears may be slices of one product.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from larosa_compile.passes.graph import aten, is_call, prims, value, width
from larosa_compile.passes.linears import ActivationGroup, Linear, chain_to_origin

_MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.slice.Tensor,
    prims.convert_element_type.default,
)
"""What carries entries on as they are."""


@dataclass(frozen=True)
class Gate:
    """`product = factor · up`, each [..., features]: factor is the activated gate."""

    product: Node
    factor: Node


def find_gate(group: ActivationGroup, linears: Mapping[Node, Linear]) -> Gate | None:
    """The gate that is a factor of what a group reads; None where there is none. linears: by their product."""
    product, _ = chain_to_origin(group.activation)
    if not is_call(product, aten.mul.Tensor):
        return None
    for factor, other in (product.args[:2], product.args[1::-1]):
        if not isinstance(factor, Node) or width(factor) != width(product) or width(other) != width(product):
            continue
        gate, up = _only_linear_of(factor, linears), _linear(other, linears)
        if gate is None or up is None or _linear(factor, linears) is not None:
            continue
        if chain_to_origin(gate.activation)[0] is chain_to_origin(up.activation)[0]:
            return Gate(product, factor)
    return None


def _linear(node: object, linears: Mapping[Node, Linear]) -> Linear | None:
    """The linear whose outputs a node carries on unchanged."""
    while is_call(node, *_MOVES):
        node = node.args[0]
    return linears.get(node) if isinstance(node, Node) else None


def _only_linear_of(node: Node, linears: Mapping[Node, Linear]) -> Linear | None:
    """The linear that a node is a function of, entry by entry; None where it is not, or of several."""
    found: set[Node] = set()
    seen, pending = set[Node](), [node]
    while pending:
        node = pending.pop()
        if node in seen or not node.all_input_nodes:
            continue
        seen.add(node)
        if node in linears:
            found.add(node)
        elif is_call(node, *_MOVES) or _is_pointwise(node):
            pending.extend(operand for operand in node.all_input_nodes if value(operand) is not None)
        else:
            return None
    return linears[found.pop()] if len(found) == 1 else None


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
