"""The Inductor C++ template of `larosa::attend`: attention of one query per head over a cache."""

from typing import Any

from torch._inductor import ir
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

from larosa_compile.kernels import heuristics
from larosa_compile.kernels.cpp_templates import FusingTemplate


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
        inputs, constants = {"X": query, "K": key, "V": values}, dict[str, Any]()
        for mask in masks:
            inputs["Mask"] = mask
            # along a dimension of size 1 it is the same for all
            sizes = zip(("b", "h", 0, "first"), mask.get_size(), strict=True)
            at = [index if size != 1 else 0 for index, size in sizes]
            constants |= {"mask_at": at, "mask_type": DTYPE_TO_CPP[mask.get_dtype()]}
        return (
            inputs
            | constants
            | {
                "inputs": inputs,
                "Mask": inputs.get("Mask"),
                "scale": float(self.scale),
                "together": heuristics.heads_together(self.sharing),
                "weight_type": DTYPE_TO_CPP[self.layout.dtype],
                "columns": int(self.layout.size[1]),
                "block": heuristics.ATTENTION_BLOCK,
                "parallel_from": heuristics.MIN_PARALLEL_BYTES,
            }
        )
