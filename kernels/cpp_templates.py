"""Inductor C++ templates of the ops. The C++ itself is in `templates/`, one file per kernel."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jinja2
import torch
import torch._inductor.lowering  # imported first: starting from codegen.cpp_template is a circular import
from torch._inductor import ir
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.utils import Placeholder
from torch._inductor.virtualized import V, ops

from larosa_compile.kernels import heuristics
from larosa_compile.kernels.formats import WeightFormat

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER), undefined=jinja2.StrictUndefined, autoescape=False
)


@dataclass
class _Store:
    """Where a kernel's result goes, after the pointwise nodes that Inductor fused behind it."""

    result: ir.Buffer  # what the epilogues read, before any of them ran
    target: ir.Buffer  # what the kernel's output pointer writes
    target_2d: ir.IRNode  # `target` seen with the result's [rows, columns]
    epilogues: list[ir.IRNode] = field(default_factory=list)
    reindexers: list[Callable[[list[Any]], list[Any]] | None] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)  # buffers that live only in the kernel's tile


def _plan_store(
    output: ir.Buffer, epilogue_nodes: Sequence[ir.IRNode] | None, has_other_users: bool, dtype: torch.dtype
) -> _Store:
    store = _Store(result=output, target=output, target_2d=output)
    if not epilogue_nodes:
        return store
    if has_other_users:
        # Someone else reads the result itself: a first epilogue stores it, from a buffer of another name.
        raw = ir.Buffer(name=f"{output.get_name()}_raw", layout=output.layout)
        load = raw.make_loader()
        copy = ir.Pointwise(
            device=output.get_device_or_error(),
            dtype=dtype,
            inner_fn=lambda index: ops.to_dtype(load(index), dtype),
            ranges=output.get_size(),
        )
        store.epilogues.append(ir.ComputedBuffer(name=output.get_name(), layout=output.layout, data=copy))
        store.reindexers.append(None)
        store.result = raw
    store.aliases.append(store.result.get_name())
    store.epilogues.extend(epilogue_nodes)
    target = epilogue_nodes[-1]
    assert isinstance(target, ir.Buffer)
    store.target = target
    store.target_2d, store.reindexers = gen_2d_view_of_epilogue_buf(
        target, output, list(epilogue_nodes), store.reindexers, [None] * len(epilogue_nodes)
    )
    return store


class FusingTemplate(CppTemplate):
    """A kernel that makes rows [rows, columns]: renders `file`, and fuses the pointwise nodes that read its result."""

    name: str
    file: str

    def __init__(self, inputs: list[ir.IRNode], layout: ir.Layout, threads: int) -> None:
        super().__init__(self.name, inputs, layout, threads)

    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """What the template file needs beyond the common names."""

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        node: ir.CppTemplateBuffer,
        shared: bool,
        epilogue_nodes: list[ir.IRNode] | None,
    ) -> str:
        """shared: whether something beside the epilogue nodes reads the result."""
        dtype = self.layout.dtype
        store = _plan_store(node, epilogue_nodes, shared, dtype)
        x = self.input_nodes[0]
        names = {
            "template": self,
            "kernel": kernel,
            # C++ helpers carry the kernel's name: with the C++ wrapper all kernels share one file
            "name": f"{kernel.kernel_name}_{self.name}",
            "X": x,
            "Y": store.target,
            "Y_2d": store.target_2d,
            "Out": store.result,
            "epilogues": store.epilogues,
            "reindexers": store.reindexers,
            "aliases": {alias: store.target.get_name() for alias in store.aliases},
            "export_declaration": get_export_declaration(),
            "x_type": DTYPE_TO_CPP[dtype],
            "dtype": dtype,
            "features": int(x.get_size()[1]),
            "threads": self.num_threads,
            **self.constants(),
        }
        with contextlib.ExitStack() as stack:
            if store.result is not node:
                stack.enter_context(patch.object(V.graph, "get_dtype", self._fake_get_dtype(store.result)))
            return _environment.get_template(self.file).render(names)


class RowTemplate(FusingTemplate):
    """A kernel that selects inside a row, k entries of it: all, None for those that are not 0, or the k largest.

    The k of a Top-K is one more input and no part of the source: sites of one shape share a kernel, however many
    sparsities they have, so a model has a handful to compile.
    """

    def __init__(self, inputs: list[ir.IRNode], layout: ir.Layout, threads: int, k: int | None) -> None:
        features = int(inputs[0].get_size()[1])
        self.keeps = "nonzero" if k is None else "all" if k == features else "top-k"
        if self.keeps == "top-k":
            inputs = [*inputs, realize_inputs(V.graph.add_tensor_constant(torch.tensor([k])))]
        super().__init__(inputs, layout, threads)

    def constants(self) -> dict[str, Any]:
        return {
            "keeps": self.keeps,
            "arguments": {"K": self.input_nodes[-1]} if self.keeps == "top-k" else {},
            "bits_type": "int16_t" if self.layout.dtype.itemsize == 2 else "int32_t",
        }


