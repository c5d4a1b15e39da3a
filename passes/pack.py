"""Rewrite 5: the folded weights of sites in fewer bits (`kernels/formats.py`). As inexact as their rounding.

Apart from the others, because the self-check stands between: it compares what is exact. Rotations that are computed at
run time and what stays dense keep the model's dtype, and so do stacks of weights, whose products are not ours.
"""

from collections.abc import Iterable

from torch.fx import Node

from larosa_compile.kernels import ops
from larosa_compile.kernels.formats import PACKED_DTYPE, WeightFormat, pack
from larosa_compile.kernels.support import packed_refusal_reason
from larosa_compile.passes.graph import is_call, value
from larosa_compile.passes.plan import Site
from larosa_compile.passes.rewriting import GraphEditor


def refuse_to_pack(site: Site) -> str | None:
    """Why the weights of a site keep the model's dtype; None if they are packed."""
    if site.group.stacked:
        return "there is no kernel yet for a stack of weights in fewer bits; it keeps the model's dtype"
    fake = value(site.linears[0].product)
    assert fake is not None
    return packed_refusal_reason(fake.device)


def pack_weights(editor: GraphEditor, rotations: Iterable[Node], form: WeightFormat) -> None:
    """Makes the sparse products over folded weights read packed ones. `rotations`: the matrices to leave alone."""
    left = set(rotations)
    for node in list(editor.graph.nodes):
        if is_call(node, ops.sparse_linear) and node.args[1] in editor.folded.keys() - left:
            weight = node.args[1]
            assert isinstance(weight, Node)
            if packed_refusal_reason(editor.folded[weight].device) is None:
                _read_packed(editor, node, weight, form)
    editor.drop_dead()


def _read_packed(editor: GraphEditor, product: Node, weight: Node, form: WeightFormat) -> None:
    plain = editor.folded[weight]
    features, columns = plain.shape
    packed = plain.converted(form.name, form.shape(features, columns), PACKED_DTYPE, lambda weight: pack(weight, form))
    with editor.graph.inserting_before(product):
        name = f"{product.name}_{form.name}"
        read = editor.folded_input(f"{weight.name}_{form.name}", packed)
        x, _, kept = product.args
        made = editor.call(name, ops.sparse_linear_packed, x, read, kept, columns, form.name)
    product.replace_all_uses_with(made)
    editor.graph.erase_node(product)
