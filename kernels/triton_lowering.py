"""Lowerings of the ops on GPUs.

A row's threshold is made of Inductor's own operations and joins the kernel that makes the row; the product reads it
with the row and the weight. Nothing waits for the device and no shape depends on data, so CUDA graphs can hold it all.
"""

from collections.abc import Callable

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import autotune_select_algorithm, realize_inputs

from larosa_compile.kernels import triton_heuristics as heuristics
from larosa_compile.kernels.formats import WeightFormat
from larosa_compile.kernels.triton_templates import append_gemv, append_packed_gemv, dense_product
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
    features, columns = map(int, weight_t.get_size())
    dtype = x.get_dtype()
    inputs = _inputs(x, weight_t, k, features)
    configs = heuristics.gemv_configs(features, columns, int(x.get_size()[0]), dtype.itemsize, _processors(x))

    def append(choices: list[ir.ChoiceCaller], layout: ir.Layout, candidate: heuristics.GemvConfig) -> None:
        append_gemv(choices, inputs, layout, candidate)

    def append_dense(choices: list[ir.ChoiceCaller], layout: ir.Layout) -> None:
        if len(inputs) == 3:
            choices.append(dense_product.bind(inputs, layout, parts=configs[0].parts, dtype=layout.dtype))

    return _product(inputs, columns, k, configs, append, append_dense)


def packed_gemv(x: ir.TensorBox, packed: ir.IRNode, k: int | None, columns: int, form: WeightFormat) -> ir.TensorBox:
    """`sparse_linear_packed` of a few rows: x [rows, in], packed the weight [in, columns] in this format."""
    rows, features = map(int, x.get_size())
    inputs = _inputs(x, packed, k, features)
    lines = features + min(features, form.fine)
    configs = heuristics.packed_configs(lines, columns, rows, form, _processors(x))

    def append(choices: list[ir.ChoiceCaller], layout: ir.Layout, candidate: heuristics.GemvConfig) -> None:
        append_packed_gemv(choices, inputs, layout, candidate, form)

    return _product(inputs, columns, k, configs, append)


def _inputs(x: ir.TensorBox, weight: ir.IRNode, k: int | None, features: int) -> list[ir.IRNode]:
    """Row, weight, and the threshold of each row where something is dropped."""
    row = ir.ExternKernel.require_contiguous(realize_inputs(x))
    inputs: list[ir.IRNode] = [row, ir.ExternKernel.require_contiguous(realize_inputs(weight))]
    if k is None:
        # the smallest magnitude bits there are but for those of zero
        smallest = lowerings[aten.full.default](
            [int(x.get_size()[0]), 1], 1, dtype=torch.int32, device=x.get_device_or_error()
        )
        inputs.append(realize_inputs(smallest))
    elif k < features:
        inputs.append(realize_inputs(kth_magnitude(row, k)))
    return inputs


def _processors(x: ir.TensorBox) -> int:
    count: int = DeviceProperties.create(x.get_device_or_error()).multi_processor_count
    return count


def _product(
    inputs: list[ir.IRNode],
    columns: int,
    k: int | None,
    configs: list[heuristics.GemvConfig],
    append: Callable[[list[ir.ChoiceCaller], ir.Layout, heuristics.GemvConfig], None],
    append_others: Callable[[list[ir.ChoiceCaller], ir.Layout], None] = lambda choices, layout: None,
) -> ir.TensorBox:
    """The template in the first configuration, or in what autotuning finds best, that and `append_others` included."""
    rows, features = map(int, inputs[0].get_size())
    dtype, device = inputs[0].get_dtype(), inputs[0].get_device_or_error()
    tune = config.max_autotune or config.max_autotune_gemm
    parts = configs[0].parts
    layout = ir.FixedLayout(device, dtype if parts == 1 else torch.float32, [parts * rows, columns])
    choices: list[ir.ChoiceCaller] = []
    for candidate in configs if tune else configs[:1]:
        append(choices, layout, candidate)
    if tune:
        append_others(choices, layout)
    product: ir.TensorBox = choices[0].output_node()
    if tune:
        # what Inductor would draw for a threshold keeps any number of entries; its rows are normal
        drawn = {
            2: lambda _: torch.full(
                [rows, 1], normal_threshold(features, k or features // 2, dtype), dtype=torch.int32, device=device
            )
        }
        product, _ = autotune_select_algorithm(
            "larosa_sparse_linear", choices, inputs, layout, input_gen_fns=drawn if len(inputs) == 3 else None
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
