"""The plan: what each site keeps, in which basis every stream node lives, and where each change of basis is computed.

In memory, from facts and a recipe. Bases are named; None is the model's own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch.fx import Node

from larosa_compile.kernels.support import refusal_reason, skips_weights
from larosa_compile.passes.algebra import Basis
from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.bases import BasisChange, Place, assign_bases
from larosa_compile.passes.gates import Gate, find_gate
from larosa_compile.passes.graph import Refusal, rows, value
from larosa_compile.passes.linears import ActivationGroup, Linear
from larosa_compile.passes.parameters import looked_up_parameter
from larosa_compile.passes.selection import EVERY_ROW, GATE, Selection
from larosa_compile.passes.streams import StreamReader

_NO_SITE = "the recipe has no such site"
_NOT_IN_A_BLOCK = "what it computes feeds no residual stream (a head); the method leaves it dense"


class SiteChoice(Protocol):
    """What a recipe says of one site: the share of its input to drop, in which basis, and how it is chosen."""

    @property
    def sparsity(self) -> float: ...

    @property
    def basis(self) -> Basis: ...

    @property
    def kind(self) -> str: ...

    @property
    def selection(self) -> str: ...

    @property
    def threshold(self) -> float: ...


HEAD = "head"
"""The kind of site whose basis is that of what its linears read, scaled and shifted, rather than of the stream."""


@dataclass(frozen=True)
class Site:
    """Linears that share one selection: `kept` of `group.features` inputs, on average or each time, in `basis`.

    reader: how the group reads a stream that is kept in its basis; None where it does not, so that a basis means a
    rotation of the group's activation at run time.
    lookups: embeddings that look rows up in the weight of a head; they do so in the folded weight, so that a tied
    vocabulary matrix is stored once.
    gate: where the selection looks at an activated gate, that gate.
    """

    group: ActivationGroup
    reader: StreamReader | None
    sparsity: float
    kept: int
    basis: Basis
    lookups: tuple[Node, ...] = ()
    selection: Selection = EVERY_ROW
    gate: Gate | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether anything may be dropped."""
        return self.kept < self.group.features

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.group.linears

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight that a dense decode step reads here."""
        return sum(linear.weight_bytes for linear in self.linears)

    @property
    def kept_bytes(self) -> int:
        """Bytes of weight that a sparse decode step reads here. A stack's product has no kernel that skips rows."""
        return self.weight_bytes if self.group.stacked else self.weight_bytes // self.group.features * self.kept


@dataclass(frozen=True)
class Plan:
    """bases: stream node -> basis, None included. refusals: what stays dense and exact, and why."""

    facts: GraphFacts
    sites: tuple[Site, ...]
    bases: dict[Node, Basis]
    changes: tuple[BasisChange, ...]
    refusals: tuple[Refusal, ...]


def kept_features(sparsity: float, features: int) -> int:
    """`k = round((1 − sparsity) · features)`, at least one (paper: section 3.3)."""
    return max(1, round((1 - sparsity) * features))


def make_plan(
    facts: GraphFacts, choices: Mapping[str, SiteChoice], share_tables: bool = True, dense_prompts: bool = False
) -> Plan:
    """Applies a recipe's choices to one graph. A site without a choice stays dense, with the reason.

    share_tables: embeddings tied to a head look rows up in its folded weight. dense_prompts: products of so many rows
    that they read all weights anyway drop nothing.
    """
    sites: list[Site] = []
    refusals = list(facts.refusals)
    products = {linear.product: linear for linear in facts.linears}
    for group in facts.groups:
        reader = facts.reader_of(group)
        gate = find_gate(group, products)
        members: dict[tuple[float, Basis, bool, Selection], list[Linear]] = {}
        for linear in group.linears:
            choice = choices.get(linear.path)
            reason = _refuse(linear, choice, reader, gate, facts)
            if choice is None or reason:
                refusals.append(Refusal(linear.path, reason or _NO_SITE))
                continue
            selection = Selection(choice.selection, choice.threshold)
            sparsity = 0.0 if dense_prompts and _reads_all(linear, choice) else choice.sparsity
            members.setdefault((sparsity, choice.basis, choice.kind == HEAD, selection), []).append(linear)
        for (sparsity, basis, is_head, selection), linears in members.items():
            part = ActivationGroup(tuple(linears))
            kept = kept_features(sparsity, group.features)
            seen = reader if basis is not None and not is_head else None
            lookups = _lookups(linears, facts) if is_head and share_tables else ()
            chosen_by = gate if selection.rule == GATE else None
            sites.append(Site(part, seen, sparsity, kept, basis, lookups, selection, chosen_by))
    bases: dict[Node, Basis] = {}
    changes: list[BasisChange] = []
    tables = {node: site.basis for site in sites for node in site.lookups}
    for stream in facts.streams:
        assigned, needed = assign_bases(stream, sites, facts.graph, tables)
        bases |= assigned
        changes += needed
    changes += _rotations_of_heads(sites, bases)
    return Plan(facts, tuple(sites), bases, tuple(changes), tuple(refusals))


def _refuse(
    linear: Linear, choice: SiteChoice | None, reader: StreamReader | None, gate: Gate | None, facts: GraphFacts
) -> str | None:
    if choice is None:
        return _NO_SITE if linear.path in facts.feeding_streams else _NOT_IN_A_BLOCK
    if choice.basis is not None and reader is None and choice.kind != HEAD:
        return f"the recipe rotates its input to basis '{choice.basis}', but in this graph it reads no residual stream"
    if choice.selection == GATE and gate is None:
        return "the recipe chooses by the gate of its input, but in this graph its input is no gated product"
    fake = value(linear.product)
    assert fake is not None
    return refusal_reason(fake.device, fake.dtype)


def _reads_all(linear: Linear, choice: SiteChoice) -> bool:
    count, fake = rows(linear.activation), value(linear.product)
    assert fake is not None
    kept = kept_features(choice.sparsity, linear.in_features)
    return not skips_weights(fake.device, count if isinstance(count, int) else None, linear.in_features, kept)


def _lookups(linears: list[Linear], facts: GraphFacts) -> tuple[Node, ...]:
    """The embeddings of a stream that look rows up in what is, transposed, the weight of the only linear."""
    if len(linears) > 1 or not linears[0].is_parameter_transposed:
        return ()
    nodes = [node for stream in facts.streams for node in stream.nodes]
    return tuple(node for node in nodes if looked_up_parameter(node, facts.graph) == linears[0].path)


def _rotations_of_heads(sites: list[Site], bases: Mapping[Node, Basis]) -> Iterator[BasisChange]:
    for site in sites:
        if site.basis is not None and site.reader is None:
            activation = site.group.activation
            yield BasisChange(activation, bases.get(activation), site.basis, (), Place.ONLINE)
