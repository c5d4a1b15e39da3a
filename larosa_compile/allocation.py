"""Which sites a recipe has, how much each drops, and which of them share a basis. From structure alone."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from larosa_compile.arguments import is_number
from larosa_compile.errors import OptionError
from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.gates import find_gate
from larosa_compile.passes.linears import ActivationGroup, Linear
from larosa_compile.passes.plan import HEAD
from larosa_compile.passes.selection import GATE, TOP_K
from larosa_compile.site import MAX_SPARSITY, UNMEASURED, SiteRecipe

Rotation = Literal["auto", "layer", "model", "none"] | int
"""How many layers share a basis: one each, all, that many; "auto" as few as `MAX_ADAPTER_SHARE` allows; "none" leaves
every activation in its own basis."""

CANDIDATES: tuple[Rotation, ...] = ("auto", "layer", 4, "model")
"""What a search compares where "auto" decides. The first, which is "auto" without a search, says how many bytes all
of them read."""

MAX_ADAPTER_SHARE = 0.02
"""What residual adapters may add to the weight bytes that a decode step reads inside blocks, where "auto" decides.

Each basis more fits its layers better, and costs an adapter of features² weights, which is read whole: dropping less
elsewhere was the better use of these bytes in what was measured (docs/accuracy.md).
"""

MIN_OUTPUTS_PER_FEATURE = 16
"""A linear with fewer outputs than a sixteenth of its inputs keeps all of them."""

MIN_OUTPUTS_PER_ROTATED_FEATURE = 4
"""A head with fewer outputs than this drops inputs in their own basis: rotating them would read what dropping saves."""


@dataclass(frozen=True)
class Coefficients:
    """Site sparsity per unit of nominal sparsity, by what the site does (paper: Algorithm 1 and its released values).

    readers: linears that read a residual stream (q/k/v, gate/up). writers: those that write to one (o, down).
    others: linears inside a block that do neither. heads: linears whose output feeds no stream; the paper leaves
    them dense, which 0 does: they are no sites then.

    Raises:
        OptionError: one is negative, or no finite number.
    """

    readers: float = 0.8
    writers: float = 1.2
    others: float = 1.0
    heads: float = 0.8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_number(value) or value < 0:
                raise OptionError(f"coefficient {field.name!r} must be at least 0, got {value!r}; give such as 0.8")

    @property
    def by_kind(self) -> dict[str, float]:
        return {"reader": self.readers, "writer": self.writers, "other": self.others, HEAD: self.heads}


def allocate(
    facts: GraphFacts, sparsity: float, coefficients: Coefficients, rotation: Rotation, selection: str = TOP_K
) -> dict[str, SiteRecipe]:
    """The sites of one graph; where a gate selects, linears that read a gated product. No threshold is measured yet.

    A basis is named after the first linear that reads in it, so names agree between the graphs of one model. A head
    has a basis of its own, in which what it reads is rotated at run time: that reads little next to a vocabulary.

    Raises:
        OptionError: `rotation` is none of the allowed values.
    """
    sites, kept_bytes = {}, 0.0
    products = {linear.product: linear for linear in facts.linears}
    quantiles = None if selection == TOP_K else UNMEASURED
    for group in facts.groups:
        if selection == GATE and find_gate(group, products) is None:
            continue
        for linear in group.linears:
            kind = _kind(linear, group, facts)
            if kind == HEAD and not (coefficients.heads and facts.streams):
                continue
            coefficient = 0.0 if _is_negligible(linear) else coefficients.by_kind[kind]
            dropped = min(coefficient * sparsity, MAX_SPARSITY)
            sites[linear.path] = SiteRecipe(dropped, coefficient, None, kind, selection, quantiles)
            kept_bytes += 0.0 if kind == HEAD else (1 - dropped) * linear.weight_bytes
    bases = _bases(facts, rotation, kept_bytes)
    for group in facts.groups:
        for linear in group.linears:
            if group.name in bases and linear.path in sites:
                sites[linear.path] = replace(sites[linear.path], basis=bases[group.name])
    return sites


def _kind(linear: Linear, group: ActivationGroup, facts: GraphFacts) -> str:
    if _is_head(group, facts):
        return HEAD
    if facts.reader_of(group) is not None:
        return "reader"
    return "writer" if linear.path in facts.writers else "other"


def _is_head(group: ActivationGroup, facts: GraphFacts) -> bool:
    return not any(linear.path in facts.feeding_streams for linear in group.linears)


def _is_negligible(linear: Linear) -> bool:
    """Whether there are too few outputs for skipped inputs to save anything: routers, gates of one number a token.

    What they decide is worth more than the bytes they read.
    """
    return linear.out_features * MIN_OUTPUTS_PER_FEATURE <= linear.in_features


def _bases(facts: GraphFacts, rotation: Rotation, kept_bytes: float) -> dict[str, str]:
    """Group name -> basis name. kept_bytes: what a decode step reads of the weights inside blocks."""
    check_rotation(rotation)
    if rotation == "none":
        return {}
    bases: dict[str, str] = {}
    for stream in facts.streams:
        feeding = [[reader for reader in layer if not _is_head(reader.group, facts)] for layer in stream.layers()]
        layers = [layer for layer in feeding if layer]
        per_basis = max(1, len(layers))
        if isinstance(rotation, int):
            per_basis = rotation
        elif rotation == "layer":
            per_basis = 1
        elif rotation == "auto" and layers:
            adapter = stream.features**2 * facts.linears[0].itemsize
            per_basis = min(len(layers), fewest_sharing(adapter, kept_bytes / len(layers)))
        for start in range(0, len(layers), per_basis):
            sharing = [reader.group.name for layer in layers[start : start + per_basis] for reader in layer]
            bases |= dict.fromkeys(sharing, _basis_name(sharing[0]))
    heads = [group.name for group in facts.groups if _is_head(group, facts) and _is_worth_a_rotation(group)]
    return bases | {head: _basis_name(head) for head in heads}


def fewest_sharing(adapter_bytes: float, layer_bytes: float) -> int:
    """Layers that share a basis under "auto": bytes of an adapter, and of what a decode step reads in a layer."""
    return max(1, math.ceil(adapter_bytes / (MAX_ADAPTER_SHARE * layer_bytes)))


def _is_worth_a_rotation(group: ActivationGroup) -> bool:
    outputs = sum(linear.out_features for linear in group.linears)
    return not group.stacked and outputs >= MIN_OUTPUTS_PER_ROTATED_FEATURE * group.features


def _basis_name(path: str) -> str:
    return path.removesuffix(".weight")


def check_rotation(rotation: object) -> None:
    """Checks a `rotation` argument.

    Raises:
        OptionError: it is none of the allowed values.
    """
    if isinstance(rotation, int) and not isinstance(rotation, bool) and rotation >= 1:
        return
    if rotation not in ("auto", "layer", "model", "none"):
        raise OptionError(
            f"rotation must be 'auto', 'layer', 'model', 'none' or a number of layers from 1 up, got {rotation!r}; "
            "give one of these"
        )
