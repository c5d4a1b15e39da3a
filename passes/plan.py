"""The plan: what each site keeps and in which basis every stream node lives. In memory, from facts and a recipe.

Bases are named; None is the model's own basis. The plan decides nothing about storage: `rotate` makes every
change of basis explicit and `fold` absorbs what it can.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch.fx import Node

from larosa_compile.kernels.support import refusal_reason
from larosa_compile.passes.algebra import Basis
from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.graph import Refusal, aten, is_call, rotation_operands, value
from larosa_compile.passes.linears import ActivationGroup, Linear
from larosa_compile.passes.streams import Stream, StreamReader, carried_from

_NO_SITE = "the recipe has no such site"
_NOT_IN_A_BLOCK = "what it computes feeds no residual stream (a head); the method leaves it dense"


class SiteChoice(Protocol):
    """What a recipe says of one site: the share of its input to drop, and the basis it is dropped in."""

    @property
    def sparsity(self) -> float: ...

    @property
    def basis(self) -> Basis: ...


@dataclass(frozen=True)
class Site:
    """Linears that share one Top-K selection: `kept` of `group.features` inputs, selected in `basis`.

    reader: how the group reads a stream, None where it does not or where it stays in its own basis.
    """

    group: ActivationGroup
    reader: StreamReader | None
    sparsity: float
    kept: int
    basis: Basis

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight that a dense decode step reads here."""
        return sum(linear.weight_bytes for linear in self.group.linears)

    @property
    def kept_bytes(self) -> int:
        """Bytes of weight that a sparse decode step reads here."""
        return self.weight_bytes // self.group.features * self.kept


@dataclass(frozen=True)
class Plan:
    """bases: stream node -> basis, None included. refusals: what stays dense and exact, and why."""

    facts: GraphFacts
    sites: tuple[Site, ...]
    bases: dict[Node, Basis]
    refusals: tuple[Refusal, ...]


def kept_features(sparsity: float, features: int) -> int:
    """`k = round((1 − sparsity) · features)`, at least one (paper: section 3.3)."""
    return max(1, round((1 - sparsity) * features))


def make_plan(facts: GraphFacts, choices: Mapping[str, SiteChoice]) -> Plan:
    """Applies a recipe's choices to one graph. A site without a choice stays dense, with the reason."""
    sites: list[Site] = []
    refusals = list(facts.refusals)
    for group in facts.groups:
        reader = facts.reader_of(group)
        members: dict[tuple[float, Basis], list[Linear]] = {}
        for linear in group.linears:
            choice = choices.get(linear.path)
            reason = _refuse(linear, choice, reader, facts)
            if choice is None or reason:
                refusals.append(Refusal(linear.path, reason or _NO_SITE))
                continue
            members.setdefault((choice.sparsity, choice.basis), []).append(linear)
        for (sparsity, basis), linears in members.items():
            part = ActivationGroup(group.origin, group.chain, tuple(linears))
            kept = kept_features(sparsity, group.features)
            sites.append(Site(part, reader if basis is not None else None, sparsity, kept, basis))
    bases: dict[Node, Basis] = {}
    for stream in facts.streams:
        bases |= _assign_bases(stream, sites)
    return Plan(facts, tuple(sites), bases, tuple(refusals))


def _refuse(linear: Linear, choice: SiteChoice | None, reader: StreamReader | None, facts: GraphFacts) -> str | None:
    if choice is None:
        return _NO_SITE if linear.path in facts.feeding_streams else _NOT_IN_A_BLOCK
    if choice.basis is not None and reader is None:
        return f"the recipe rotates its input to basis '{choice.basis}', but in this graph it reads no residual stream"
    fake = value(linear.product)
    assert fake is not None
    return refusal_reason(fake.device, fake.dtype)


def _assign_bases(stream: Stream, sites: list[Site]) -> dict[Node, Basis]:
    """A basis for every node of a stream, so that few edges change it and the foldable ones do where possible.

    What enters the stream is in the model's own basis. A value that readers see is in the first reader's basis
    from the add that made it; everything in between is in the basis of its first user, so that a writer ends in
    the basis of the next layer and only the skip path changes basis there (method: fold 4).
    """
    wanted = {site.reader.source: site.basis for site in sites if site.reader}
    if not any(reader.source in wanted for reader in stream.readers):
        return {}
    bases: dict[Node, Basis] = dict.fromkeys(stream.entries)
    for reader in stream.readers:
        basis = wanted.get(reader.source)
        bases.setdefault(reader.source, basis)
        bases.setdefault(carried_from(reader.source), basis)
    inside = set(stream.nodes)
    for node in reversed(stream.nodes):
        if node not in bases:
            users = [user for user in node.users if user in inside]
            bases[node] = bases[users[0]] if users else None
    foldable = {linear.product for site in sites for linear in site.group.linears}
    for node in stream.nodes:
        # a sum of embeddings is rotated once, after the add, rather than each of its terms
        if is_call(node, aten.add.Tensor, aten.sub.Tensor) and all(
            bases[entry] is None and entry not in foldable for entry in map(carried_from, rotation_operands(node))
        ):
            bases[node] = None
    return bases
