"""GPU kernels of a decoder layer, generated and compiled for GPUs that are not there. No GPU is timed.

Inductor generates the layer's program for an H100, with weights in the model's dtype and in every packed format (the
adapter keeps the model's dtype, as in a model); every kernel is compiled offline for every target, and its machine
code is read: registers, spills, shared memory, instructions, width of the loads. Launches are counted in the program.
Times come from the formula in `benchmarks.gpu_model`, whose assumptions are printed; ratios are to a dense bfloat16
layer under the same assumptions. Attention and its cache are left out of everything.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import larosa_compile.kernels.lowering  # noqa: F401  (registers the lowerings of larosa:: ops)
from benchmarks import gpu_model, measure
from benchmarks.gpu_model import DEVICES, GPU_SHAPES, PUBLISHED, Assumptions
from benchmarks.shapes import Shape
from larosa_compile.kernels import ops
from larosa_compile.kernels.formats import FORMATS, PACKED_DTYPE, UNSORTED, WeightFormat
from larosa_compile.passes.plan import kept_features
from larosa_compile.progress import progress_bar
from larosa_compile.recipe_checks import OWN_DTYPE

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.75)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WANTED = 1.6
"""The ratio at half the bytes that this design has to reach."""

out = Console(width=None if sys.stdout.isatty() else 130, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    if importlib.util.find_spec("triton") is None:
        sys.exit("benchmarks.gpu_offline needs Triton: pip install 'larosa-compile[dev]'")
    meta = measure.machine() | {"timed": "no GPU was timed", "assumptions": Assumptions().lines()}
    out.print("No GPU was timed: machine code is compiled and read, times are a formula's.")
    out.print(f"time = {gpu_model.TIME} per layer, with {'; '.join(Assumptions().lines())}")
    for name, device in DEVICES.items():
        out.print(f"{name}: {device.name}, {device.gb_per_s:.0f} GB/s, {device.mhz:.0f} MHz")
    records: list[dict[str, Any]] = []
    cases = [(shape, dtype) for shape in arguments.shapes for dtype in arguments.dtypes]
    with progress_bar(True) as bar:
        task = bar.add_task("kernels", total=len(cases))
        for shape, dtype in cases:
            compiled = kernel_records(shape, dtype, arguments.targets)
            layers = layer_records(shape, compiled, arguments.targets) if dtype == "bf16" else []
            forms = FORMATS if dtype == "bf16" else ()
            packed = {form: kernel_records(shape, dtype, arguments.targets, form) for form in forms}
            records += [*compiled, *layers, *(record for some in packed.values() for record in some)]
            measure.write_so_far(arguments.json, meta, records)
            for form, some in ({OWN_DTYPE: compiled} | packed).items():
                out.print(kernel_table(shape, dtype if form == OWN_DTYPE else f"{dtype}, {form} weights", some))
            for target in dict.fromkeys(record["target"] for record in layers):
                out.print(layer_table(shape, [record for record in layers if record["target"] == target]))
            bar.advance(task)
    for line in PUBLISHED:
        out.print(f"published: {line}")


def layer(
    x: Tensor,
    norm: Tensor,
    qkv: Tensor,
    o: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *adapter: Tensor,
    shape: Shape,
    sparsity: float,
    weights: str,
) -> tuple[Tensor, Tensor]:
    """A layer's kernels in the order of a model, a slice in the place of attention; with the norm of the next layer."""

    def sparse(row: Tensor, weight_t: Tensor, name: str) -> Tensor:
        kept = kept_features(sparsity, row.shape[1])
        if weights == OWN_DTYPE:
            return ops.sparse_linear(row, weight_t, kept)
        return ops.sparse_linear_packed(row, weight_t, kept, shape.products[name][1], form_of(name, weights).name)

    def normed(row: Tensor) -> Tensor:
        return F.rms_norm(row, (row.shape[-1],), norm)

    attended = torch.tanh(torch.narrow(sparse(normed(x), qkv, "qkv"), 1, 0, shape.products["o"][0]))
    x = x + sparse(attended, o, "o")
    gate, up = sparse(normed(x), gate_up, "gate_up").chunk(2, 1)
    written = sparse(F.silu(gate) * up, down, "down")
    # the skip path changes its basis between layers; where they share one it does not
    x = written + (ops.sparse_linear(x, adapter[0], x.shape[1]) if adapter else x)
    return x, normed(x)


KERNELS = ("norm and threshold", "qkv", "threshold", "o", "norm and threshold", "gate and up", "gate and threshold")
"""Of a layer, as they are launched; then down and, unless layers share a basis, the adapter, in either order."""


def form_of(product: str, weights: str) -> WeightFormat:
    """The format of a product's weight; what reads no stream has no sorted features."""
    return FORMATS[weights] if product in ("qkv", "gate_up") else UNSORTED


def layer_program(
    shape: Shape, dtype: torch.dtype, adapter: bool, sparsity: float = 0.5, weights: str = OWN_DTYPE
) -> Any:
    """The program of a layer and of the norm behind it, generated for an H100. weights: the format of its products."""
    from tests.support.gpu_programs import fake_inputs, generate

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    products = [
        empty(*size) if weights == OWN_DTYPE else empty(*form_of(name, weights).shape(*size), dtype=PACKED_DTYPE)
        for name, size in shape.products.items()
    ]
    extra = [empty(shape.hidden, shape.hidden)] if adapter else []
    inputs = fake_inputs(empty(1, shape.hidden), empty(shape.hidden), *products, *extra)
    return generate(lambda *tensors: layer(*tensors, shape=shape, sparsity=sparsity, weights=weights), inputs)


