"""Rewrite 3: exact Top-K at every site. The only rewrite that changes what the model computes.

A site's product becomes `larosa::sparse_linear`, which keeps the k inputs of largest magnitude of every row. A product
with a stack of weights keeps its own op and reads what `larosa::sparsify` left of its activation. The rotations that
stayed online take the op of the sites with nothing dropped, hence the same kernel.
"""

from dataclasses import replace

from torch.fx import Node

from larosa_compile.kernels import ops
from larosa_compile.passes.fold import FoldedSite
from larosa_compile.passes.rewriting import GraphEditor
from larosa_compile.passes.rotate import OnlineRotation


def sparsify_sites(
    editor: GraphEditor, sites: list[FoldedSite], online: list[OnlineRotation]
) -> tuple[FoldedSite, ...]:
    """Makes the folded products of sites sparse, and the online rotations products of the same op.

    Returns the sites with their products as they are now.
    """
    for rotation in online:
        start, end = rotation.change.start, rotation.change.end
        name = f"adapter {end}" if end is not None else f"adapter_out_of {start}"
        _make_sparse(editor, name, rotation.product, editor.folded[rotation.matrix].shape[0])
    return tuple(_sparsified(editor, folded) for folded in sites)


def _sparsified(editor: GraphEditor, folded: FoldedSite) -> FoldedSite:
    if folded.site.group.stacked:
        _sparsify_activation(editor, folded)
        return folded
    name = f"sparse_linear {folded.site.group.name.removesuffix('.weight')}"
    return replace(folded, products=(_make_sparse(editor, name, folded.products[0], folded.site.kept),))


def _make_sparse(editor: GraphEditor, name: str, product: Node, kept: int) -> Node:
    """name: after the site, so that graphs, dumps and traces can be read."""
    with editor.graph.inserting_before(product):
        sparse = editor.call(name, ops.sparse_linear, *product.args, kept)
    product.replace_all_uses_with(sparse)
    editor.graph.erase_node(product)
    return sparse


def _sparsify_activation(editor: GraphEditor, folded: FoldedSite) -> None:
    site, dense = folded.site, folded.activation
    if site.kept == site.group.features:
        return
    with editor.graph.inserting_before(folded.products[0]):
        name = f"sparse_activation {site.group.name}"
        sparse = editor.like(editor.call(name, ops.sparsify, editor.as_rows(dense), site.kept), dense)
    for product in folded.products:
        product.replace_input_with(dense, sparse)
