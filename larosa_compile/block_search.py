"""TEAL's allocation (arXiv 2408.14690, algorithm 1): a block's sparsity goes where the block's output changes least.

On the captured graph: a block is what is computed between two nodes of the longest residual stream, from what the first
reader of a layer sees to what that of the next one sees. Each block is given what the dense model gives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from larosa_compile.capture import Boxed, Captured, boxed, capture, compile_alone
from larosa_compile.kernels import reference
from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.linears import Linear
from larosa_compile.passes.pipeline import facts_of
from larosa_compile.passes.plan import HEAD
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe
from larosa_compile.thresholds import Magnitudes

STEP = 0.05
"""Of a block's bytes: what each step makes sparse more, in whichever linear it costs least."""

MOST = 0.95
"""No linear becomes sparser than that."""

NOMINAL = 0.5
"""The sparsity of a block that is allocated for a recipe at sparsity 0."""


@dataclass(frozen=True)
class Block:
    """nodes: what is computed behind `start`, up to and with `end`. linears: those of it that may be sparse."""

    start: Node
    end: Node
    nodes: tuple[Node, ...]
    linears: tuple[Linear, ...]


def greedy_allocation(model: torch.nn.Module, recipe: Recipe, batch: Tensor, progress: bool = True) -> Recipe:
    """The recipe with coefficients such that each block's linears drop its sparsity where that changes least.

    Takes one pass over token ids [batch, tokens] for each linear of a block and each twentieth of its bytes. Thresholds
    are yet to be measured; sites outside blocks keep their coefficients.
    """
    nominal = recipe.sparsity or NOMINAL
    found: dict[str, float] = {}

    def search_graph(captured: Captured) -> Boxed:
        named = captured.renamed(recipe.locate(captured.shapes))
        facts = facts_of(named.graph, named.fake_mode)
        dense = {path for path, site in recipe.sites.items() if site.coefficient == 0 or site.kind == HEAD}
        blocks = blocks_of(facts, recipe.sites.keys() - dense)
        search = _Search(named.graph.module, blocks, nominal)

        def run(inputs: list[Any]) -> Any:
            with progress_bar(progress) as bar:
                bar_task = bar.add_task("blocks", total=len(blocks))
                return search.searched(inputs, found, lambda: bar.advance(bar_task))

        return boxed(run)

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return capture(graph, inputs, search_graph)

    with torch.no_grad():
        compile_alone(model, backend)(input_ids=batch, use_cache=False)
    sites = {
        path: replace(site, coefficient=found[path] / nominal) if path in found else site
        for path, site in recipe.sites.items()
    }
    return recipe.with_sites(sites, {"allocation": "greedy"}).with_sparsity(recipe.sparsity)


def blocks_of(facts: GraphFacts, sites: set[str]) -> list[Block]:
    """The blocks of the stream that has most layers, in graph order. sites: paths of linears that may be sparse."""
    if not facts.streams:
        return []
    stream = max(facts.streams, key=lambda stream: len(stream.layers()))
    nodes = list(facts.graph.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    starts = [layer[0].source for layer in stream.layers()]
    ends = [*starts[1:], max(stream.nodes, key=place.__getitem__)]
    linears = {linear.product: linear for linear in facts.linears if linear.path in sites}
    blocks = []
    for start, end in zip(starts, ends, strict=True):
        inside = tuple(nodes[place[start] + 1 : place[end] + 1])
        members = tuple(linears[node] for node in inside if node in linears)
        if members:
            blocks.append(Block(start, end, inside, members))
    return blocks


class _Search:
    """Runs a graph once, dense; where a block ends, it has been tried with other sparsities of its linears."""

    def __init__(self, module: GraphModule, blocks: list[Block], nominal: float) -> None:
        self._nominal = nominal
        self._by_start = {block.start: block for block in blocks}
        self._nodes = list(module.graph.nodes)
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._last_use = {
            node: max((self._place[user] for user in node.users), default=index) for node, index in self._place.items()
        }
        self._run = Interpreter(module, garbage_collect_values=False)

    def searched(self, inputs: list[Any], found: dict[str, float], done: Any) -> Any:
        """What the graph returns for its inputs; fills `found`: path -> sparsity of the linear in its block."""
        self._run.args_iter = iter(inputs)
        values: dict[Node, Any] = {}
        result = None
        for index, node in enumerate(self._nodes):
            self._run.env = values
            values[node] = result = self._run.run_node(node)
            if node in self._by_start:
                # what is not read from here on is let go
                for old in [old for old in values if self._last_use[old] <= index and old is not node]:
                    del values[old]
                for path, sparsity in self._allocated(self._by_start[node], values).items():
                    found.setdefault(path, sparsity)
                done()
        return result

    def _allocated(self, block: Block, values: dict[Node, Any]) -> dict[str, float]:
        """Greedy: from 0 on, every step goes to the linear with which the output of the block is nearest to dense."""
        inputs: dict[Node, Magnitudes] = {}
        dense = self._output(block, values, {}, inputs).float()
        bytes_of = {linear.product: linear.weight_bytes for linear in block.linears}
        total = sum(bytes_of.values())
        sparsity = dict.fromkeys(bytes_of, 0.0)
        skipped = 0.0
        while skipped < self._nominal * total:
            step = min(STEP * total, self._nominal * total - skipped)
            raised = {node: sparsity[node] + step / bytes_of[node] for node in bytes_of}
            errors = {}
            for node in (node for node in bytes_of if raised[node] <= MOST):
                tried = sparsity | {node: raised[node]}
                thresholds = {node: inputs[node].quantile(share) for node, share in tried.items()}
                errors[node] = float((self._output(block, values, thresholds).float() - dense).norm())
            if not errors:
                break
            best = min(errors, key=errors.__getitem__)
            sparsity[best] = raised[best]
            skipped += step
        return {linear.path: sparsity[linear.product] for linear in block.linears}

    def _output(
        self,
        block: Block,
        values: dict[Node, Any],
        thresholds: dict[Node, float],
        inputs: dict[Node, Magnitudes] | None = None,
    ) -> Tensor:
        """What the block makes of its input; `inputs` gets the magnitudes that each linear meets."""
        local = dict(values)
        self._run.env = local
        activations = {linear.product: linear.activation for linear in block.linears}
        for node in block.nodes:
            activation = activations.get(node)
            whole = local[activation] if activation is not None else None
            if activation is not None and whole is not None:
                if inputs is not None:
                    inputs[node] = Magnitudes()
                    inputs[node].add(whole.float().abs())
                local[activation] = reference.keep_above(whole, thresholds.get(node, 0.0), False)
            local[node] = self._run.run_node(node)
            if activation is not None:
                local[activation] = whole
        output: Tensor = local[block.end]
        return output
