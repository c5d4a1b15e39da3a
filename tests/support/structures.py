"""What every structure test asserts: exact through all passes, rotated where the structure allows it."""

import itertools
from typing import Any

from torch import nn

from tests.support.blocks import Model, random_ids
from tests.support.stages import Stages, check_graph

Change = tuple[str | None, str | None]


def online(stages: Stages) -> list[Change]:
    """(from, to) of every rotation that stays in the graph."""
    return sorted(((r.change.start, r.change.end) for r in stages.online), key=str)


def adapters(layers: int = 1, stream: int = 0) -> list[Change]:
    """What a rotated stream costs: one rotation in, one at every boundary of layers, one out."""
    names = [None, *(f"s{stream}l{layer}" for layer in range(layers)), None]
    return sorted(itertools.pairwise(names), key=str)


def sites(stages: Stages) -> dict[str, bool]:
    """Path of every site -> whether it reads in a basis other than the model's."""
    return {linear.path: site.basis is not None for site in stages.plan.sites for linear in site.linears}


def rotated(stages: Stages) -> set[str]:
    """Names of the modules, or the parameters, of the sites that read in a basis."""
    return {path.removesuffix(".weight").rpartition(".")[2] for path, basis in sites(stages).items() if basis}


def check_decoder(
    model: Model, *inputs: Any, heads: tuple[str, ...] = ("head",), enters: bool = True, **more: Any
) -> Stages:
    """The stream is rotated throughout: every linear but heads is a site, every one that reads it does so in its
    layer's basis, every one that writes to it does so in the next, and nothing but the adapters stays online.

    enters: whether what starts the stream is rotated online.
    """
    stages = check_graph(model, *(inputs or (random_ids(),)), **more)
    (stream,) = stages.facts.streams
    expected = [change for change in adapters(len(model.layers)) if enters or change[0] is not None]
    assert online(stages) == expected, online(stages)
    excluded = {f"{head}.weight" for head in heads}
    readers = {linear.path for reader in stream.readers for linear in reader.group.linears}
    assert {path for path, basis in sites(stages).items() if basis} == readers - excluded
    assert {refusal.site for refusal in stages.plan.refusals} <= excluded
    linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    assert sites(stages).keys() >= linears - excluded
    return stages
