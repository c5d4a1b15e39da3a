"""The Inductor Triton templates of the sparse products. Their sources are in `templates/`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.select_algorithm import ExternKernelChoice, SymbolicGridFn, TritonTemplate

from larosa_compile.kernels.formats import WeightFormat
from larosa_compile.kernels.reference import MAGNITUDE_VIEWS, magnitude_bits
from larosa_compile.kernels.triton_heuristics import GemvConfig

SOURCE = Path(__file__).parent / "templates" / "sparse_gemv.py.jinja"
PACKED_SOURCE = SOURCE.with_name("packed_gemv.py.jinja")


LOAD_BYTES = 16
"""What a thread loads at once."""

WARP_THREADS = 32
"""Of NVIDIA's warps. On AMD, where it is 64, threads add up their sums of one line in two steps."""


@SymbolicGridFn
def _grid(out_rows: Any, columns: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[Any, Any, int]:
    return (cdiv(columns, meta["BLOCK_N"]), out_rows, 1)


sparse_gemv = TritonTemplate(name="larosa_sparse_gemv", grid=_grid, source=SOURCE.read_text(encoding="utf-8"))
packed_gemv = TritonTemplate(name="larosa_packed_gemv", grid=_grid, source=PACKED_SOURCE.read_text(encoding="utf-8"))


def append_gemv(choices: list[ir.ChoiceCaller], inputs: list[ir.IRNode], layout: ir.Layout, config: GemvConfig) -> None:
    """Appends the template for inputs x [rows, features], weight_t [features, columns], and a threshold or none.

    layout: [parts * rows, columns]. threshold: int32 [rows, 1]; without one, nothing is dropped.
    """
    _append(sparse_gemv, choices, inputs, layout, config)


def append_packed_gemv(
    choices: list[ir.ChoiceCaller], inputs: list[ir.IRNode], layout: ir.Layout, config: GemvConfig, form: WeightFormat
) -> None:
    """The same for a packed weight [features, columns] in the place of weight_t."""
    features = int(inputs[0].get_size()[1])
    fine = min(features, form.fine)
    loads = config.block_k * config.block_n * form.bits // 8 // LOAD_BYTES
    passes = max(1, loads // (config.warps * WARP_THREADS))
    constants = {
        "PASSES": passes,
        "CODE_BITS": form.bits,
        "SCALE_LINES": form.scale_lines,
        "FINE": fine,
        "LINES": features + fine,
    }
    _append(packed_gemv, choices, inputs, layout, config, **constants, COLUMNS=int(layout.size[1]))


def _append(
    template: TritonTemplate,
    choices: list[ir.ChoiceCaller],
    inputs: list[ir.IRNode],
    layout: ir.Layout,
    config: GemvConfig,
    **constants: int,
) -> None:
    dtype = inputs[0].get_dtype()
    integer, magnitude = MAGNITUDE_VIEWS[dtype]
    error = template.maybe_append_choice(
        choices,
        input_nodes=tuple(inputs),
        layout=layout,
        num_stages=1,  # the mask is loaded data, so nothing is fetched ahead; programs side by side hide latency
        num_warps=config.warps,
        SELECTS=len(inputs) == 3,
        BITS=f"tl.{integer}".replace("torch.", ""),
        MAGNITUDE=magnitude,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        CHUNK=config.chunk,
        **constants,
    )
    if error is not None:
        raise error


def masked_product(x: Tensor, weight_t: Tensor, threshold: Tensor, *, parts: int, dtype: torch.dtype) -> Tensor:
    """What the template computes, by a dense product that reads all weights: the choice it is tuned against.

    Returns [parts * rows, out] in `dtype`: all of the sum in the first part, zeros in the others.
    """
    kept = torch.where(magnitude_bits(x) >= threshold, x, 0)
    product = (kept @ weight_t).to(dtype)
    return torch.nn.functional.pad(product, (0, 0, 0, (parts - 1) * len(product)))


dense_product = ExternKernelChoice(masked_product, name="larosa_masked_product", has_out_variant=False)
