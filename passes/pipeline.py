"""The order of the passes, in one place: analysis → plan → rotate → fold → sparsify."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from larosa_compile.passes.analysis import analyse
from larosa_compile.passes.fold import FoldedSite, fold_sites
from larosa_compile.passes.graph import ParameterGraph
from larosa_compile.passes.plan import Plan, SiteChoice, make_plan
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor
from larosa_compile.passes.rotate import OnlineRotation, insert_rotations
from larosa_compile.passes.sparsify import sparsify_sites
from larosa_compile.passes.verify import verify

Observer = Callable[[str, Graph], None]
"""Called with a stage's name and the graph as that stage left it."""


@dataclass(frozen=True)
class Rewritten:
    """The rewritten graph in place of the old one: folded maps its added placeholders to what they hold."""

    plan: Plan
    sites: tuple[FoldedSite, ...]
    folded: dict[Node, FoldedTensor]
    online: tuple[OnlineRotation, ...]


def rewrite(
    graph: ParameterGraph,
    choices: Mapping[str, SiteChoice],
    fake_mode: FakeTensorMode,
    observe: Observer = lambda stage, graph: None,
) -> Rewritten:
    """Runs every pass on `graph` in place. `choices`: parameter path -> what the recipe says of that site."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    observe("input", graph.graph)
    plan = make_plan(analyse(graph), choices)
    editor = GraphEditor(graph, fake_mode)

    def finish(stage: str) -> None:
        verify(editor, plan, stage, inputs)
        observe(stage, graph.graph)

    rotations = insert_rotations(editor, plan)
    finish("rotate")
    sites, online = fold_sites(editor, plan, rotations)
    finish("fold")
    sparsify_sites(editor, sites, online)
    finish("sparsify")

    # new strides (q, k and v are now columns of one product) reach every user's fake value
    graph.module.recompile()
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    FakeTensorProp(graph.module, fake_mode).propagate_dont_convert_inputs(*(node.meta["val"] for node in placeholders))
    return Rewritten(plan, tuple(sites), editor.folded, tuple(online))
