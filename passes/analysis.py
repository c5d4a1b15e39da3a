"""All facts of one graph. Calibration and compilation both start here, so they see the same sites."""

from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from larosa_compile.passes.graph import ParameterGraph, Refusal
from larosa_compile.passes.linears import ActivationGroup, Linear, find_linears, group_by_activation
from larosa_compile.passes.streams import Stream, StreamReader, find_streams


@dataclass(frozen=True)
class GraphFacts:
    """groups: every linear site, by the activation it reads. streams: residual streams. refusals: the rest."""

    graph: ParameterGraph
    groups: list[ActivationGroup]
    streams: list[Stream]
    refusals: list[Refusal]

    @cached_property
    def linears(self) -> list[Linear]:
        return [linear for group in self.groups for linear in group.linears]

    @cached_property
    def readers(self) -> list[StreamReader]:
        """Every reader of every stream. A shared weight may read more than once, in groups of one name."""
        return [reader for stream in self.streams for reader in stream.readers]

    @cached_property
    def _reader_by_group(self) -> dict[int, StreamReader]:
        return {id(reader.group): reader for reader in self.readers}

    def reader_of(self, group: ActivationGroup) -> StreamReader | None:
        """How this very group reads a stream, or None."""
        return self._reader_by_group.get(id(group))

    @cached_property
    def writers(self) -> set[str]:
        """Paths of the last linears before a stream: what they compute enters it, perhaps through a norm or a gain."""
        entries = [entry for stream in self.streams for entry in stream.entries]
        return self._linears_before(entries, beyond_linears=False)

    @cached_property
    def feeding_streams(self) -> set[str]:
        """Paths of linears inside a residual block: what they compute reaches a stream.

        A linear that does not (a language model's head) is not part of the method's decoder layers.
        """
        return self._linears_before([node for stream in self.streams for node in stream.nodes], beyond_linears=True)

    def _linears_before(self, nodes: list[Node], beyond_linears: bool) -> set[str]:
        """Paths of the linears that `nodes` are computed from; the nearest ones, or those behind them too."""
        products = {linear.product for linear in self.linears}
        seen: set[Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                if beyond_linears or node not in products:
                    pending.extend(node.all_input_nodes)
        return {linear.path for linear in self.linears if linear.product in seen}


def analyse(graph: ParameterGraph) -> GraphFacts:
    """Linear sites, activation groups and residual streams of an ATen graph; changes nothing."""
    linears, refusals = find_linears(graph)
    groups = group_by_activation(linears)
    return GraphFacts(graph, groups, find_streams(graph, groups), refusals)
