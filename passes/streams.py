"""Residual streams: the chains of adds, who writes to them and who reads from them.

A stream is a connected component of nodes joined by operations that commute with a rotation of the last
dimension. Rotating a whole component is therefore exact as long as its borders are treated:

    entries   nodes of the component that some other operation computes: linear writers, embeddings, the rest
    readers   linears whose activation is a stream node, straight or through a norm's scale
    exits     any other user: it must see the original basis

Squared lengths (the statistics of an RMSNorm) cross the border freely, for a rotation keeps lengths.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from larosa_compile.passes.graph import ParameterGraph, aten, is_call, rotation_operands, width
from larosa_compile.passes.linears import ActivationGroup, Linear
from larosa_compile.passes.norms import FeatureScale, feature_scale, is_squared_length


@dataclass(frozen=True)
class StreamReader:
    """A group of linears that reads a stream.

    source: the stream node whose features the linears see, before the norm's scale: [..., features].
    scale: the norm's scale between source and linears, or None.
    """

    group: ActivationGroup
    source: Node
    scale: FeatureScale | None


@dataclass(frozen=True)
class Stream:
    """nodes in graph order; writers keyed by the product node that enters the stream."""

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
    """The residual streams of a graph: components with an add, a reader and a linear writer, in graph order."""
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
    streams = []
    for index, nodes in members.items():
        writers = {node: products[node] for node in nodes if node in products}
        adds = any(
            len(rotation_operands(node)) > 1 for node in nodes if is_call(node, aten.add.Tensor, aten.sub.Tensor)
        )
        if adds and writers and index in readers:
            features = width(nodes[0])
            assert features is not None
            streams.append(Stream(features, tuple(nodes), tuple(readers[index]), writers))
    return streams


def exits(node: Node) -> list[Node]:
    """Users of a stream node that would notice a rotation and do not carry it on."""
    return [user for user in node.users if node not in rotation_operands(user) and not is_squared_length(user, node)]


def carried_from(node: Node) -> Node:
    """Walks up through casts, views and row scales to the add or entry that a stream value comes from."""
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
    scale = feature_scale(group.origin, graph)
    source = scale.source if scale else group.activation
    return StreamReader(group, source, scale) if source in component else None
