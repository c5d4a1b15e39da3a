"""Rewrite 0: one spelling for what graphs spell in several ways. Exact, and none of it is specific to the method.

var(x), var_mean(x)     mean, and the mean of the squared difference: what a LayerNorm is made of
split, unbind           slices and selects
term + x @ weights      a sum and a batched product
weights @ x             (xᵀ @ weightsᵀ)ᵀ: parameters stand on the right of every batched product
[x] @ [weight]          [x @ weight]: a batch of one, as einsum writes a linear, is no batch
"""

from typing import Any

import torch
from torch.fx import Node

from larosa_compile.passes.graph import ParameterGraph, aten, is_call, prims, value, width
from larosa_compile.passes.parameters import parameter_expression, selected_parameter
from larosa_compile.passes.rewriting import GraphEditor


def canonicalise(editor: GraphEditor) -> ParameterGraph:
    """Rewrites the graph in place; returns it."""
    for node in editor.graph.find_nodes(op="call_function", target=aten.baddbmm.default):
        with editor.graph.inserting_before(node):
            _spell_out_added_term(editor, node)
    for node in list(editor.graph.nodes):
        with editor.graph.inserting_before(node):
            if is_call(node, aten.var_mean.correction, aten.var.correction):
                _spell_out_variance(editor, node)
            elif is_call(node, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
                _take_apart(editor, node)
            elif is_call(node, aten.bmm.default):
                _put_weight_on_the_right(editor, node)
    for node in list(editor.graph.nodes):
        if is_call(node, aten.bmm.default):
            with editor.graph.inserting_before(node):
                _unpack_batch_of_one(editor, node)
    editor.graph.eliminate_dead_code()
    return editor.source


def _spell_out_variance(editor: GraphEditor, node: Node) -> None:
    x: Any = node.args[0]
    fake, count = value(x), width(x)
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    correction: Any = node.kwargs.get("correction")
    correction = 1 if correction is None else correction
    if fake is None or count is None or count <= correction or not dims:
        return
    if {dim % fake.ndim for dim in dims} != {fake.ndim - 1}:
        return
    # at least in single precision, as the operation itself computes
    wide = x
    if fake.dtype.itemsize < torch.float32.itemsize:
        wide = editor.call(f"{x.name}_wide", prims.convert_element_type.default, x, torch.float32)
    mean = editor.call("mean", aten.mean.dim, wide, [-1], True)
    centred = editor.call("centred", aten.sub.Tensor, wide, mean)
    squares = editor.call("squares", aten.mul.Tensor, centred, centred)
    variance = editor.call("variance", aten.mean.dim, squares, [-1], True)
    if correction:
        variance = editor.call("variance", aten.mul.Tensor, variance, count / (count - correction))
    for item in list(node.users) if is_call(node, aten.var_mean.correction) else [node]:
        result = editor.cast_like(mean if item is not node and item.args[1] == 1 else variance, x)
        if not node.kwargs.get("keepdim", False):
            result = editor.call(f"{item.name}_squeezed", aten.squeeze.dim, result, -1)
        item.replace_all_uses_with(result)
    for user in list(mean.users):
        # the model's own difference to the mean is this one
        if is_call(user, aten.sub.Tensor) and user.args == (x, mean) and not user.kwargs and user is not centred:
            user.replace_all_uses_with(centred)


def _take_apart(editor: GraphEditor, node: Node) -> None:
    source: Any = node.args[0]
    parts: Any = node.meta["val"]
    unbinds = node.target is aten.unbind.int
    position = 1 if unbinds else 2
    dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    sizes = [1 if unbinds else part.shape[dim] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return
    for item in list(node.users):
        index: Any = item.args[1]
        if unbinds:
            part = editor.call(item.name, aten.select.int, source, dim, index)
        else:
            start = sum(sizes[:index])
            part = editor.call(item.name, aten.slice.Tensor, source, dim, start, start + sizes[index])
        item.replace_all_uses_with(part)


def _spell_out_added_term(editor: GraphEditor, node: Node) -> None:
    if all(node.kwargs.get(factor, 1) == 1 for factor in ("alpha", "beta")):
        product = editor.call(f"{node.name}_product", aten.bmm.default, *node.args[1:3])
        node.replace_all_uses_with(editor.call(f"{node.name}_sum", aten.add.Tensor, product, node.args[0]))


def _put_weight_on_the_right(editor: GraphEditor, node: Node) -> None:
    left: Any = node.args[0]
    right: Any = node.args[1]
    if not selected_parameter(left, editor.source) or selected_parameter(right, editor.source):
        return
    columns = value(right)
    assert columns is not None
    if is_call(right, aten.unsqueeze.default) and right.args[1] in (-1, 2):
        flipped = editor.call(f"{right.name}_row", aten.unsqueeze.default, right.args[0], 1)
    else:
        flipped = editor.call(f"{right.name}_flipped", aten.permute.default, right, [0, 2, 1])
    weight = editor.call(f"{left.name}_flipped", aten.permute.default, left, [0, 2, 1])
    product = editor.call(f"{node.name}_flipped", aten.bmm.default, flipped, weight)
    for user in list(node.users):
        if is_call(user, aten.squeeze.dim) and user.args[1] in (-1, 2) and columns.shape[-1] == 1:
            user.replace_all_uses_with(editor.call(user.name, aten.squeeze.dim, product, 1))
    node.replace_all_uses_with(editor.call(f"{node.name}_back", aten.permute.default, product, [0, 2, 1]))


def _unpack_batch_of_one(editor: GraphEditor, node: Node) -> None:
    left: Any = node.args[0]
    right: Any = node.args[1]
    weight = value(right)
    if weight is None or weight.shape[0] != 1 or parameter_expression(right, editor.source) is None:
        return
    single = [editor.call(f"{operand.name}_single", aten.squeeze.dim, operand, 0) for operand in (left, right)]
    product = editor.call(f"{node.name}_single", aten.mm.default, *single)
    node.replace_all_uses_with(editor.call(f"{node.name}_batch", aten.unsqueeze.default, product, 0))
