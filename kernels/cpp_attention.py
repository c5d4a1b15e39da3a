"""`larosa::attend` on a CPU: an Inductor C++ template, or Inductor's own operations where the cache is small."""

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.lowering import lowerings

from larosa_compile.kernels import heuristics
from larosa_compile.kernels.cpp_templates import FusingTemplate

aten, prims = torch.ops.aten, torch.ops.prims


class AttendTemplate(FusingTemplate):
    """Keys in blocks, over groups and blocks in parallel; blocks that the mask hides are not read.

    inputs: query, key and values, and the mask if there is one. sharing: heads of a group.
    """

    name = "larosa_attend"
    file = "attend.cpp.jinja"

    def __init__(self, inputs: list[ir.IRNode], layout: ir.Layout, threads: int, scale: float, sharing: int) -> None:
        super().__init__(inputs, layout, threads)
        self.scale = scale
        self.sharing = sharing

    def constants(self) -> dict[str, Any]:
        query, key, values, *masks = self.input_nodes
        together = heuristics.heads_together(self.sharing)
        inputs = {"X": query, "K": key, "V": values}
        constants: dict[str, Any] = {
            "inputs": inputs,
            "Mask": None,
            "masks": 1,
            "scale": float(self.scale),
            "together": together,
            "weight_type": DTYPE_TO_CPP[self.layout.dtype],
            "columns": int(self.layout.size[1]),
            "block": heuristics.ATTENTION_BLOCK,
            "parallel_from": heuristics.MIN_PARALLEL_BYTES,
        }
        for mask in masks:
            inputs["Mask"] = mask
            # along a dimension of size 1 it is the same for all
            sizes = zip(("b", "h", 0, "first"), mask.get_size(), strict=True)
            at = [index if size != 1 else 0 for index, size in sizes]
            constants |= {"mask_at": at, "mask_type": DTYPE_TO_CPP[mask.get_dtype()], "masks": together if at[1] else 1}
        return constants | inputs


def spelled_out(
    query: ir.TensorBox, key: ir.TensorBox, values: ir.TensorBox, mask: ir.TensorBox | None, scale: float
) -> ir.TensorBox:
    """`reference.attend` in Inductor's operations, which it fuses with what makes the query and with each other."""
    (rows, width), (batch, groups) = query.get_size(), key.get_size()[:2]

    def call(target: torch._ops.OpOverload, *args: object) -> ir.TensorBox:
        made: ir.TensorBox = lowerings[target](*args)
        return made

    def wide(tensor: ir.TensorBox) -> ir.TensorBox:
        return call(prims.convert_element_type.default, tensor, torch.float32)

    # lengths stay in the last dimension but one, so that reductions over it read the values as they are stored
    heads = wide(call(aten.view.default, query, [batch, groups, rows // (batch * groups), 1, width]))
    heads.realize()  # or its rotary embedding, sines and all, would be computed for every key anew
    keys, weighed = (wide(call(aten.unsqueeze.default, tensor, 2)) for tensor in (key, values))
    scores = call(aten.mul.Tensor, call(aten.sum.dim_IntList, call(aten.mul.Tensor, heads, keys), [-1], True), scale)
    if mask is not None:
        sharing = 1 if mask.get_size()[1] == 1 else rows // (batch * groups)
        split = [mask.get_size()[0], mask.get_size()[1] // sharing, sharing, mask.get_size()[3], 1]
        scores = call(aten.add.Tensor, scores, wide(call(aten.reshape.default, mask, split)))
    largest = call(aten.clamp_min.default, call(aten.amax.default, scores, [-2], True), torch.finfo().min)
    weights = call(aten.exp.default, call(aten.sub.Tensor, scores, largest))
    total = call(aten.clamp_min.default, call(aten.sum.dim_IntList, weights, [-2], True), 1.0)
    summed = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, weighed), [-2], True)
    attended = call(prims.convert_element_type.default, call(aten.div.Tensor, summed, total), query.get_dtype())
    return call(aten.reshape.default, attended, [rows, values.get_size()[3]])
