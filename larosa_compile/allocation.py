"""Which sites a recipe has, how much each drops, and which of them share a basis. From structure alone."""

from dataclasses import dataclass
from typing import Literal

from larosa_compile.errors import OptionError
from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.recipe import MAX_SPARSITY, SiteRecipe

Rotation = Literal["layer", "model", "none"] | int
"""How many layers share a basis: one each, all, that many; "none" leaves every activation in its own basis."""


@dataclass(frozen=True)
class Coefficients:
    """Site sparsity per unit of nominal sparsity, by what the site does (paper: Algorithm 1 and its released values).

    readers: linears that read a residual stream (q/k/v, gate/up). writers: those that write to one (o, down).
    others: linears inside a block that do neither.
    """

    readers: float = 0.8
    writers: float = 1.2
    others: float = 1.0

    @property
    def by_kind(self) -> dict[str, float]:
        return {"reader": self.readers, "writer": self.writers, "other": self.others}


def allocate(
    facts: GraphFacts, sparsity: float, coefficients: Coefficients, rotation: Rotation
) -> dict[str, SiteRecipe]:
    """The sites of one graph. Linears that do not feed a residual stream (heads) are left out: they stay dense.

    A basis is named after the first linear that reads in it, so names agree between the graphs of one model.

    Raises:
        OptionError: `rotation` is none of the allowed values.
    """
    bases = _bases(facts, rotation)
    sites = {}
    for group in facts.groups:
        for linear in group.linears:
            if linear.path not in facts.feeding_streams:
                continue
            kind = "writer" if linear.path in facts.writers else "other"
            if facts.reader_of(group) is not None:
                kind = "reader"
            coefficient = coefficients.by_kind[kind]
            dropped = min(coefficient * sparsity, MAX_SPARSITY)
            sites[linear.path] = SiteRecipe(dropped, coefficient, bases.get(group.name), kind)
    return sites


def _bases(facts: GraphFacts, rotation: Rotation) -> dict[str, str]:
    """Group name -> basis name."""
    check_rotation(rotation)
    if rotation == "none":
        return {}
    bases: dict[str, str] = {}
    for stream in facts.streams:
        layers = stream.layers()
        per_basis = _layers_per_basis(rotation, len(layers))
        for start in range(0, len(layers), per_basis):
            sharing = [reader.group.name for layer in layers[start : start + per_basis] for reader in layer]
            bases |= dict.fromkeys(sharing, sharing[0].removesuffix(".weight"))
    return {name: basis for name, basis in bases.items() if name in facts.feeding_streams}


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
