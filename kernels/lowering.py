"""Inductor lowerings of `torch.ops.larosa`; importing this module registers them.

sparse_linear, CPU, a few rows  -> SparseGemvTemplate, which never reads a weight row that all of them drop
                  , one row     -> DotGemvTemplate where nothing is dropped and the weight is stored output-major
                  , more rows   -> SparsifyTemplate, then GemmTemplate, or Inductor's own mm over the same weight, in
                                   float32 where 16 bits are slow (`half.py`)
                  , k = None    -> the same kernels, with no selection of their own
sparsify, CPU                   -> SparsifyTemplate
keep_above, any device          -> Inductor's own operations, fused into what makes x
sparse_linear_packed, CPU, a few rows  -> PackedGemvTemplate
                         , more rows   -> PackedGemmTemplate, or UnpackTemplate, then what sparse_linear does
sparse_linear, GPU, a few rows  -> a threshold fused into what makes x, then the Triton template
                  , more rows   -> sparsify, then Inductor's own mm over the same weight
sparse_linear_packed, GPU, a few rows  -> the same threshold, then the Triton template over packed weights
                         , more rows   -> a pointwise kernel that unpacks, then what sparse_linear does
sparsify, GPU                   -> a threshold and a selection, fused into what makes x
attend, CPU                     -> AttendTemplate, or Inductor's own operations where the cache is small
any other device or dtype       -> the eager op
"""

import math
from collections.abc import Callable

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.utils import has_free_symbols, parallel_num_threads
from torch._inductor.virtualized import V

from larosa_compile.kernels import half, heuristics, ops, triton_lowering, triton_unpack
from larosa_compile.kernels.cpp_attention import AttendTemplate, spelled_out
from larosa_compile.kernels.cpp_gemm import GemmTemplate, PackedGemmTemplate, multiplies_pairs
from larosa_compile.kernels.cpp_templates import (
    DotGemvTemplate,
    PackedGemvTemplate,
    SparseGemvTemplate,
    SparsifyTemplate,
    UnpackTemplate,
    output_of,
)
from larosa_compile.kernels.formats import format_of
from larosa_compile.kernels.support import refusal_reason, skips_weights
from larosa_compile.kernels.triton_threshold import MAX_FEATURES

aten, prims = torch.ops.aten, torch.ops.prims


def _eager(op: torch._ops.OpOverload, *args: ir.TensorBox | float | str | None) -> ir.TensorBox:
    call: Callable[..., ir.TensorBox] = fallback_handler(op, add_to_fallback_set=False)
    return call(*args)


def _has_templates(x: ir.TensorBox) -> bool:
    """Whether the templates cover this input: its device, its dtype and a static feature count."""
    features = x.get_size()[1]
    if refusal_reason(x.get_device_or_error(), x.get_dtype()) or has_free_symbols([features]):
        return False
    return _on_cpu(x) or int(features) <= MAX_FEATURES


def _on_cpu(x: ir.TensorBox) -> bool:
    return x.get_device_or_error().type == "cpu"


def _sparsify_rows(x: ir.TensorBox, k: int) -> ir.TensorBox:
    if not _on_cpu(x):
        return triton_lowering.sparsify(x, k)
    x = realize_inputs(x)
    layout = ir.FixedLayout(x.get_device_or_error(), x.get_dtype(), list(x.get_size()))
    return output_of(SparsifyTemplate([x], layout, parallel_num_threads(), k))


def _selected(x: ir.TensorBox, k: int | None) -> ir.TensorBox:
    return x if k is None or k == x.get_size()[1] else _sparsify_rows(x, k)


def _contiguous(x: ir.TensorBox) -> ir.IRNode:
    # not `require_stride1`: it accepts a transposed view, whose unit stride runs down the rows
    return ir.ExternKernel.require_contiguous(realize_inputs(x))


