"""Rewrite 4: what else a decode step computes for one row. Exact up to rounding.

For one row a product costs the reading of its weight, and attention that of its cache. The libraries that serve
matrices reach half the memory's bandwidth at that, and copy a cache that several heads share once per head. So a
product with a weight as modules store it becomes `larosa::sparse_linear` with nothing dropped, and attention of one
query `larosa::attend`, which reads what its mask lets it see of the cache, once for all heads that share it.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from larosa_compile.kernels import ops
from larosa_compile.kernels.support import refusal_reason
from larosa_compile.passes.graph import aten, is_call, value
from larosa_compile.passes.rewriting import GraphEditor


def specialise_one_row(editor: GraphEditor) -> None:
    """Rewrites the dense products and the attention of a graph that decodes one row; leaves all others alone."""
    for node in list(editor.graph.nodes):
        if is_call(node, aten.mm.default, aten.addmm.default):
            _stream_weight(editor, node)
        elif is_call(node, aten._scaled_dot_product_flash_attention_for_cpu.default):
            _attend_from_the_cache(editor, node)


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


def _attend_from_the_cache(editor: GraphEditor, node: Node) -> None:
    """q [batch, heads, 1, width] as rows of one query each, over k and v as they are cached."""
    found = _attention(node)
    if found is None:
        return
    shape = [-1, *found.query.meta["val"].shape[1:3], found.values.meta["val"].shape[3]]
    with editor.inserting_after(node):
        rows = editor.call("query", aten.reshape.default, found.query, [-1, found.query.meta["val"].shape[3]])
        attended = editor.call("attended", ops.attend, rows, found.key, found.values, found.mask, found.scale)
        attended = editor.call("attention", aten.reshape.default, attended, shape)
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
    cached = [_behind_copies(node) for node in (key, values)]
    if cached[0] is not None and cached[1] is not None:
        key, values = cached
    groups = key.meta["val"].shape[1]
    if not all(isinstance(size, int) for size in (heads, groups, rows, width)) or rows != 1 or heads % groups:
        return None
    masks = value(mask)
    if masks is not None and (masks.ndim != 4 or (groups != heads and masks.shape[1] != 1)):
        return None
    return _Attention(query, key, values, mask, 1 / math.sqrt(width) if scale is None else scale)


def _behind_copies(repeated: Node) -> Node | None:
    """[batch, groups, length, width], if `repeated` [batch, heads, length, width] has it once for each head of a group.

    transformers repeats keys and values that way wherever attention has a mask, as it has with a static cache.
    """
    copies: Any = repeated.args[0] if is_call(repeated, aten.view.default, aten._unsafe_view.default) else None
    expanded: Any = copies.args[0] if is_call(copies, aten.clone.default) else copies
    one: Any = expanded.args[0] if is_call(expanded, aten.expand.default) else None
    if not is_call(one, aten.unsqueeze.default) or one.args[1] != 2:
        return None
    cached: Any = one.args[0]
    batch, groups, length, width = cached.meta["val"].shape
    sharing = expanded.meta["val"].shape[2]
    if tuple(expanded.meta["val"].shape) != (batch, groups, sharing, length, width):
        return None
    heads = (batch, groups * sharing, length, width)
    return cached if tuple(repeated.meta["val"].shape) == heads else None
