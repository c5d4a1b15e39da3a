"""Inductor C++ templates of products of many rows, which meet every weight: nothing is skipped."""

from typing import Any

from torch._inductor import ir
from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa
from torch._inductor.utils import has_free_symbols

from larosa_compile.kernels import heuristics
from larosa_compile.kernels.cpp_templates import FusingTemplate
from larosa_compile.kernels.formats import WeightFormat


def multiplies_pairs() -> bool:
    """Whether generated code may multiply and add pairs of bfloat16 numbers (AVX512_BF16), as these templates do."""
    vectors = pick_vec_isa()
    return isinstance(vectors, VecAVX512) and vectors.is_avx512_bf16_supported()


class GemmTemplate(FusingTemplate):
    """Many rows x [rows, in] times weight_t [in, out], stored input-major and read whole; bfloat16."""

    name = "larosa_gemm"
    file = "gemm.cpp.jinja"
    panel_file = "plain_panel.cpp.jinja"

    def constants(self) -> dict[str, Any]:
        rows, columns = self.layout.size
        return {
            "W": self.input_nodes[1],
            "panel_file": self.panel_file,
            "columns": int(columns),
            "panel": heuristics.PANEL_COLUMNS,
            "depth": heuristics.PANEL_FEATURES,
            "chunk": heuristics.gemm_chunk(None if has_free_symbols([rows]) else int(rows)),
            "block": heuristics.BLOCK_ROWS,
            "step": heuristics.PREFETCHED_FEATURES,
        }


class PackedGemmTemplate(GemmTemplate):
    """The same over a weight in one of `formats.KNOWN`."""

    name = "larosa_packed_gemm"
    panel_file = "packed_panel.cpp.jinja"

    def __init__(self, inputs: list[ir.IRNode], layout: ir.Layout, threads: int, form: WeightFormat) -> None:
        super().__init__(inputs, layout, threads)
        self.form = form

    def constants(self) -> dict[str, Any]:
        fine = min(self.form.fine, int(self.input_nodes[0].get_size()[1]))
        return super().constants() | {"form": self.form, "fine": fine}
