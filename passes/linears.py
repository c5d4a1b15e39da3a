"""Linear sites: every product of an activation with a parameter, and which of them read the same activation."""

from collections import defaultdict
from dataclasses import dataclass

from torch.fx import Node

from larosa_compile.passes.graph import (
    ParameterGraph,
    Refusal,
    aten,
    is_call,
    rotation_operands,
    value,
    width,
)
from larosa_compile.passes.parameters import ParameterExpression, parameter_expression


@dataclass(frozen=True)
class Linear:
    """`product = activation @ weight + bias`, all of it one `mm` or `addmm` node.

    product: [rows, out_features]; activation: [rows, in_features].
    weight: shape [in_features, out_features]; bias: shape [out_features], or None.
    """

    product: Node
    activation: Node
    weight: ParameterExpression
    bias: ParameterExpression | None
    in_features: int
    out_features: int

    @property
    def path(self) -> str:
        """The weight's parameter path; it names the site."""
        return self.weight.path

    @property
    def weight_bytes(self) -> int:
        """Bytes that one product reads, in the dtype it computes in."""
        return self.in_features * self.out_features * int(self.product.meta["val"].dtype.itemsize)


@dataclass(frozen=True)
class ActivationGroup:
    """Linears that read one activation (q/k/v; gate/up), hence share one Top-K selection.

    origin: the node that computes the activation; chain: the views and casts from `origin` (exclusive) to the
    linears' operand (inclusive), in graph order.
    """

    origin: Node
    chain: tuple[Node, ...]
    linears: tuple[Linear, ...]

    @property
    def activation(self) -> Node:
        return self.chain[-1] if self.chain else self.origin

    @property
    def features(self) -> int:
        return self.linears[0].in_features

    @property
    def name(self) -> str:
        return self.linears[0].path


def find_linears(graph: ParameterGraph) -> tuple[list[Linear], list[Refusal]]:
    """All linear sites in graph order, and the products with a parameter that are not of that form."""
    linears: list[Linear] = []
    refusals: list[Refusal] = []
    for node in graph.graph.nodes:
        if is_call(node, aten.mm.default, aten.addmm.default):
            found = _linear(node, graph)
            if isinstance(found, Linear):
                linears.append(found)
            elif found is not None:
                refusals.append(found)
        elif is_call(node, aten.bmm.default, aten.baddbmm.default):
            weight = next(filter(None, (parameter_expression(operand, graph) for operand in node.args[-2:])), None)
            if weight is not None:
                refusals.append(
                    Refusal(weight.path, "a batched product with a parameter is not supported; it stays dense")
                )
    return linears, refusals


def _linear(node: Node, graph: ParameterGraph) -> Linear | Refusal | None:
    """The node as a linear; why it cannot be one; None where no parameter is multiplied from the right."""
    *biases, activation, right = node.args[:3]
    weight, shape = parameter_expression(right, graph), value(right)
    if weight is None or shape is None or not isinstance(activation, Node):
        return None
    bias = None
    if biases:
        bias, bias_fake = parameter_expression(biases[0], graph), value(biases[0])
        if any(node.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            return Refusal(weight.path, "addmm with alpha or beta other than 1 is not supported; it stays dense")
        if bias is None or bias_fake is None or bias_fake.numel() != width(node):
            return Refusal(weight.path, "its bias is computed, or is not one number per feature; it stays dense")
    return Linear(node, activation, weight, bias, int(shape.shape[0]), int(shape.shape[1]))


def chain_to_origin(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """Walks up through operations on one tensor that keep features whole, to the node that computed them.

    Returns (origin, chain), chain in graph order and ending with `node` unless `node` is the origin.
    """
    chain: list[Node] = []
    while (operand := _only_tensor(node)) is not None:
        chain.append(node)
        node = operand
    return node, tuple(reversed(chain))


def _only_tensor(node: Node) -> Node | None:
    """The operand of an operation on one tensor that keeps features whole (symbolic sizes do not count)."""
    operands = rotation_operands(node)
    tensors = [operand for operand in node.all_input_nodes if value(operand) is not None]
    return operands[0] if len(operands) == 1 and tensors == [operands[0]] else None


def group_by_activation(linears: list[Linear]) -> list[ActivationGroup]:
    """Linears whose operands are spelled alike from one origin, in graph order of their first member.

    Every linear of a traced graph has its own `view` of the activation; equal chains compute equal tensors.
    """
    groups: dict[object, list[Linear]] = defaultdict(list)
    for linear in linears:
        origin, chain = chain_to_origin(linear.activation)
        spelled = tuple((step.target, repr(step.args[1:]), repr(step.kwargs), width(step)) for step in chain)
        groups[origin, spelled].append(linear)
    return [ActivationGroup(*chain_to_origin(members[0].activation), tuple(members)) for members in groups.values()]
