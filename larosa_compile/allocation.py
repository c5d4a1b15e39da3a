"""Which sites a recipe has, how much each drops, and which of them share a basis. From structure alone."""

from dataclasses import dataclass
from typing import Literal

from larosa_compile.errors import OptionError
from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.linears import ActivationGroup, Linear
from larosa_compile.recipe import MAX_SPARSITY, SiteRecipe

Rotation = Literal["layer", "model", "none"] | int
"""How many layers share a basis: one each, all, that many; "none" leaves every activation in its own basis."""

MIN_OUTPUTS_PER_FEATURE = 16
"""A linear with fewer outputs than a sixteenth of its inputs keeps all of them."""


@dataclass(frozen=True)
class Coefficients:
    """Site sparsity per unit of nominal sparsity, by what the site does (paper: Algorithm 1 and its released values).

    readers: linears that read a residual stream (q/k/v, gate/up). writers: those that write to one (o, down).
    others: linears inside a block that do neither. heads: linears whose output feeds no stream, which the paper
    leaves dense: with 0 they are no sites at all.
    """

    readers: float = 0.8
    writers: float = 1.2
    others: float = 1.0
    heads: float = 0.0

    @property
    def by_kind(self) -> dict[str, float]:
        return {"reader": self.readers, "writer": self.writers, "other": self.others, "head": self.heads}


def allocate(
    facts: GraphFacts, sparsity: float, coefficients: Coefficients, rotation: Rotation
) -> dict[str, SiteRecipe]:
    """The sites of one graph.

    A basis is named after the first linear that reads in it, so names agree between the graphs of one model. A head
    has a basis of its own: what it reads is not what a layer reads.

    Raises:
        OptionError: `rotation` is none of the allowed values.
    """
    bases = _bases(facts, rotation)
    sites = {}
    for group in facts.groups:
        for linear in group.linears:
            kind = _kind(linear, group, facts)
            if kind == "head" and not coefficients.heads:
                continue
            coefficient = 0.0 if _is_negligible(linear) else coefficients.by_kind[kind]
            dropped = min(coefficient * sparsity, MAX_SPARSITY)
            sites[linear.path] = SiteRecipe(dropped, coefficient, bases.get(group.name), kind)
    return sites


def _kind(linear: Linear, group: ActivationGroup, facts: GraphFacts) -> str:
    if linear.path not in facts.feeding_streams:
        return "head"
    if facts.reader_of(group) is not None:
        return "reader"
    return "writer" if linear.path in facts.writers else "other"


def _is_negligible(linear: Linear) -> bool:
    """Whether there are too few outputs for skipped inputs to save anything: routers, gates of one number a token.

    What they decide is worth more than the bytes they read.
    """
    return linear.out_features * MIN_OUTPUTS_PER_FEATURE <= linear.in_features


def _bases(facts: GraphFacts, rotation: Rotation) -> dict[str, str]:
    """Group name -> basis name."""
    check_rotation(rotation)
    if rotation == "none":
        return {}
    bases: dict[str, str] = {}
    for stream in facts.streams:
        feeding = [
            [reader for reader in layer if reader.group.name in facts.feeding_streams] for layer in stream.layers()
        ]
        layers = [layer for layer in feeding if layer]
        per_basis = _layers_per_basis(rotation, len(layers))
        for start in range(0, len(layers), per_basis):
            sharing = [reader.group.name for layer in layers[start : start + per_basis] for reader in layer]
            bases |= dict.fromkeys(sharing, _basis_name(sharing[0]))
        heads = {reader.group.name for reader in stream.readers} - bases.keys()
        bases |= {head: _basis_name(head) for head in heads}
    return bases


def _basis_name(path: str) -> str:
    return path.removesuffix(".weight")


def check_rotation(rotation: object) -> None:
    """Checks a `rotation` argument.

    Raises:
        OptionError: it is none of the allowed values.
    """
    if isinstance(rotation, int) and not isinstance(rotation, bool) and rotation >= 1:
        return
    if rotation not in ("layer", "model", "none"):
        raise OptionError(
            f"rotation must be 'layer', 'model', 'none' or a number of layers from 1 up, got {rotation!r}"
        )


def _layers_per_basis(rotation: Rotation, layers: int) -> int:
    if rotation == "layer":
        return 1
    return rotation if isinstance(rotation, int) else layers
