"""Rules every rewritten graph must keep, checked between passes. A violation is this package's defect."""

from torch.fx import Node

from larosa_compile.passes.graph import GraphInvariantError, aten, is_call
from larosa_compile.passes.plan import Plan
from larosa_compile.passes.rewriting import GraphEditor


def verify(editor: GraphEditor, plan: Plan, stage: str, inputs: list[Node]) -> None:
    """Raises GraphInvariantError when the graph is malformed, lost an input, or kept a site's old product.

    inputs: the placeholders the graph had before any rewrite; they must still come first, in order.
    """
    editor.graph.lint()
    placeholders = [node for node in editor.graph.nodes if node.op == "placeholder"]
    if placeholders[: len(inputs)] != inputs:
        raise GraphInvariantError(stage, None, "the original inputs must stay first and in order")
    for node in placeholders[len(inputs) :]:
        if node not in editor.folded:
            raise GraphInvariantError(stage, node, "an added input has no folded tensor")
    for node in editor.graph.nodes:
        if node in editor.created and "val" not in node.meta:
            raise GraphInvariantError(stage, node, "a new node carries no fake value")
        if is_call(node, aten.mm.default) and node.args[1] in editor.folded and stage == "sparsify":
            raise GraphInvariantError(stage, node, "a folded weight is still read by a dense product")
    if stage in ("fold", "sparsify"):
        old = {linear.product for site in plan.sites if not site.group.stacked for linear in site.linears}
        left = next((node for node in editor.graph.nodes if node in old), None)
        if left is not None:
            raise GraphInvariantError(stage, left, "a planned site was not replaced")