class GemvTemplate(RowTemplate):
    """A few rows x [rows, in] times weight_t [in, out], summed in float32."""

    def constants(self) -> dict[str, Any]:
        columns = int(self.layout.size[1])
        return super().constants() | {
            "W": self.input_nodes[1],
            "weight_type": DTYPE_TO_CPP[self.layout.dtype],
            "rows": int(self.layout.size[0]),
            "columns": columns,
            "tile": heuristics.gemv_tile(columns, self.num_threads),
            "rows_at_a_time": heuristics.WEIGHT_ROWS_AT_A_TIME,
        }


class SparseGemvTemplate(GemvTemplate):
    """The weight stored input-major, one kept row after the other: what no row of x keeps is never read."""

    name = "larosa_sparse_gemv"
    file = "sparse_gemv.cpp.jinja"
    rows_file = "plain_rows.cpp.jinja"
    column_multiple = heuristics.COLUMN_MULTIPLE

    def constants(self) -> dict[str, Any]:
        constants = super().constants()
        columns, rows = constants["columns"], constants["rows"]
        return constants | {
            "rows_file": self.rows_file,
            "fine": 0,
            "parts": self.num_threads,
            "chunk": heuristics.gemv_chunk(columns, rows, self.column_multiple),
            "sums_stride": heuristics.round_up(columns, self.column_multiple),
        }


class PackedGemvTemplate(SparseGemvTemplate):
    """The same over a weight in one of `formats.KNOWN`."""

    name = "larosa_packed_gemv"
    rows_file = "packed_rows.cpp.jinja"

    def __init__(
        self, inputs: list[ir.IRNode], layout: ir.Layout, threads: int, k: int | None, form: WeightFormat
    ) -> None:
        super().__init__(inputs, layout, threads, k)
        self.form = form
        self.column_multiple = max(form.block, heuristics.COLUMN_MULTIPLE)

    def constants(self) -> dict[str, Any]:
        return super().constants() | {
            "form": self.form,
            "fine": min(self.form.fine, int(self.input_nodes[0].get_size()[1])),
            # sums are float32 in memory order, whatever the weights are
            "weight_type": "float",
            # products of bfloat16 numbers are exact only where x is made of them
            "pairs": self.form.bits == 4 and self.layout.dtype == torch.bfloat16,
            # few bits an entry: several of one size are whole numbers of 16 bits
            "short": self.layout.dtype.itemsize == 2,
        }


class DotGemvTemplate(GemvTemplate):
    """One row, the weight stored output-major, as modules keep it, and read whole: one dot product per output."""

    name = "larosa_dot_gemv"
    file = "dot_gemv.cpp.jinja"


class SparsifyTemplate(RowTemplate):
    """x [rows, features] with everything outside each row's Top-K set to zero; rows in parallel."""

    name = "larosa_sparsify"
    file = "sparsify.cpp.jinja"

    def constants(self) -> dict[str, Any]:
        return super().constants() | {"parallel_from": heuristics.MIN_PARALLEL_ENTRIES}


class UnpackTemplate(CppTemplate):
    """A packed weight as a dense one, [features, columns]."""

    name = "larosa_unpack"
    file = "unpack.cpp.jinja"

    def __init__(self, packed: ir.IRNode, layout: ir.Layout, threads: int, form: WeightFormat) -> None:
        super().__init__(self.name, [packed], layout, threads)
        self.form = form

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        node: ir.CppTemplateBuffer,
        shared: bool,
        epilogue_nodes: list[ir.IRNode] | None,
    ) -> str:
        # only products read the result, and they are no pointwise nodes
        assert not epilogue_nodes
        features, columns = map(int, self.layout.size)
        return _environment.get_template(self.file).render(
            template=self,
            kernel=kernel,
            name=f"{kernel.kernel_name}_{self.name}",
            P=self.input_nodes[0],
            Y=node,
            aliases={},
            export_declaration=get_export_declaration(),
            y_type=DTYPE_TO_CPP[self.layout.dtype],
            form=self.form,
            fine=min(self.form.fine, features),
            features=features,
            columns=columns,
            threads=self.num_threads,
        )


def output_of(template: FusingTemplate | UnpackTemplate) -> ir.TensorBox:
    """What a template computes, for the rest of the graph to read.

    Not as one of Inductor's choices: there is no other to choose, and each would be rendered once more, to be tried.
    """

    def kernel_and_render(
        node: ir.CppTemplateBuffer,
        flag_template_buffer_has_other_users: bool,
        epilogue_nodes: list[ir.IRNode] | None = None,
    ) -> tuple[CppTemplateKernel, Callable[[], str]]:
        kernel = CppTemplateKernel(str(Placeholder.KERNEL_NAME), template.num_threads)
        shared = flag_template_buffer_has_other_users
        return kernel, partial(kernel.render, template, node=node, shared=shared, epilogue_nodes=epilogue_nodes)

    inputs: Any = template.input_nodes
    owner: Any = template  # Inductor's annotation names another of its templates
    return ir.TensorBox.create(ir.CppTemplateBuffer(template.layout, inputs, kernel_and_render, owner, choice=None))
