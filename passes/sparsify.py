"""Rewrite 3: exact Top-K at every site. The only rewrite that changes what the model computes.

A site's product becomes `larosa::sparse_linear`, which keeps the k inputs of largest magnitude of every row.
The rotations that stayed online take the same op with nothing dropped, hence the same kernel.
"""

from larosa_compile.kernels import ops
from larosa_compile.passes.fold import FoldedSite
from larosa_compile.passes.rewriting import GraphEditor
from larosa_compile.passes.rotate import OnlineRotation


def sparsify_sites(editor: GraphEditor, sites: list[FoldedSite], online: list[OnlineRotation]) -> None:
    """Replaces the folded products of sites, and the online rotations, by sparse linears."""
    kept = {folded.product: folded.site.kept for folded in sites}
    kept |= {rotation.product: editor.folded[rotation.matrix].shape[0] for rotation in online}
    for node, k in kept.items():
        with editor.graph.inserting_before(node):
            sparse = editor.call(f"sparse_{node.name}", ops.sparse_linear, *node.args, k)
        node.replace_all_uses_with(sparse)
        editor.graph.erase_node(node)