def _gemv(x: ir.TensorBox, weight_t: ir.TensorBox, k: int | None) -> ir.TensorBox:
    if not _on_cpu(x):
        return triton_lowering.sparse_gemv(x, weight_t, k)
    x, weight_t = realize_inputs(x), realize_inputs(weight_t)
    features, columns = map(int, weight_t.get_size())
    rows = int(x.get_size()[0])
    layout = ir.FixedLayout(x.get_device_or_error(), x.get_dtype(), [rows, columns])
    threads = heuristics.gemv_threads((k or features) * columns * x.get_dtype().itemsize, parallel_num_threads())
    if rows == 1 and k == features and _is_output_major(weight_t):
        return output_of(DotGemvTemplate([x, weight_t], layout, threads, k))
    return output_of(SparseGemvTemplate([x, _contiguous(weight_t)], layout, threads, k))


def _has_gemm(x: ir.TensorBox) -> bool:
    """Whether there is a template for many rows of x: it takes features two by two."""
    return _on_cpu(x) and x.get_dtype() == torch.bfloat16 and int(x.get_size()[1]) % 2 == 0 and multiplies_pairs()


def _in_dtype(x: ir.TensorBox, dtype: torch.dtype) -> ir.TensorBox:
    # to its own dtype it would be a copy, which is no input of a product but something to fuse
    convert: Callable[..., ir.TensorBox] = lowerings[prims.convert_element_type.default]
    return x if x.get_dtype() == dtype else convert(x, dtype)


def _mm_dtype(x: ir.TensorBox) -> torch.dtype:
    """What rows like x and weights stored input-major are multiplied in."""
    dtype = x.get_dtype()
    return torch.float32 if _on_cpu(x) and half.is_slow(dtype) else dtype


def _mm(x: ir.TensorBox, weight_t: ir.TensorBox, dtype: torch.dtype) -> ir.TensorBox:
    """Inductor's own product, of numbers of this dtype, in the dtype of x."""
    return _in_dtype(lowerings[aten.mm.default](_in_dtype(x, dtype), _in_dtype(weight_t, dtype)), x.get_dtype())


def _has_few_rows(x: ir.TensorBox, k: int | None) -> bool:
    """Whether a product of these rows has a kernel that skips weights."""
    rows, features = x.get_size()
    known = None if has_free_symbols([rows]) else int(rows)
    return skips_weights(x.get_device_or_error(), known, int(features), k or int(features))


def _is_output_major(weight_t: ir.TensorBox) -> bool:
    stride = weight_t.maybe_get_stride()
    return stride is not None and stride[0] == 1 and stride[1] == weight_t.get_size()[0]


@register_lowering(ops.sparsify, type_promotion_kind=None)
def lower_sparsify(x: ir.TensorBox, k: int) -> ir.TensorBox:
    if not _has_templates(x):
        return _eager(ops.sparsify, x, k)
    return _sparsify_rows(x, k)


@register_lowering(ops.keep_above, type_promotion_kind=None)
def lower_keep_above(x: ir.TensorBox, threshold: float, relative: bool) -> ir.TensorBox:
    """`reference.keep_above`, said in Inductor's operations."""
    wide = lowerings[prims.convert_element_type.default](x, torch.float32)
    magnitude = lowerings[aten.abs.default](wide)
    lowest: ir.TensorBox | float = threshold
    if relative:
        x.realize()  # the row is read twice
        squares = lowerings[aten.mul.Tensor](wide, wide)
        lowest = lowerings[aten.sqrt.default](lowerings[aten.mean.dim](squares, [-1], True))
        lowest = lowerings[aten.mul.Tensor](lowest, threshold)
    below = lowerings[aten.lt.Tensor if relative else aten.lt.Scalar](magnitude, lowest)
    zero = lowerings[aten.full.default]([], 0, dtype=x.get_dtype(), device=x.get_device_or_error())
    kept: ir.TensorBox = lowerings[aten.where.self](below, zero, x)
    return kept


