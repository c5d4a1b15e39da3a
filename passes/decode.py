"""Rewrite 4: what else a decode step computes for one row. Exact up to rounding.

For one row a product costs the reading of its weight, and attention that of its cache. The libraries that serve
matrices reach half the memory's bandwidth at that, and copy a cache that several heads share once per head. So a
product with a weight as modules store it becomes `larosa::sparse_linear` with nothing dropped, and attention
of one query is spelled out in float32, for the compiler to fuse into loops over the cache as it is.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.inductor_prims import force_stride_order
from torch.fx import Node

from larosa_compile.kernels import ops
from larosa_compile.kernels.support import refusal_reason
from larosa_compile.passes.graph import aten, is_call, prims, value
from larosa_compile.passes.rewriting import GraphEditor


def specialise_one_row(editor: GraphEditor) -> None:
    """Rewrites the dense products and the attention of a graph that decodes one row; leaves all others alone."""
    for node in list(editor.graph.nodes):
        if is_call(node, aten.mm.default, aten.addmm.default):
            _stream_weight(editor, node)
        elif is_call(node, aten._scaled_dot_product_flash_attention_for_cpu.default):
            _spell_out_attention(editor, node)


def _stream_weight(editor: GraphEditor, node: Node) -> None:
    *bias, row, weight = node.args
    fake, stored = value(node), value(weight)
    if fake is None or stored is None or node.kwargs or refusal_reason(fake.device, fake.dtype):
        return
    if fake.device.type != "cpu":
        return  # on a GPU such products are left to its library
    features = stored.shape[0]
    if not isinstance(fake.shape[0], int) or fake.shape[0] != 1 or stored.stride() != (1, features):
        return
    with editor.inserting_after(node):
        product = editor.call(f"{node.name}_streamed", ops.sparse_linear, row, weight, features)
        if bias:
            product = editor.call(f"{node.name}_biased", aten.add.Tensor, product, bias[0])
    node.replace_all_uses_with(product)
    editor.graph.erase_node(node)


def _spell_out_attention(editor: GraphEditor, node: Node) -> None:
    """`softmax(q kᵀ · scale + mask) v` for q [batch, heads, 1, width], k and v [batch, groups of heads, length, width].

    A row that no key may be seen from is zero, as the op defines it.
    """
    found = _attention(node)
    if found is None:
        return
    query, key, values, mask = found.query, found.key, found.values, found.mask
    fake, groups = value(query), key.meta["val"].shape[1]
    assert fake is not None

    def call(target: torch._ops.OpOverload, *args: object) -> Node:
        return editor.call("attention", target, *args)

    def wide(tensor: Node) -> Node:
        return call(prims.convert_element_type.default, tensor, torch.float32)

    with editor.inserting_after(node):
        shared = groups != fake.shape[1]
        if shared:
            # heads of a group in a dimension of their own, along which k and v are broadcast
            query = call(aten.reshape.default, query, [-1, groups, fake.shape[1] // groups, 1, fake.shape[3]])
            key, values = call(aten.unsqueeze.default, key, 2), call(aten.unsqueeze.default, values, 2)
            mask = None if mask is None else call(aten.unsqueeze.default, mask, 2)
        # computed once: Inductor would compute its rotary embedding, sines and all, for every key anew
        query = wide(query)
        query = call(force_stride_order, query, [*query.meta["val"].stride()])
        # lengths stay in the last dimension but one, so that reductions over it read v as it is stored
        products = call(aten.mul.Tensor, query, wide(key))
        scores = call(aten.mul.Tensor, call(aten.sum.dim_IntList, products, [-1], True), found.scale)
        if mask is not None:
            rank = mask.meta["val"].ndim
            turned = call(aten.permute.default, wide(mask), [*range(rank - 2), rank - 1, rank - 2])
            scores = call(aten.add.Tensor, scores, turned)
        largest = call(aten.clamp_min.default, call(aten.amax.default, scores, [-2], True), torch.finfo().min)
        weights = call(aten.exp.default, call(aten.sub.Tensor, scores, largest))
        weighed = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, wide(values)), [-2], True)
        # the largest score weighs 1, so only a row that sees nothing sums to less
        total = call(aten.clamp_min.default, call(aten.sum.dim_IntList, weights, [-2], True), 1.0)
        attended = call(prims.convert_element_type.default, call(aten.div.Tensor, weighed, total), fake.dtype)
        if shared:
            attended = call(aten.reshape.default, attended, [-1, *fake.shape[1:]])
    for user in list(node.users):
        user.replace_all_uses_with(attended)
        editor.graph.erase_node(user)
    editor.graph.erase_node(node)  # its dropout makes it impure, so nobody else would


@dataclass(frozen=True)
class _Attention:
    query: Node
    key: Node
    values: Node
    mask: Node | None
    scale: float


def _attention(node: Node) -> _Attention | None:
    """Attention with one query row, of whose results the output alone is used; None for any other."""
    schema = aten._scaled_dot_product_flash_attention_for_cpu.default._schema
    given: dict[str, Any] = {argument.name: argument.default_value for argument in schema.arguments}
    given |= dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    query, key, values, mask, scale = (given[name] for name in ("query", "key", "value", "attn_mask", "scale"))
    # a causal mask lets one query see the first key alone, however long the cache
    if given["is_causal"] or given["dropout_p"] or any(user.args[1] != 0 for user in node.users):
        return None
    _, heads, rows, width = query.meta["val"].shape
    groups = key.meta["val"].shape[1]
    if not all(isinstance(size, int) for size in (heads, groups, rows, width)) or rows != 1 or heads % groups:
        return None
    masks = value(mask)
    if masks is not None and (masks.ndim != 4 or (groups != heads and masks.shape[1] != 1)):
        return None
    return _Attention(query, key, values, mask, 1 / math.sqrt(width) if scale is None else scale)
