"""Rewrite 5: the folded weights of sites in fewer bits (`kernels/formats.py`). As inexact as their rounding.

Apart from the others, because the self-check stands between: it compares what is exact. Rotations that are computed at
run time and what stays dense keep the model's dtype, and so do stacks of weights, whose products are not ours.

Noise is what is rounded off times what it meets, and in a rotated activation the first features meet most of it. So
they have twice the bits, and linears that read no stream, where nothing is sorted, have eight in every format.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from larosa_compile.kernels import ops
from larosa_compile.kernels.formats import FORMATS, PACKED_DTYPE, UNSORTED, WeightFormat, pack_columns
from larosa_compile.passes.fold import FoldedSite
from larosa_compile.passes.plan import Site
from larosa_compile.passes.rewriting import Columns, GraphEditor


def pack_sites(editor: GraphEditor, sites: Sequence[FoldedSite], weights: str) -> tuple[FoldedSite, ...]:
    """Makes the sparse products of sites read packed weights. `weights`: a name in `FORMATS`.

    Returns the sites with their products and formats as they are now.
    """
    packed = []
    for folded in sites:
        if refuse_to_pack(folded.site) is None:
            form = UNSORTED if folded.site.basis is None else FORMATS[weights]
            folded = replace(folded, products=(_read_packed(editor, folded.products[0], form),), form=form)
        packed.append(folded)
    editor.drop_dead()
    return tuple(packed)


def refuse_to_pack(site: Site) -> str | None:
    """Why the weights of a site keep the model's dtype; None if they are packed."""
    if site.group.stacked:
        return "there is no kernel yet for a stack of weights in fewer bits; it keeps the model's dtype"
    return None


def _read_packed(editor: GraphEditor, product: Node, form: WeightFormat) -> Node:
    x, weight, kept = product.args
    assert isinstance(weight, Node)
    plain = editor.folded[weight]
    features, columns = plain.shape

    def convert(weight: Columns) -> Tensor:
        return pack_columns(weight, features, columns, form, plain.device)

    packed = plain.converted(form.name, form.shape(features, columns), PACKED_DTYPE, convert)
    with editor.graph.inserting_before(product):
        read = editor.folded_input(f"{weight.name}_{form.name}", packed)
        name = f"{product.name}_{form.name}"
        made = editor.call(name, ops.sparse_linear_packed, x, read, kept, columns, form.name)
    product.replace_all_uses_with(made)
    editor.graph.erase_node(product)
    return made
