"""Runs the passes one by one and evaluates the graph on real tensors after each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node

from larosa_compile.capture import Captured
from larosa_compile.passes.analysis import analyse
from larosa_compile.passes.fold import fold_sites
from larosa_compile.passes.plan import Plan, make_plan
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor
from larosa_compile.passes.rotate import OnlineRotation, insert_rotations
from larosa_compile.passes.sparsify import sparsify_sites
from larosa_compile.passes.verify import verify
from tests.support.decoder import FEATURES, Choice, error, rounding, simulate
from tests.support.graphs import capture_graph


def rotations_of(choices: Mapping[str, Choice]) -> dict[str, Tensor]:
    names = dict.fromkeys(choice.basis for choice in choices.values() if choice.basis)
    return {name: torch.linalg.qr(torch.randn(FEATURES, FEATURES, dtype=torch.float64)).Q for name in names}


class Stages:
    """Runs the passes one by one and evaluates the graph on real tensors after each."""

    def __init__(self, module: nn.Module, choices: Mapping[str, Choice], *inputs: Tensor, dynamic: bool = False):
        self.captured: Captured = capture_graph(module, *inputs, dynamic=dynamic or None)
        self.rotations = rotations_of(choices)
        graph = self.captured.graph
        self.editor = GraphEditor(graph, self.captured.fake_mode)
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.plan: Plan = make_plan(analyse(graph), choices)
        self.online: list[OnlineRotation] = []

    def run(self, *inputs: Tensor) -> dict[str, list[Tensor]]:
        """Outputs by stage."""
        results = {"input": self.evaluate(inputs)}
        rotated = insert_rotations(self.editor, self.plan)
        results["rotate"] = self._finish("rotate", inputs)
        sites, self.online = fold_sites(self.editor, self.plan, rotated)
        results["fold"] = self._finish("fold", inputs)
        sparsify_sites(self.editor, sites, self.online)
        results["sparsify"] = self._finish("sparsify", inputs)
        return results

    def _finish(self, stage: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        verify(self.editor, self.plan, stage, self.inputs)
        return self.evaluate(inputs)

    def evaluate(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        captured = self.captured
        return evaluate(captured, captured.graph.graph, self.editor.folded, self.rotations, inputs)


def evaluate(
    captured: Captured,
    graph: Graph,
    folded: Mapping[Node, FoldedTensor],
    rotations: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
) -> list[Tensor]:
    """What `graph` computes; symbolic sizes are read off the tensors that have them."""
    parameters = {captured.graph.paths[node]: tensor for node, tensor in captured.tensors.items()}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    free = [node for node in placeholders if node not in captured.tensors and node not in folded]
    tensors = [node for node in free if isinstance(node.meta["val"], Tensor)]
    given = dict(zip(tensors, inputs, strict=True))
    sizes = {
        str(symbol): size
        for node, tensor in given.items()
        for symbol, size in zip(node.meta["val"].shape, tensor.shape, strict=True)
    }

    def real(node: Node) -> Any:
        if node in captured.tensors:
            return captured.tensors[node].detach()
        if node in folded:
            return checked_build(folded[node], parameters, rotations)
        return given[node] if node in given else sizes[str(node.meta["val"])]

    return list(Interpreter(captured.graph.module, graph=graph).run(*map(real, placeholders)))


def checked_build(tensor: FoldedTensor, parameters: Mapping[str, Tensor], rotations: Mapping[str, Tensor]) -> Tensor:
    """A folded tensor is what it says it is, and reads no parameter it does not name."""
    built = tensor.build({path: parameters[path] for path in tensor.paths}, rotations)
    assert (tuple(built.shape), built.dtype, built.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert built.is_contiguous()
    assert built.nbytes == tensor.bytes
    return built


def check_stages(module: nn.Module, choices: Mapping[str, Choice], ids: Tensor, later: Tensor | None = None) -> Stages:
    """Exact up to Top-K, then what the simulation says. `later`: other sizes than the captured ones."""
    stages = Stages(module, choices, ids, dynamic=later is not None)
    inputs = ids if later is None else later
    results = stages.run(inputs)
    bound, dense = rounding(module, inputs), simulate(module, {}, {}, inputs)
    sparse = simulate(module, choices, stages.rotations, inputs)
    errors = {stage: error(found, sparse if stage == "sparsify" else dense) for stage, found in results.items()}
    assert max(errors.values()) <= bound, (errors, bound)
    return stages
