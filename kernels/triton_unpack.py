"""A packed weight as a dense one, by a pointwise kernel of Inductor's: what many rows are multiplied with on GPUs."""

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._inductor import ir
from torch._inductor.virtualized import ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from larosa_compile.kernels.formats import WeightFormat


def unpack(packed: ir.IRNode, features: int, columns: int, dtype: torch.dtype, form: WeightFormat) -> ir.TensorBox:
    """The weight [features, columns] in `dtype` that `packed`, contiguous, holds in this format."""
    lines, width = map(int, packed.get_size())
    fine, load = min(features, form.fine), packed.make_loader()

    def integer(value: int) -> Any:
        return ops.constant(value, torch.int32)

    def byte(line: Any, place: sympy.Expr) -> Any:
        return ops.to_dtype(load([ops.indirect_indexing(line, lines), place]), torch.int32)

    def code(line: Any, group: Any, column: sympy.Expr) -> Any:
        stored = ops.add(line, ops.mul(ops.add(group, integer(1)), integer(form.scale_lines)))
        if form.bits == 8:
            # from two's complement
            return ops.sub(ops.bitwise_xor(byte(stored, column), integer(128)), integer(128))
        # of a block, byte 4 w + j has columns 32 j + w below and 32 j + 16 + w above
        within = ModularIndexing(column, 1, 128)
        place = 64 * FloorDiv(column, 128) + 4 * ModularIndexing(within, 1, 16) + FloorDiv(within, 32)
        shift = ops.index_expr(4 * ModularIndexing(within, 16, 2), torch.int32)
        nibble = ops.bitwise_and(ops.bitwise_right_shift(byte(stored, place), shift), integer(15))
        return ops.sub(nibble, integer(8))

    def scale(group: Any, column: sympy.Expr) -> Any:
        top = ops.mul(group, integer(form.group + form.scale_lines))
        halves = []
        for place in (2 * column, 2 * column + 1):
            line = ops.add(top, ops.index_expr(FloorDiv(place, width), torch.int32))
            halves.append(byte(line, ModularIndexing(place, 1, width)))
        bits = ops.bitwise_or(halves[0], ops.bitwise_left_shift(halves[1], integer(8)))
        # a bfloat16 is the upper half of a float32
        return ops.to_dtype_bitcast(ops.bitwise_left_shift(bits, integer(16)), torch.float32, torch.int32)

    def entry(index: Any) -> Any:
        feature, column = index
        place = ops.index_expr(feature, torch.int32)
        is_fine = ops.lt(place, integer(fine))
        line = ops.where(is_fine, ops.mul(place, integer(2)), ops.add(place, integer(fine)))
        group = ops.bitwise_right_shift(line, integer(form.group.bit_length() - 1))
        value = code(line, group, column)
        if fine:
            low = code(ops.where(is_fine, ops.add(line, integer(1)), line), group, column)
            value = ops.where(is_fine, ops.add(ops.mul(value, integer(form.radix)), low), value)
        return ops.to_dtype(ops.mul(ops.to_dtype(value, torch.float32), scale(group, column)), dtype)

    dense: ir.TensorBox = ir.Pointwise.create(
        device=packed.get_device_or_error(), dtype=dtype, inner_fn=entry, ranges=[features, columns]
    )
    return dense
