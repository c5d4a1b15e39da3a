"""The exact Top-K threshold of a row as Inductor's own operations, which its scheduler fuses with what makes the row.

The k-th largest magnitude is found from its high bits down, two bits a pass over the row: the largest t such that at
least k entries have magnitude bits >= t. As reductions over the row it joins the kernel of a normalisation or a gate;
a template of its own, opaque to the scheduler, would be one more launch and one more pass over memory.
"""

from statistics import NormalDist
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings

from larosa_compile.kernels.reference import MAGNITUDE_VIEWS

aten, prims = torch.ops.aten, torch.ops.prims

COUNT_BITS = 21
"""Of an int64 sum: three counts of features side by side."""

MAX_FEATURES = (1 << COUNT_BITS) - 1


def _call(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> ir.TensorBox:
    result: ir.TensorBox = lowerings[op](*args, **kwargs)
    return result


def infinity_bits(dtype: torch.dtype) -> int:
    """The magnitude bits of infinity: those of a NaN are larger, all others smaller."""
    integer, _ = MAGNITUDE_VIEWS[dtype]
    return int(torch.tensor(float("inf"), dtype=dtype).view(integer))


def normal_threshold(features: int, k: int, dtype: torch.dtype) -> int:
    """The magnitude bits that about `k` of so many standard normal entries reach."""
    integer, _ = MAGNITUDE_VIEWS[dtype]
    magnitude = NormalDist().inv_cdf(1 - k / features / 2)
    return int(torch.tensor(magnitude, dtype=dtype).view(integer))


def magnitude_bits(x: ir.IRNode) -> ir.TensorBox:
    """int32, shaped like `x`: integers in the order of |x|."""
    integer, mask = MAGNITUDE_VIEWS[x.get_dtype()]
    bits = _call(prims.convert_element_type.default, _call(aten.view.dtype, x, integer), torch.int32)
    return _call(aten.bitwise_and.Scalar, bits, mask)


def kth_magnitude(x: ir.IRNode, k: int) -> ir.TensorBox:
    """int32 [rows, 1] of x [rows, features]: what the magnitude bits of an entry must reach for it to be kept.

    A NaN that was computed may reach memory with other bits than it is compared with here. So where the k-th largest
    is a NaN, the threshold is one above infinity, which every NaN reaches and nothing else.
    """
    integer, _ = MAGNITUDE_VIEWS[x.get_dtype()]
    bits, rows = magnitude_bits(x), x.get_size()[0]
    threshold = _call(aten.full.default, [rows, 1], 0, dtype=torch.int32, device=x.get_device_or_error())
    magnitude_width = 8 * integer.itemsize - 1
    # a long row split over several kernels could not join the one that makes it
    with config.patch(split_reductions=False):
        threshold = _raised(threshold, bits, k, magnitude_width - 1, 1)
        for shift in range(magnitude_width - 3, -1, -2):
            threshold = _raised(threshold, bits, k, shift, 3)
    return _call(aten.clamp_max.default, threshold, infinity_bits(x.get_dtype()) + 1)


def _raised(threshold: ir.TensorBox, bits: ir.TensorBox, k: int, shift: int, candidates: int) -> ir.TensorBox:
    """The threshold plus the largest of 0, 1, …, `candidates` times 2**shift that k entries still reach."""
    counts: ir.TensorBox | None = None
    for candidate in range(candidates):
        higher = _call(aten.add.Scalar, threshold, (candidate + 1) << shift)
        reached = _call(prims.convert_element_type.default, _call(aten.ge.Tensor, bits, higher), torch.int64)
        placed = _call(aten.mul.Scalar, reached, 1 << (COUNT_BITS * candidate))
        counts = placed if counts is None else _call(aten.add.Tensor, counts, placed)
    counts = _call(aten.sum.dim_IntList, counts, [1], True)
    for candidate in range(candidates):
        count = _call(aten.__rshift__.Scalar, counts, COUNT_BITS * candidate)
        enough = _call(aten.ge.Scalar, _call(aten.bitwise_and.Scalar, count, MAX_FEATURES), k)
        step = _call(aten.mul.Scalar, _call(prims.convert_element_type.default, enough, torch.int32), 1 << shift)
        threshold = _call(aten.add.Tensor, threshold, step)
    threshold.realize()  # or each round would spell out all rounds before it
    return threshold


def keep_mask(x: ir.IRNode, k: int) -> ir.TensorBox:
    """bool, shaped like x [rows, features]: what `kth_magnitude` keeps."""
    return _call(aten.ge.Tensor, magnitude_bits(x), kth_magnitude(x, k))
