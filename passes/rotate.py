"""Rewrite 1: makes every change of basis an explicit product with an orthogonal matrix. Exact by itself.

Where an edge of a stream leads from a node in basis `a` to one in basis `b`, the features are multiplied by
`Q_aᵀ Q_b`; where it leaves the stream, by `Q_aᵀ`. `fold` then absorbs the products next to linears, and what is
left are the residual adapters and the rotations at the ends of the stream (method: folds 4 and 6).
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from larosa_compile.passes.algebra import Basis, Rotations, change_of_basis, matrix
from larosa_compile.passes.graph import aten, rotation_operands, value
from larosa_compile.passes.parameters import Parameters
from larosa_compile.passes.plan import Plan
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor
from larosa_compile.passes.streams import exits


@dataclass(frozen=True)
class OnlineRotation:
    """`result = source @ Q_startᵀ Q_end`, computed at run time.

    product: its `mm` over [rows, features]; matrix: the placeholder of `Q_startᵀ Q_end`.
    """

    source: Node
    product: Node
    result: Node
    start: Basis
    end: Basis
    matrix: Node


def insert_rotations(editor: GraphEditor, plan: Plan) -> list[OnlineRotation]:
    """Inserts the product on every edge that changes basis, once per node and target basis."""
    made: dict[tuple[Node, Basis], OnlineRotation] = {}
    for stream in plan.facts.streams:
        for node in stream.nodes:
            start = plan.bases.get(node)
            carrying = [user for user in node.users if node in rotation_operands(user)]
            wanted = [(user, plan.bases.get(user)) for user in carrying]
            wanted += [(user, None) for user in exits(node)]
            for user, end in wanted:
                if end != start:
                    if (node, end) not in made:
                        made[node, end] = rotate_node(editor, node, start, end)
                    user.replace_input_with(node, made[node, end].result)
    for site in plan.sites:
        # what `fold` reads instead of the rotation back to the model's basis
        if site.reader is not None:
            node, start = site.reader.source, plan.bases[site.reader.source]
            if start != site.basis and (node, site.basis) not in made:
                made[node, site.basis] = rotate_node(editor, node, start, site.basis)
    return list(made.values())


def rotate_node(editor: GraphEditor, node: Node, start: Basis, end: Basis) -> OnlineRotation:
    """Adds `node @ Q_startᵀ Q_end` right after `node`; changes no user."""
    fake = value(node)
    assert fake is not None
    name = f"rotate {start or 'model'} -> {end or 'model'}"

    def build(_: Parameters, rotations: Rotations) -> torch.Tensor:
        adapter = change_of_basis(matrix(rotations, start), matrix(rotations, end))
        return adapter.to(fake.device, fake.dtype).contiguous()

    features = int(fake.shape[-1])
    adapter = FoldedTensor(f"{name} {fake.dtype}", (), (features, features), fake.dtype, fake.device, build)
    adapter_node = editor.folded_input(name, adapter)
    # an input is followed by other inputs, its matrix among them
    after = node if node.op != "placeholder" else editor.last_input
    with editor.graph.inserting_before(after.next):
        product = editor.call(f"{node.name}_rotated", aten.mm.default, editor.as_rows(node), adapter_node)
        result = editor.like(product, node)
    return OnlineRotation(node, product, result, start, end, adapter_node)
