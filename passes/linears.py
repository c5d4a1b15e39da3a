"""Linear sites: every product of an activation with a parameter, and which of them read the same activation."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.fx import Node

from larosa_compile.passes.equivariance import Kind, equivariance
from larosa_compile.passes.graph import ParameterGraph, Refusal, aten, is_call, rows, value, width
from larosa_compile.passes.parameters import ParameterExpression, parameter_expression, selected_parameter

_GROUPED_PRODUCTS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""`op(x [rows, in], weights [experts, in, out], offsets [experts])`: rows sorted by expert."""


@dataclass(frozen=True)
class Linear:
    """`product = activation @ weight + bias`, all of it one node.

    product: [rows, out_features], or [batch, rows, out_features]; activation likewise with in_features.
    weight: shape [in_features, out_features], or a stack [experts, in_features, out_features] of such weights.
    selection: for a stack, the node that picks each row's weight from it, None where the product does so itself.
    bias: shape [out_features], or None; a stack never has one.
    """

    product: Node
    activation: Node
    weight: ParameterExpression
    bias: ParameterExpression | None
    in_features: int
    out_features: int
    experts: int = 1
    selection: Node | None = None
    stacked: bool = False

    @property
    def path(self) -> str:
        """The weight's parameter path; it names the site."""
        return self.weight.path

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype that the product computes in."""
        return int(self.product.meta["val"].dtype.itemsize)

    @property
    def is_parameter_transposed(self) -> bool:
        """Whether the weight is its parameter, [out_features, in_features], turned and nothing else."""
        steps = self.weight.steps
        return len(steps) == 1 and steps[0].target is aten.permute.default and not self.stacked

    @property
    def weight_bytes(self) -> int:
        """Bytes that one product reads, in the dtype it computes in: of a stack, at most one weight a row."""
        dense = self.in_features * self.out_features * self.itemsize
        tokens = rows(self.activation)
        return dense * (min(self.experts, tokens) if isinstance(tokens, int) else self.experts)


@dataclass(frozen=True)
class ActivationGroup:
    """Linears that read one activation (q/k/v; gate/up), hence share one Top-K selection: all stacked, or none."""

    linears: tuple[Linear, ...]

    @property
    def activation(self) -> Node:
        """What the first linear reads; the others read the same, perhaps through views of their own."""
        return self.linears[0].activation

    @property
    def features(self) -> int:
        return self.linears[0].in_features

    @property
    def name(self) -> str:
        return self.linears[0].path

    @property
    def stacked(self) -> bool:
        return self.linears[0].stacked


def find_linears(graph: ParameterGraph) -> tuple[list[Linear], list[Refusal]]:
    """All linear sites in graph order, and the products with a parameter that are not of that form."""
    linears: list[Linear] = []
    refusals: list[Refusal] = []
    for node in graph.graph.nodes:
        found = _product(node, graph)
        if isinstance(found, Linear):
            linears.append(found)
        elif found is not None:
            refusals.append(found)
    return linears, refusals


def _product(node: Node, graph: ParameterGraph) -> Linear | Refusal | None:
    """The node as a linear; why it cannot be one; None where no parameter is multiplied from the right."""
    if is_call(node, aten.mm.default, aten.addmm.default):
        return _plain(node, graph)
    if is_call(node, aten.bmm.default) or _is_grouped_product(node):
        return _stacked(node, graph)
    if is_call(node, aten.baddbmm.default) and (weight := selected_parameter(node.args[2], graph)):
        return Refusal(weight.expression.path, "a batched product with a term added to it stays dense")
    return None


def _is_grouped_product(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _GROUPED_PRODUCTS


def _plain(node: Node, graph: ParameterGraph) -> Linear | Refusal | None:
    *biases, activation, right = node.args[:3]
    weight, shape = parameter_expression(right, graph), value(right)
    if weight is None or shape is None or not isinstance(activation, Node) or parameter_expression(activation, graph):
        return None
    bias = None
    if biases:
        bias, bias_fake = parameter_expression(biases[0], graph), value(biases[0])
        if any(node.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            return Refusal(weight.path, "addmm with alpha or beta other than 1 is not supported; it stays dense")
        if bias is None or bias_fake is None or bias_fake.numel() != width(node):
            return Refusal(weight.path, "its bias is computed, or is not one number per feature; it stays dense")
    return Linear(node, activation, weight, bias, int(shape.shape[0]), int(shape.shape[1]))


def _stacked(node: Node, graph: ParameterGraph) -> Linear | Refusal | None:
    activation, right = node.args[:2]
    weight = selected_parameter(right, graph)
    if weight is None or not isinstance(activation, Node) or parameter_expression(activation, graph):
        return None
    if weight.shape is None or len(weight.shape) != 3 or len(node.args) > 3 or node.kwargs:
        return Refusal(weight.expression.path, "this form of a batched product is not supported; it stays dense")
    experts, in_features, out_features = weight.shape
    if is_call(node, aten._grouped_mm.default) and out_features * node.meta["val"].dtype.itemsize % 16:
        return Refusal(weight.expression.path, "a folded weight would not have the strides that its product asks for")
    return Linear(
        node,
        activation,
        weight.expression,
        None,
        in_features,
        out_features,
        experts,
        weight.selection,
        stacked=True,
    )


def chain_to_origin(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """Walks up through what selects, views or casts rows, or multiplies by a number, to the node that made them.

    Returns (origin, chain), chain in graph order and ending with `node` unless `node` is the origin.
    """
    chain: list[Node] = []
    while (operand := _one_step_up(node)) is not None:
        chain.append(node)
        node = operand
    return node, tuple(reversed(chain))


def _one_step_up(node: Node) -> Node | None:
    found = equivariance(node)
    if found is None or len(found.operands) != 1:
        return None
    tensors = [operand for operand in node.all_input_nodes if value(operand) is not None]
    moves = found.kind is Kind.MOVE or (found.kind is Kind.MIX and tensors == [*found.operands])
    return found.operands[0] if moves else None


def group_by_activation(linears: list[Linear]) -> list[ActivationGroup]:
    """Linears whose operands are spelled alike from one origin, in graph order of their first member.

    Every linear of a traced graph has its own `view` of the activation; equal chains compute equal tensors.
    """
    groups: dict[object, list[Linear]] = defaultdict(list)
    for linear in linears:
        origin, chain = chain_to_origin(linear.activation)
        spelled = tuple((step.target, repr(step.args[1:]), repr(step.kwargs), width(step)) for step in chain)
        groups[origin, spelled, linear.stacked].append(linear)
    return [ActivationGroup(tuple(members)) for members in groups.values()]
