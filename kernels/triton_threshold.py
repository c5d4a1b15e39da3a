"""The exact Top-K threshold of a row as Inductor's own operations, which its scheduler fuses with what makes the row.

The k-th largest magnitude is found bit by bit: the largest t such that at least k entries have magnitude bits >= t.
As reductions over the row it joins the kernel of a normalisation or a gate; a template of its own, opaque to the
scheduler, would be one more launch and one more pass over memory.
"""

from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings

from larosa_compile.kernels.reference import MAGNITUDE_VIEWS

aten, prims = torch.ops.aten, torch.ops.prims


def _call(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> ir.TensorBox:
    result: ir.TensorBox = lowerings[op](*args, **kwargs)
    return result


def infinity_bits(dtype: torch.dtype) -> int:
    """The magnitude bits of infinity: those of a NaN are larger, all others smaller."""
    integer, _ = MAGNITUDE_VIEWS[dtype]
    return int(torch.tensor(float("inf"), dtype=dtype).view(integer))


def magnitude_bits(x: ir.TensorBox) -> ir.TensorBox:
    """int32, shaped like `x`: integers in the order of |x|."""
    integer, mask = MAGNITUDE_VIEWS[x.get_dtype()]
    bits = _call(prims.convert_element_type.default, _call(aten.view.dtype, x, integer), torch.int32)
    return _call(aten.bitwise_and.Scalar, bits, mask)


def kth_magnitude(x: ir.TensorBox, k: int) -> ir.TensorBox:
    """int32 [rows, 1] of x [rows, features]: what the magnitude bits of an entry must reach for it to be kept.

    A NaN that was computed may reach memory with other bits than it is compared with here. So where the k-th largest
    is a NaN, the threshold is one above infinity, which every NaN reaches and nothing else.
    """
    integer, _ = MAGNITUDE_VIEWS[x.get_dtype()]
    bits, rows = magnitude_bits(x), x.get_size()[0]
    threshold = _call(aten.full.default, [rows, 1], 0, dtype=torch.int32, device=x.get_device_or_error())
    # a long row split over several kernels could not join the one that makes it
    with config.patch(split_reductions=False):
        for bit in reversed(range(8 * integer.itemsize - 1)):
            candidate = _call(aten.bitwise_or.Scalar, threshold, 1 << bit)
            reached = _call(aten.ge.Tensor, bits, candidate)
            count = _call(aten.sum.dim_IntList, reached, [1], True, dtype=torch.int32)
            threshold = _call(aten.where.self, _call(aten.ge.Scalar, count, k), candidate, threshold)
            if bit % 2:
                # never: each round would spell out all rounds before it; always: more nodes than Inductor fuses
                threshold.realize()
    return _call(aten.clamp_max.default, threshold, infinity_bits(x.get_dtype()) + 1)


def keep_mask(x: ir.TensorBox, k: int) -> ir.TensorBox:
    """bool, shaped like x [rows, features]: what `kth_magnitude` keeps."""
    return _call(aten.ge.Tensor, magnitude_bits(x), kth_magnitude(x, k))
