"""Lowerings of the ops on GPUs.

A row's threshold is made of Inductor's own operations and joins the kernel that makes the row; the product reads it
with the row and the weight. Nothing waits for the device and no shape depends on data, so CUDA graphs can hold it all.
"""

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import autotune_select_algorithm, realize_inputs

from larosa_compile.kernels import triton_heuristics as heuristics
from larosa_compile.kernels.triton_templates import append_gemv, dense_product
from larosa_compile.kernels.triton_threshold import keep_mask, kth_magnitude, normal_threshold

aten, prims = torch.ops.aten, torch.ops.prims


def sparsify(x: ir.TensorBox, k: int) -> ir.TensorBox:
    """x [rows, features] with everything outside each row's Top-K set to zero, by operations that Inductor fuses."""
    x.realize()  # every pass over the row reads it
    zero = lowerings[aten.full.default]([], 0, dtype=x.get_dtype(), device=x.get_device_or_error())
    kept: ir.TensorBox = lowerings[aten.where.self](keep_mask(x, k), x, zero)
    return kept


def sparse_gemv(x: ir.TensorBox, weight_t: ir.TensorBox, k: int | None) -> ir.TensorBox:
    """`sparse_linear` of a few rows: x [rows, in], weight_t [in, out], static sizes; input-major rows are read."""
    row = ir.ExternKernel.require_contiguous(realize_inputs(x))
    weight = ir.ExternKernel.require_contiguous(realize_inputs(weight_t))
    features, columns = map(int, weight_t.get_size())
    rows, dtype, device = int(x.get_size()[0]), x.get_dtype(), x.get_device_or_error()
    inputs: list[ir.IRNode] = [row, weight]
    selects = k is None or k < features
    if k is None:
        # the smallest magnitude bits there are but for those of zero
        smallest = lowerings[aten.full.default]([rows, 1], 1, dtype=torch.int32, device=device)
        inputs.append(realize_inputs(smallest))
    elif selects:
        inputs.append(realize_inputs(kth_magnitude(row, k)))
    processors = DeviceProperties.create(device).multi_processor_count
    tune = config.max_autotune or config.max_autotune_gemm
    configs = heuristics.gemv_configs(features, columns, rows, dtype.itemsize, processors)
    parts = configs[0].parts
    summed = dtype if parts == 1 else torch.float32
    layout = ir.FixedLayout(device, summed, [parts * rows, columns])
    choices: list[ir.ChoiceCaller] = []
    for candidate in configs if tune else configs[:1]:
        append_gemv(choices, inputs, layout, candidate)
    if tune and selects:
        choices.append(dense_product.bind(inputs, layout, parts=parts, dtype=summed))
    product: ir.TensorBox = choices[0].output_node()
    if tune:
        # what Inductor would draw for a threshold keeps any number of entries; its rows are normal
        drawn = {
            2: lambda _: torch.full(
                [rows, 1], normal_threshold(features, k or features // 2, dtype), dtype=torch.int32, device=device
            )
        }
        product, _ = autotune_select_algorithm(
            "larosa_sparse_linear", choices, inputs, layout, input_gen_fns=drawn if selects else None
        )
    return product if parts == 1 else _sum_of_parts(product, parts, rows, columns, dtype)


def _sum_of_parts(product: ir.TensorBox, parts: int, rows: int, columns: int, dtype: torch.dtype) -> ir.TensorBox:
    """[parts * rows, columns] float32 to [rows, columns], added in order by whatever kernel reads the result.

    So a sum in parts needs no further launch, no counter that blocks wait for, and gives the same bits each time.
    """
    apart = lowerings[aten.view.default](product, [parts, rows, columns])
    total = lowerings[aten.sum.dim_IntList](apart, [0])
    result: ir.TensorBox = lowerings[prims.convert_element_type.default](total, dtype)
    return result
