"""The order of the passes, in one place: canonicalise → analysis → plan → rotate → fold → sparsify → decode, and pack,
which comes after the self-check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from larosa_compile.passes.analysis import GraphFacts, analyse
from larosa_compile.passes.canonical import canonicalise
from larosa_compile.passes.decode import specialise_one_row
from larosa_compile.passes.fold import FoldedSite, fold_sites
from larosa_compile.passes.graph import ParameterGraph, aten
from larosa_compile.passes.pack import pack_sites
from larosa_compile.passes.plan import Plan, SiteChoice, make_plan
from larosa_compile.passes.quantised import store_values
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


def facts_of(graph: ParameterGraph, fake_mode: FakeTensorMode) -> GraphFacts:
    """Brings `graph` into canonical form, in place, and analyses it: what calibration and plans start from."""
    return analyse(canonicalise(GraphEditor(graph, fake_mode)))


def rewrite(
    graph: ParameterGraph,
    choices: Mapping[str, SiteChoice],
    fake_mode: FakeTensorMode,
    observe: Observer = lambda stage, graph: None,
    share_tables: bool = True,
    dense_prompts: bool = False,
) -> Rewritten:
    """Runs every pass but the last on `graph` in place.

    choices: parameter path -> what the recipe says of that site. share_tables, dense_prompts: see `make_plan`.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    observe("input", graph.graph)
    facts = facts_of(graph, fake_mode)
    observe("analyse", graph.graph)
    plan = make_plan(facts, choices, share_tables, dense_prompts)
    observe("plan", graph.graph)
    editor = GraphEditor(graph, fake_mode)

    def finish(stage: str) -> None:
        verify(editor, plan, stage, inputs)
        observe(stage, graph.graph)

    rotations = insert_rotations(editor, plan)
    finish("rotate")
    sites, online = fold_sites(editor, plan, rotations)
    finish("fold")
    sparse_sites = sparsify_sites(editor, sites, online)
    finish("sparsify")
    specialise_one_row(editor)
    finish("decode")
    store_values(editor)

    _propagate(graph, fake_mode)
    return Rewritten(plan, sparse_sites, editor.folded, tuple(online))


def pack(
    graph: ParameterGraph,
    rewritten: Rewritten,
    weights: str,
    fake_mode: FakeTensorMode,
    observe: Observer = lambda stage, graph: None,
) -> Rewritten:
    """Runs the last pass on a rewritten graph, in place: its sites' weights in fewer bits.

    weights: a name in `kernels.formats.FORMATS`.
    """
    editor = GraphEditor(graph, fake_mode, rewritten.folded)
    sites = pack_sites(editor, rewritten.sites, weights)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder" and node not in editor.folded]
    verify(editor, rewritten.plan, "pack", inputs)
    observe("pack", graph.graph)
    _propagate(graph, fake_mode)
    return replace(rewritten, sites=sites, folded=editor.folded)


def _propagate(graph: ParameterGraph, fake_mode: FakeTensorMode) -> None:
    graph.module.recompile()
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    _Propagation(graph.module, fake_mode).propagate_dont_convert_inputs(*(node.meta["val"] for node in placeholders))


class _Propagation(FakeTensorProp):
    """Brings new strides (q, k and v are now columns of one product) to every user's fake value.

    A view that these strides do not allow becomes a reshape.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_function(target, args, kwargs)
        except (RuntimeError, ValueError):
            if target is not aten.view.default:
                raise
            self._node.target = aten.reshape.default
            return super().call_function(aten.reshape.default, args, kwargs)

    def run_node(self, n: Node) -> Any:
        self._node = n
        return super().run_node(n)
