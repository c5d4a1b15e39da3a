"""Rewrite 3: selection at every site. The only rewrite that changes what the model computes.

A site's product becomes `larosa::sparse_linear`, which keeps the k inputs of largest magnitude of every row. Where a
site keeps what reaches a threshold, `larosa::keep_above` says so of its input, or of the gate that is a factor of it,
and the product reads what is not zero. A product with a stack of weights keeps its own op and reads what
`larosa::sparsify`, or a threshold, left of its activation. The rotations that stayed online take the op of the sites
with nothing dropped, hence the same kernel.
"""

from dataclasses import replace

from torch.fx import Node

from larosa_compile.kernels import ops
from larosa_compile.passes.fold import FoldedSite
from larosa_compile.passes.graph import aten
from larosa_compile.passes.linears import chain_to_origin
from larosa_compile.passes.rewriting import GraphEditor
from larosa_compile.passes.rotate import OnlineRotation
from larosa_compile.passes.selection import RELATIVE


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
    sparse = tuple(_sparsified(editor, folded) for folded in sites)
    editor.drop_dead()
    return sparse


def _sparsified(editor: GraphEditor, folded: FoldedSite) -> FoldedSite:
    site = folded.site
    by_threshold = site.is_sparse and not site.selection.is_exact
    if by_threshold:
        folded = _keep_above(editor, folded)
    elif site.group.stacked and site.is_sparse:
        _keep_largest(editor, folded)
    if site.group.stacked:
        return folded
    name = f"sparse_linear {site.group.name.removesuffix('.weight')}"
    product = _make_sparse(editor, name, folded.products[0], None if by_threshold else site.kept)
    return replace(folded, products=(product,))


def _make_sparse(editor: GraphEditor, name: str, product: Node, kept: int | None) -> Node:
    """name: after the site, so that graphs, dumps and traces can be read."""
    with editor.graph.inserting_before(product):
        sparse = editor.call(name, ops.sparse_linear, *product.args, kept)
    product.replace_all_uses_with(sparse)
    editor.graph.erase_node(product)
    return sparse


def _keep_largest(editor: GraphEditor, folded: FoldedSite) -> None:
    site, dense = folded.site, folded.activation
    with editor.graph.inserting_before(folded.products[0]):
        name = f"sparse_activation {site.group.name}"
        sparse = editor.like(editor.call(name, ops.sparsify, editor.as_rows(dense), site.kept), dense)
    for product in folded.products:
        product.replace_input_with(dense, sparse)


def _keep_above(editor: GraphEditor, folded: FoldedSite) -> FoldedSite:
    # not `folded.activation`: a rotation computed at run time has become another node by now
    site, activation = folded.site, folded.products[0].args[0]
    assert isinstance(activation, Node)
    name = f"above {site.group.name.removesuffix('.weight')}"

    def above(dense: Node) -> Node:
        return editor.call(name, ops.keep_above, dense, site.selection.threshold, site.selection.rule == RELATIVE)

    with editor.graph.inserting_before(folded.products[0]):
        if site.gate is None:
            sparse = selected = above(activation)
        else:
            # the product is zero where its factor is; others may read the product as it was
            selected = above(site.gate.factor)
            factors = [selected if factor is site.gate.factor else factor for factor in site.gate.product.args]
            masked = editor.call(f"gated {site.group.name}", aten.mul.Tensor, *factors)
            sparse = editor.replay(chain_to_origin(activation)[1], masked)
    for product in folded.products:
        product.replace_input_with(activation, sparse)
    return replace(folded, activation=sparse, selected=selected)
