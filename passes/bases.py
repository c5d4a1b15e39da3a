"""Which basis every node of a stream lives in, and what each change of basis costs. Decides, rewrites nothing.

Two ways to serve the readers of a stream are weighed by the bytes that a decode step reads for them: the stream
itself is kept in the readers' bases, which is free next to linears that can absorb a rotation; or it stays in the
model's own basis and each group of readers rotates what it reads (where norms or gains stand between writers and
stream, method: fold 7).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch.fx import Node

from larosa_compile.passes.algebra import Basis
from larosa_compile.passes.equivariance import is_squared_length, rotation_operands
from larosa_compile.passes.graph import ParameterGraph, aten, is_call, value
from larosa_compile.passes.linears import Linear
from larosa_compile.passes.norms import feature_step
from larosa_compile.passes.parameters import parameter_expression
from larosa_compile.passes.streams import Stream, StreamReader, carried_from, exits


class Place(Enum):
    """Where a change of basis is computed.

    WEIGHT: in the weight of the linear that makes the value. PARAMETER: in the parameter that the value is.
    NOWHERE: its only users fold away, for they stand between the value and linears that read it rotated.
    ONLINE: at run time.
    """

    WEIGHT = "weight"
    PARAMETER = "parameter"
    NOWHERE = "nowhere"
    ONLINE = "online"


@dataclass(frozen=True)
class BasisChange:
    """`source`, which is in basis `start`, is wanted in basis `end` by `users` (none where only sites read it)."""

    source: Node
    start: Basis
    end: Basis
    users: tuple[Node, ...]
    place: Place

    @property
    def bytes(self) -> int:
        """Bytes read at run time for the change: its [features, features] matrix, or nothing."""
        fake = value(self.source)
        assert fake is not None
        return int(fake.shape[-1]) ** 2 * fake.dtype.itemsize if self.place is Place.ONLINE else 0


class RotatedSite(Protocol):
    """What is asked of a site here."""

    @property
    def linears(self) -> tuple[Linear, ...]: ...

    @property
    def reader(self) -> StreamReader | None: ...

    @property
    def basis(self) -> Basis: ...


def assign_bases(
    stream: Stream, sites: Iterable[RotatedSite], graph: ParameterGraph, tables: Mapping[Node, Basis]
) -> tuple[dict[Node, Basis], list[BasisChange]]:
    """The cheaper assignment of bases to the nodes of a stream, with the changes of basis it needs.

    tables: embeddings whose table is stored in that basis, whatever reads them.
    """
    sites, readers = list(sites), set(map(id, stream.readers))
    reading = [site for site in sites if id(site.reader) in readers]
    given = {node: basis for node, basis in tables.items() if node in stream.nodes}
    own: dict[Node, Basis] = dict.fromkeys(stream.nodes) | given
    candidates = [_in_readers_bases(stream, reading, sites, graph, given), own] if reading else [own]
    changes = [_changes(stream, bases, reading, sites, graph, given) for bases in candidates]
    costs = [sum(change.bytes for change in needed) for needed in changes]
    best = costs.index(min(costs))
    return candidates[best], changes[best]


def _in_readers_bases(
    stream: Stream,
    reading: list[RotatedSite],
    sites: list[RotatedSite],
    graph: ParameterGraph,
    tables: Mapping[Node, Basis],
) -> dict[Node, Basis]:
    """What enters the stream is in the model's own basis, or that of its table. A value that readers see is in the
    first reader's basis from the add that made it; everything in between is in the basis of its first user, so that a
    writer ends in the basis of the next layer and only the skip path changes basis there (method: fold 4).
    """
    wanted: dict[Node, Basis] = {}
    for site in reading:
        assert site.reader is not None
        wanted.setdefault(site.reader.source, site.basis)
    bases: dict[Node, Basis] = dict.fromkeys(stream.entries)
    bases |= dict.fromkeys(node for node in stream.nodes if _reads_large_table(node, graph))
    # a parameter is rotated as the stream meets it, not before it is sliced or cast
    bases |= dict.fromkeys(node for node in stream.nodes if parameter_expression(node, graph) is not None)
    bases |= tables
    for reader in stream.readers:
        basis = wanted.get(reader.source)
        bases.setdefault(reader.source, basis)
        bases.setdefault(carried_from(reader.source), basis)
    inside = set(stream.nodes)
    for node in reversed(stream.nodes):
        if node not in bases:
            users = [user for user in node.users if user in inside]
            bases[node] = bases[users[0]] if users else None
    foldable = {linear.product for site in sites for linear in site.linears}
    for node in stream.nodes:
        # a sum of embeddings is rotated once, after the add, rather than each of its terms
        terms = [operand if operand in tables else carried_from(operand) for operand in rotation_operands(node)]
        if len(terms) > 1 and is_call(node, aten.add.Tensor, aten.sub.Tensor):
            if all(bases[term] is None and term not in foldable for term in terms):
                bases[node] = None
    return bases


def _reads_large_table(node: Node, graph: ParameterGraph) -> bool:
    """Whether rows are looked up in a parameter larger than a rotation: rotating them beats storing it twice."""
    return any(
        _is_larger_than_a_rotation(operand) and parameter_expression(operand, graph) is not None
        for operand in rotation_operands(node)
    )


def _is_larger_than_a_rotation(node: Node) -> bool:
    fake = value(node)
    assert fake is not None
    return fake.numel() > int(fake.shape[-1]) ** 2


def _changes(
    stream: Stream,
    bases: dict[Node, Basis],
    reading: list[RotatedSite],
    sites: list[RotatedSite],
    graph: ParameterGraph,
    tables: Mapping[Node, Basis],
) -> list[BasisChange]:
    wanted: dict[tuple[Node, Basis], list[Node]] = {}
    for node in stream.nodes:
        carrying = [user for user in node.users if node in rotation_operands(user)]
        ends = [(user, bases.get(user)) for user in carrying] + [(user, None) for user in exits(node)]
        for user, end in ends:
            if end != bases[node]:
                wanted.setdefault((node, end), []).append(user)
    for site in reading:
        # what the folded site reads instead of the rotation back to the model's basis
        assert site.reader is not None
        if bases[site.reader.source] != site.basis:
            wanted.setdefault((site.reader.source, site.basis), [])
    products = {linear.product for site in sites for linear in site.linears}
    folding_away = _folding_away(reading, graph)
    changes = []
    for (node, end), users in wanted.items():
        place = Place.ONLINE
        # lengths do not see in which basis the product is
        seeing = {user for user in node.users if not is_squared_length(user, node)}
        if node in products and set(users) == seeing and users:
            place = Place.WEIGHT
        elif parameter_expression(node, graph) is not None and (
            not _is_larger_than_a_rotation(node) or (users and all(user in tables for user in users))
        ):
            place = Place.PARAMETER
        elif users and all((node, user) in folding_away for user in users):
            place = Place.NOWHERE
        changes.append(BasisChange(node, bases[node], end, tuple(users), place))
    return changes


def _folding_away(reading: list[RotatedSite], graph: ParameterGraph) -> set[tuple[Node, Node]]:
    """Reads (node, user) that nothing needs once sites are folded: those between a stream and the linears of a site.

    The statistics of a norm are not among them: the folded site scales its rows by them.
    """
    gone = {(linear.activation, linear.product) for site in reading for linear in site.linears}
    for site in reading:
        assert site.reader is not None
        for linear in site.linears:
            node = linear.activation
            while node is not site.reader.source and all((node, user) in gone for user in node.users):
                step = feature_step(node, graph)
                (below,) = (step.source,) if step else rotation_operands(node)
                gone.add((below, node))
                node = below
    return gone
