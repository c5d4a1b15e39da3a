"""Bytes of a compiled graph added up by kind of site and by layer: what charts and drawings are made of.

A path's first number is taken for its layer, and what follows for the kind of site. That is a way of presenting
things and nothing else: neither the plan nor a rewrite knows of it.
"""

from dataclasses import dataclass

from larosa_compile.report import GraphReport, SiteReport

OUTSIDE = ""
"""The layer of what has no number in its path."""

ROTATIONS = "rotations at run time"
DENSE = "linears that stay dense"


@dataclass(frozen=True)
class Tally:
    """Weight bytes that one decode step reads. rotations: of `sparse`, what changes of basis read."""

    name: str
    dense: int = 0
    sparse: int = 0
    rotations: int = 0


def layer_of(path: str) -> str:
    """`model.layers.3.mlp.down.weight` -> `model.layers.3`; OUTSIDE where there is no number."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return OUTSIDE if number is None else ".".join(parts[: number + 1])


def local_name(paths: tuple[str, ...]) -> str:
    """`model.layers.3.mlp.gate.weight`, `….up.weight` -> `mlp.gate + up`."""
    first, *others = (path.removesuffix(".weight") for path in paths)
    layer = layer_of(first)
    name = first.removeprefix(f"{layer}.") if layer else first
    return " + ".join([name, *(other.rpartition(".")[2] for other in others)])


def by_kind(report: GraphReport) -> list[Tally]:
    """Sites of one kind over all layers, in the order of the graph; then rotations and dense linears, if any."""
    tallies: dict[str, Tally] = {}
    for site in report.sites:
        name = local_name(site.paths)
        tallies[name] = _with(tallies.get(name, Tally(name)), site)
    online = sum(item.bytes for item in report.online)
    rest = [Tally(ROTATIONS, 0, online, online), Tally(DENSE, report.other_bytes, report.other_bytes)]
    return [*tallies.values(), *(tally for tally in rest if tally.sparse)]


def by_layer(report: GraphReport) -> list[Tally]:
    """Every layer with its sites and the rotations that lead to its bases; what is in no layer comes last.

    A rotation back to the model's own basis leads to no layer.
    """
    tallies = {layer_of(site.paths[0]): Tally(layer_of(site.paths[0])) for site in report.sites} | {OUTSIDE: Tally("")}
    for site in report.sites:
        layer = layer_of(site.paths[0])
        tallies[layer] = _with(tallies[layer], site)
    for item in report.online:
        layer = layer_of(item.end or "")
        layer = layer if layer in tallies else OUTSIDE
        old = tallies[layer]
        tallies[layer] = Tally(old.name, old.dense, old.sparse + item.bytes, old.rotations + item.bytes)
    old = tallies.pop(OUTSIDE)
    outside = Tally(old.name, old.dense + report.other_bytes, old.sparse + report.other_bytes, old.rotations)
    return [*tallies.values(), *([outside] if outside.sparse else [])]


def _with(tally: Tally, site: SiteReport) -> Tally:
    return Tally(tally.name, tally.dense + site.dense_bytes, tally.sparse + site.sparse_bytes, tally.rotations)