def launches_per_layer(program: Any) -> int:
    """All but the last, which is the next layer's first."""
    return len(program.launches) - 1


def kernel_records(name: str, dtype: str, targets: Sequence[str], weights: str = OWN_DTYPE) -> list[dict[str, Any]]:
    """A record per kernel of a layer with an adapter, per target."""
    from tests.support.offline import binaries

    program = layer_program(GPU_SHAPES[name], DTYPES[dtype], adapter=True, weights=weights)
    records = []
    for target in targets:
        compiled = {binary.kernel: binary for binary in binaries(program, target)}
        for position, kernel in enumerate(program.launches[:-1]):
            binary = compiled[kernel]
            records.append(
                {
                    "template": KERNELS[position] if position < len(KERNELS) else "down, adapter",
                    "target": target,
                    "dtype": dtype,
                    "weights": weights,
                    "shape": name,
                    "regs": binary.registers,
                    "spills": binary.spills,
                    "shared": binary.shared,
                    "instructions": binary.instructions,
                    "load_bits": max((load.bits for load in binary.loads), default=0),
                    "launches_per_layer": launches_per_layer(program),
                }
            )
    return records


def layer_records(name: str, compiled: list[dict[str, Any]], targets: Sequence[str]) -> list[dict[str, Any]]:
    """A record per target, sparsity and granularity of rotations: bytes, and what the formula makes of them."""
    shape, assumed = GPU_SHAPES[name], Assumptions()
    with_adapter = compiled[0]["launches_per_layer"]
    without = launches_per_layer(layer_program(shape, torch.bfloat16, adapter=False))
    records = []
    for target in targets:
        device = DEVICES[target]
        dense = gpu_model.dense_terms(shape, device, assumed)
        for rotation in ("model", "auto", "layer"):
            for sparsity in SPARSITIES:
                adapters = gpu_model.adapters_per_layer(shape, sparsity, rotation)
                launches = without + adapters * (with_adapter - without)
                terms = gpu_model.layer_terms(shape, device, assumed, launches, sparsity, adapters)
                records.append(
                    {
                        "template": f"layer, rotation {rotation}",
                        "target": target,
                        "dtype": "bf16",
                        "shape": name,
                        "sparsity": sparsity,
                        "launches_per_layer": launches,
                        "bytes": terms.bytes,
                        "reading_us": terms.reading_us,
                        "launch_us": terms.launch_us,
                        "threshold_us": terms.threshold_us,
                        "model_us": terms.total_us,
                        "dense_bytes": dense.bytes,
                        "dense_model_us": dense.total_us,
                        "ratio": dense.total_us / terms.total_us,
                        "share_for_wanted": gpu_model.break_even_share(terms, dense, WANTED, assumed),
                    }
                )
    return records


def kernel_table(name: str, dtype: str, records: list[dict[str, Any]]) -> Table:
    made = Table(title=f"machine code of a {name} layer, {dtype}")
    columns = ("target", "kernel", "registers", "spills", "shared bytes", "instructions", "widest load, bits")
    for column in columns:
        made.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for record in records:
        fields = ("target", "template", "regs", "spills", "shared", "instructions", "load_bits")
        made.add_row(*(str(record[field]) for field in fields))
    return made


def layer_table(name: str, records: list[dict[str, Any]]) -> Table:
    first = records[0]
    device = DEVICES[first["target"]].name
    dense = (
        f"{first['dense_bytes'] / 1e6:.1f} MB, {gpu_model.DENSE_LAUNCHES} launches, {first['dense_model_us']:.1f} us"
    )
    made = Table(title=f"a {name} layer on {device} by the formula, not timed; dense: {dense}")
    columns = ("rotation", "dropped", "launches", "MB", "reading us", "launch us", "thresholds us", "us", "ratio")
    for column in (*columns, f"share for {WANTED}x"):
        made.add_column(column, justify="right", no_wrap=True)
    for record in records:
        made.add_row(
            record["template"].split()[-1],
            f"{record['sparsity']:.0%}",
            f"{record['launches_per_layer']:.3g}",
            f"{record['bytes'] / 1e6:.1f}",
            f"{record['reading_us']:.1f}",
            f"{record['launch_us']:.1f}",
            f"{record['threshold_us']:.1f}",
            f"{record['model_us']:.1f}",
            f"{record['ratio']:.2f}x",
            "-" if record["share_for_wanted"] is None else f"{record['share_for_wanted']:.2f}",
        )
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="llama-8b in bf16 for the H100")
    parser.add_argument("--shapes", nargs="+", choices=tuple(GPU_SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--targets", nargs="+", choices=tuple(DEVICES))
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every shape")
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or (["llama-8b"] if arguments.quick else list(GPU_SHAPES))
    arguments.dtypes = arguments.dtypes or (["bf16"] if arguments.quick else list(DTYPES))
    arguments.targets = arguments.targets or (["sm_90"] if arguments.quick else list(DEVICES))
    return arguments


if __name__ == "__main__":
    main()
