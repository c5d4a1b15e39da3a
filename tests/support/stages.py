"""Runs the passes one by one, evaluates the graph on real tensors after each, and says what it should have given."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from larosa_compile.capture import Boxed, Captured, boxed, capture
from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.bases import BasisChange, Place
from larosa_compile.passes.fold import fold_sites
from larosa_compile.passes.pipeline import facts_of
from larosa_compile.passes.plan import Plan, make_plan
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor
from larosa_compile.passes.rotate import OnlineRotation, insert_rotations
from larosa_compile.passes.sparsify import sparsify_sites
from larosa_compile.passes.verify import verify
from tests.support.decoder import Choice, error, rounding, simulate
from tests.support.exact import Evaluation, in_float64, sparse_operands
from tests.support.graphs import capture_graph

Choices = Mapping[str, Choice]


def orthogonal(features: int) -> Tensor:
    return torch.linalg.qr(torch.randn(features, features, dtype=torch.float64)).Q


def rotations_of(facts: GraphFacts, choices: Choices) -> dict[str, Tensor]:
    """A random basis for every name that the choices for these linears use."""
    features = {linear.path: linear.in_features for linear in facts.linears}
    named = {choice.basis: features[path] for path, choice in choices.items() if choice.basis and path in features}
    return {name: orthogonal(width) for name, width in named.items() if name is not None}


class Stages:
    """One captured call of a module, rewritten stage by stage. `choices` may depend on what the analyses found."""

    def __init__(
        self,
        module: nn.Module | None,
        choices: Choices | Callable[[GraphFacts], Choices],
        *inputs: Tensor,
        dynamic: bool = False,
        captured: Captured | None = None,
    ):
        if captured is None:
            assert module is not None
            captured = capture_graph(module, *inputs, dynamic=dynamic or None)
        self.captured: Captured = captured
        graph = self.captured.graph
        self.editor = GraphEditor(graph, self.captured.fake_mode)
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        facts = facts_of(graph, self.captured.fake_mode)
        self.choices: Choices = choices(facts) if callable(choices) else choices
        self.rotations = rotations_of(facts, self.choices)
        self.plan: Plan = make_plan(facts, self.choices)
        self.online: list[OnlineRotation] = []

    @property
    def facts(self) -> GraphFacts:
        return self.plan.facts

    def run(self, *inputs: Tensor) -> dict[str, list[Any]]:
        """Outputs by stage."""
        results = {"input": self.evaluate(inputs)}
        rotated = insert_rotations(self.editor, self.plan)
        results["rotate"] = self._finish("rotate", inputs)
        sites, self.online = fold_sites(self.editor, self.plan, rotated)
        results["fold"] = self._finish("fold", inputs)
        sparsify_sites(self.editor, sites, self.online)
        results["sparsify"] = self._finish("sparsify", inputs)
        return results

    def _finish(self, stage: str, inputs: tuple[Tensor, ...]) -> list[Any]:
        verify(self.editor, self.plan, stage, self.inputs)
        return self.evaluate(inputs)

    def evaluate(self, inputs: tuple[Tensor, ...] = ()) -> list[Any]:
        """What the graph computes by now; of no inputs, what it was captured with."""
        captured = self.captured
        return evaluate(captured, captured.graph.graph, self.editor.folded, self.rotations, inputs)


def evaluate(
    captured: Captured,
    graph: Graph,
    folded: Mapping[Node, FoldedTensor],
    rotations: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...] = (),
) -> list[Any]:
    """What `graph` gives for `inputs`, or for what it was captured with: outputs, then what it writes to inputs."""
    parameters = {captured.graph.paths[node]: tensor for node, tensor in captured.tensors.items()}
    built = [checked_build(tensor, parameters, rotations) for tensor in folded.values()]
    given = [value.clone() if isinstance(value, Tensor) else value for value in placeholder_values(captured, inputs)]
    return Evaluation(captured.graph.module, graph).results([*given, *built])


def placeholder_values(captured: Captured, inputs: tuple[Tensor, ...]) -> list[Any]:
    """A value for every placeholder of the captured graph; symbolic sizes are read off the inputs that have them."""
    if not inputs:
        return [value.detach() if isinstance(value, Tensor) else value for value in captured.inputs]
    placeholders = [node for node in captured.graph.graph.nodes if node.op == "placeholder"][: len(captured.inputs)]
    remaining = list(inputs)
    given = {
        node: remaining.pop(0)
        for node in placeholders
        if isinstance(node.meta["val"], Tensor) and node not in captured.tensors
    }
    sizes = {
        str(symbol): size
        for node, tensor in given.items()
        for symbol, size in zip(node.meta["val"].shape, tensor.shape, strict=True)
    }

    def real(node: Node) -> Any:
        if node in captured.tensors:
            return captured.tensors[node].detach()
        return given[node] if node in given else sizes[str(node.meta["val"])]

    return list(map(real, placeholders))


def checked_build(tensor: FoldedTensor, parameters: Mapping[str, Tensor], rotations: Mapping[str, Tensor]) -> Tensor:
    """A folded tensor is what it says it is, and reads no parameter it does not name."""
    built = tensor.build({path: parameters[path] for path in tensor.paths}, rotations)
    assert (tuple(built.shape), built.dtype, built.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert built.is_contiguous()
    assert built.nbytes == tensor.bytes
    return built


def changes(stages: Stages) -> set[tuple[str | None, str | None]]:
    """(from, to) of the rotations that stayed online."""
    found = [(rotation.change.start, rotation.change.end) for rotation in stages.online]
    assert len(set(found)) == len(found), f"one change of basis is made twice: {found}"
    return set(found)


def check_stages(module: nn.Module, choices: Choices, ids: Tensor, later: Tensor | None = None) -> Stages:
    """Exact up to Top-K, then what hooks on the module say. `later`: other sizes than the captured ones."""
    stages = Stages(module, choices, ids, dynamic=later is not None)
    inputs = ids if later is None else later
    results = stages.run(inputs)
    bound, dense = rounding(module, inputs), simulate(module, {}, {}, inputs)
    sparse = simulate(module, choices, stages.rotations, inputs)
    errors = {stage: error(found, sparse if stage == "sparsify" else dense) for stage, found in results.items()}
    assert max(errors.values()) <= bound, (errors, bound)
    return stages


def by_layer(sparsity: float = 0.5) -> Callable[[GraphFacts], Choices]:
    """What calibration would choose: a basis for the readers of each layer, everything that feeds a stream sparse."""

    def choose(facts: GraphFacts) -> Choices:
        choices = {path: Choice(sparsity) for path in facts.feeding_streams}
        for number, stream in enumerate(facts.streams):
            for depth, layer in enumerate(stream.layers()):
                for reader in layer:
                    for path in {linear.path for linear in reader.group.linears} & choices.keys():
                        choices[path] = Choice(sparsity, f"s{number}l{depth}")
        return choices

    return choose


def check_graph(module: nn.Module, *inputs: Any, sparsity: float = 0.5, dynamic: bool = False, **named: Any) -> Stages:
    """`check_captured` of the one graph that a call of the module traces to."""
    return check_captured(capture_graph(module, *inputs, dynamic=dynamic or None, **named), sparsity)


def capture_graphs(module: nn.Module, *inputs: Any, **named: Any) -> list[Captured]:
    """All graphs that a call traces to, where it is broken into several; those without parameters left out."""
    found: list[Captured] = []

    def keep(captured: Captured) -> Boxed:
        found.append(captured.copy())
        return boxed(lambda values: captured.graph.module(*values))

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=lambda graph, given: capture(graph, given, keep))(*inputs, **named)
    return [captured for captured in found if captured.tensors]


def check_captured(captured: Captured, sparsity: float = 0.5) -> Stages:
    """Every site is chosen, every reader rotated, by layer. Exact up to Top-K, then what the captured graph gives in
    float64 with the method applied to the operands of its own products.

    This holds for the cheaper of the two ways to serve the readers of a stream, whose stages are returned, and for
    streams that are rotated whatever it costs.
    """
    values = placeholder_values(captured, ())
    dense, own = in_float64(captured, captured.graph.graph, values), evaluate(captured, captured.graph.graph, {}, {})
    dtype = next(iter(captured.tensors.values())).dtype
    bound = 4 * (error(own, dense) + torch.finfo(dtype).eps)
    with rotated_streams():
        rotated = Stages(None, by_layer(sparsity), captured=captured.copy())
    cheaper = Stages(None, by_layer(sparsity), captured=captured)
    assert online_bytes(cheaper.plan) <= online_bytes(rotated.plan)
    for stages in (rotated, cheaper):
        # before `run`, which rewrites the graph
        sparse = in_float64(stages.captured, stages.captured.graph.graph, values, sparse_operands(stages))
        results = stages.run()
        errors = {stage: error(found, sparse if stage == "sparsify" else dense) for stage, found in results.items()}
        assert max(errors.values()) <= bound, (errors, bound)
        planned = [change for change in stages.plan.changes if change.place is Place.ONLINE]
        assert [rotation.change for rotation in stages.online] == planned
    return cheaper


def online_bytes(plan: Plan) -> int:
    return sum(change.bytes for change in plan.changes)


@contextlib.contextmanager
def rotated_streams() -> Iterator[None]:
    """Within the context, plans keep streams in the bases of their readers whatever it costs."""
    with mock.patch.object(BasisChange, "bytes", 0):
        yield