@register_lowering(ops.sparse_linear, type_promotion_kind=None)
def lower_sparse_linear(x: ir.TensorBox, weight_t: ir.TensorBox, k: int | None) -> ir.TensorBox:
    # the fake op has tied the two sizes; this makes the shared one static again under dynamic shapes
    V.graph.sizevars.check_equals_and_simplify(x.get_size()[1], weight_t.get_size()[0])
    if not _has_templates(x) or has_free_symbols(weight_t.get_size()):
        return _eager(ops.sparse_linear, x, weight_t, k)
    if _has_few_rows(x, k):
        return _gemv(x, weight_t, k)
    kept = _selected(x, k)
    if _has_gemm(x) and not _is_output_major(weight_t):
        inputs = [_contiguous(kept), _contiguous(weight_t)]
        layout = ir.FixedLayout(x.get_device_or_error(), x.get_dtype(), [x.get_size()[0], weight_t.get_size()[1]])
        return output_of(GemmTemplate(inputs, layout, parallel_num_threads()))
    return _mm(kept, weight_t, x.get_dtype() if _is_output_major(weight_t) else _mm_dtype(x))


@register_lowering(ops.sparse_linear_packed, type_promotion_kind=None)
def lower_sparse_linear_packed(
    x: ir.TensorBox, packed: ir.TensorBox, k: int | None, columns: int, form: str
) -> ir.TensorBox:
    if not _has_templates(x) or has_free_symbols(packed.get_size()):
        return _eager(ops.sparse_linear_packed, x, packed, k, columns, form)
    meaning, threads = format_of(form), parallel_num_threads()
    features = meaning.features(int(packed.get_size()[0]))
    stored = _contiguous(packed)
    device, dtype = x.get_device_or_error(), x.get_dtype()
    if not _has_few_rows(x, k):
        if not _on_cpu(x):
            return lower_sparse_linear(x, triton_unpack.unpack(stored, features, columns, dtype, meaning), k)
        if _has_gemm(x):
            layout = ir.FixedLayout(device, dtype, [x.get_size()[0], columns])
            return output_of(PackedGemmTemplate([_contiguous(_selected(x, k)), stored], layout, threads, meaning))
        layout = ir.FixedLayout(device, _mm_dtype(x), [features, columns])
        return _mm(_selected(x, k), output_of(UnpackTemplate(stored, layout, threads, meaning)), layout.dtype)
    if not _on_cpu(x):
        return triton_lowering.packed_gemv(x, stored, k, columns, meaning)
    layout = ir.FixedLayout(device, dtype, [int(x.get_size()[0]), columns])
    threads = heuristics.gemv_threads(meaning.bytes_read(k or features, features, columns), threads)
    return output_of(PackedGemvTemplate([realize_inputs(x), stored], layout, threads, k, meaning))


@register_lowering(ops.attend, type_promotion_kind=None)
def lower_attend(
    query: ir.TensorBox, key: ir.TensorBox, values: ir.TensorBox, mask: ir.TensorBox | None, scale: float
) -> ir.TensorBox:
    rows, width = query.get_size()
    batch, groups = key.get_size()[:2]
    sharing = V.graph.sizevars.simplify(rows // (batch * groups))
    widths = [width, values.get_size()[3]]
    if not _has_templates(query) or not _on_cpu(query) or has_free_symbols([sharing, *widths]):
        return _eager(ops.attend, query, key, values, mask, scale)
    sizes = [*key.get_size(), *values.get_size()]
    cached = (math.prod(sizes[:4]) + math.prod(sizes[4:])) * key.get_dtype().itemsize
    if not has_free_symbols(sizes) and cached < heuristics.MIN_ATTENTION_BYTES:
        return spelled_out(query, key, values, mask, scale)
    inputs: list[ir.IRNode] = [realize_inputs(query), *(_rows_of_runs(tensor) for tensor in (key, values))]
    if mask is not None:
        inputs.append(realize_inputs(mask))
    layout = ir.FixedLayout(query.get_device_or_error(), query.get_dtype(), [rows, values.get_size()[3]])
    return output_of(AttendTemplate(inputs, layout, parallel_num_threads(), scale, int(sharing)))


def _rows_of_runs(x: ir.TensorBox) -> ir.IRNode:
    """In memory, with entries of the last dimension side by side."""
    x = realize_inputs(x)
    stride = x.maybe_get_stride()
    return x if stride is not None and stride[-1] == 1 else _contiguous(x)
