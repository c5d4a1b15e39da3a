"""Residual streams: the chains of adds, who writes to them and who reads from them.

A stream is a connected component of nodes joined by operations that commute with a rotation of the last
dimension. Rotating a whole component is therefore exact as long as its borders are treated:

    entries   nodes of the component that some other operation computes: linear writers, tables, the rest
    readers   linears whose activation is a stream node, straight or through the scale and shift of a norm
    exits     any other user: it must see the original basis

Sums and squared lengths over features (the statistics of norms) cross the border: a rotation keeps lengths, and the
sum of rotated features is a weighted one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from larosa_compile.passes.equivariance import is_feature_sum, is_squared_length, rotation_operands
from larosa_compile.passes.graph import ParameterGraph, aten, is_call, width
from larosa_compile.passes.linears import ActivationGroup, Linear
from larosa_compile.passes.norms import FeatureAffine, feature_affine


@dataclass(frozen=True)
class StreamReader:
    """A group of linears that reads a stream.

    source: the stream node whose features the linears see, before a norm's scale: [..., features].
    affine: the scale and shift between source and linears, or None.
    """

    group: ActivationGroup
    source: Node
    affine: FeatureAffine | None


@dataclass(frozen=True)
class Stream:
    """nodes in graph order; writers: linears whose product enters the stream itself, keyed by that node."""

    features: int
    nodes: tuple[Node, ...]
    readers: tuple[StreamReader, ...]
    writers: dict[Node, Linear]

    @property
    def entries(self) -> Iterator[Node]:
        """Nodes that carry features into the stream."""
        return (node for node in self.nodes if not rotation_operands(node))

    def layers(self) -> list[list[StreamReader]]:
        """Readers by layer: the longest runs in which no weight shapes repeat.

        In a decoder layer q/k/v and gate/up differ in shape, and the next layer starts by repeating one. Only
        the granularity of rotations depends on this, never exactness.
        """
        layers: list[list[StreamReader]] = []
        seen: set[tuple[int, ...]] = set()
        for reader in self.readers:
            shapes = tuple(linear.out_features for linear in reader.group.linears)
            if not layers or shapes in seen:
                layers.append([])
                seen = set()
            seen.add(shapes)
            layers[-1].append(reader)
        return layers


def find_streams(graph: ParameterGraph, groups: list[ActivationGroup]) -> list[Stream]:
    """The residual streams of a graph, in graph order.

    They are the components with an add and a reader to which a linear writes, or something that was computed from
    what a reader read (behind a norm or a gain).
    """
    products = {linear.product: linear for group in groups for linear in group.linears}
    component = _components(graph)
    readers: dict[int, list[StreamReader]] = {}
    for group in groups:
        reader = _reader(group, component, graph)
        if reader is not None:
            readers.setdefault(component[reader.source], []).append(reader)

    members: dict[int, list[Node]] = {}
    for node, index in component.items():
        members.setdefault(index, []).append(node)
    candidates = [index for index, nodes in members.items() if index in readers and any(map(_adds, nodes))]
    fed = _fed_by_their_readers(graph, component, {index: readers[index] for index in candidates})
    streams = []
    for index in candidates:
        nodes = members[index]
        features = width(nodes[0])
        writers = {node: products[node] for node in nodes if node in products}
        if (writers or index in fed) and features is not None:
            streams.append(Stream(features, tuple(nodes), tuple(readers[index]), writers))
    return streams


def _fed_by_their_readers(
    graph: ParameterGraph, component: dict[Node, int], readers: dict[int, list[StreamReader]]
) -> set[int]:
    """Components to which something comes back that was computed from what a linear read there."""
    reads = {linear.product: index for index, found in readers.items() for r in found for linear in r.group.linears}
    # for each node, the components it depends on through a reader, as a set of bits
    behind: dict[Node, int] = {}
    fed = set()
    for node in graph.graph.nodes:
        bits = 1 << reads[node] if node in reads else 0
        for operand in node.all_input_nodes:
            bits |= behind[operand]
        behind[node] = bits
        index = component.get(node)
        if index in readers and not rotation_operands(node) and bits >> index & 1:
            fed.add(index)
    return fed


def _adds(node: Node) -> bool:
    sums = is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.scatter_add.default, aten.index_add.default)
    accumulates = is_call(node, aten.index_put.default, aten._unsafe_index_put.default) and True in node.args[3:4]
    return (sums or accumulates) and len(rotation_operands(node)) > 1


def exits(node: Node) -> list[Node]:
    """Users of a stream node that would notice a rotation and do not carry it on."""
    return [
        user
        for user in node.users
        if not (node in rotation_operands(user) or is_squared_length(user, node) or is_feature_sum(user, node))
    ]


def carried_from(node: Node) -> Node:
    """Walks up through casts, views, row scales and shifts to the add or entry that a stream value comes from."""
    while len(operands := rotation_operands(node)) == 1:
        (node,) = operands
    return node


def _components(graph: ParameterGraph) -> dict[Node, int]:
    """Union-find over operations that commute with a rotation; node -> component, nodes in graph order."""
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while (up := parent.setdefault(node, node)) is not node:
            parent[node] = parent.setdefault(up, up)
            node = parent[node]
        return node

    for node in graph.graph.nodes:
        for operand in rotation_operands(node):
            parent[root(operand)] = root(node)
    order = [node for node in graph.graph.nodes if node in parent]
    index: dict[Node, int] = {}
    return {node: index.setdefault(root(node), len(index)) for node in order}


def _reader(group: ActivationGroup, component: dict[Node, int], graph: ParameterGraph) -> StreamReader | None:
    affine = feature_affine(group.activation, graph)
    if affine is not None and affine.shifts and group.stacked:
        # the shift would become a bias for each expert, which the product has no place for
        return None
    source = affine.source if affine else group.activation
    return StreamReader(group, source, affine) if source in component else None
