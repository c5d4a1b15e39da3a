"""The sparse product by itself, compiled by Inductor, against the dense product of torch; with `--dtypes int8 int4` its
weights in fewer bits, against a dense product in bfloat16.

Products go over copies of their weight that no cache holds, a call of several distinct ones at a time. All variants
of a shape take turns in one process, and reading a large buffer comes before each of them; medians are over the
turns. `us` is the time of one product. `GB/s` counts the weight rows that are kept, the share is of the buffer's
bandwidth in the same turns. Selection: the same product with hardly any columns, in the caches; these few columns
are part of its time.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.compiler import config as compiler_config

import larosa_compile.kernels.lowering  # noqa: F401  (registers the lowerings of larosa:: ops)
from benchmarks import measure
from benchmarks.shapes import SHAPES
from larosa_compile.decoding import Spread
from larosa_compile.kernels import ops
from larosa_compile.kernels.digest import source_digest
from larosa_compile.kernels.formats import FORMATS, PACKED_DTYPE, WeightFormat, pack
from larosa_compile.machine import READ_BYTES, Bandwidth
from larosa_compile.memory import use_huge_pages
from larosa_compile.passes.plan import kept_features
from larosa_compile.progress import progress_bar

Size = tuple[int, int]
Run = Callable[[], object]

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32} | dict.fromkeys(FORMATS, torch.bfloat16)
"""Of weights -> of activations, and of the dense product's weights: formats of fewer bits have no dense product."""
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.75, 0.9)
QUICK_SPARSITIES = (0.25, 0.4, 0.5)
SQUARE: Size = (4096, 4096)
ODD: tuple[Size, ...] = ((577, 1023), (2049, 3071))
"""Sizes that are no multiple of anything a kernel works in."""

SELECTION_COLUMNS = 32
SELECTION_PRODUCTS = 32
MAX_PRODUCTS = 16
"""In one compiled call: what a call costs beside its products is shared by them, what it takes to compile is not."""

ALIGNMENT = 64

out = Console(width=None if sys.stdout.isatty() else 130, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(f"{meta['device']}, {meta['threads']} threads, torch {meta['torch']}, {', '.join(meta['cpu_flags'])}")
    records: list[dict[str, Any]] = []
    cases = list(itertools.product(arguments.dtypes, arguments.rows, arguments.shapes))
    with torch.no_grad(), progress_bar(True) as bar:
        task = bar.add_task("kernels", total=len(cases))
        for dtype, rows, size in cases:
            start = time.perf_counter()
            records += measured(size, dtype, arguments.sparsities, rows, arguments.rounds)
            measure.write_so_far(arguments.json, meta, records)
            if bar.disable:
                out.print(f"{size[0]}x{size[1]} {dtype}, {rows} row(s): {time.perf_counter() - start:.0f} s")
            bar.advance(task)
    for dtype, rows in itertools.product(arguments.dtypes, arguments.rows):
        out.print(table(dtype, rows, [r for r in records if (r["dtype"], r["rows"]) == (dtype, rows)]))


def measured(
    size: Size,
    dtype: str,
    sparsities: Sequence[float],
    rows: int,
    rounds: int,
    weight_bytes: int = READ_BYTES,
) -> list[dict[str, Any]]:
    """A record per sparsity. `weight_bytes`: what the copies of the weight take at least."""
    features, columns = size
    torch_dtype, form = DTYPES[dtype], FORMATS.get(dtype)
    kept = {sparsity: kept_features(sparsity, features) for sparsity in sparsities}
    weights = copies(size, torch_dtype, weight_bytes)
    stored = weights if form is None else packed_copies(size, form, weight_bytes)
    few = (features, SELECTION_COLUMNS)
    narrow = (copies(few, torch_dtype) if form is None else packed_copies(few, form)) * SELECTION_PRODUCTS
    x = [torch.randn(rows, features).to(torch_dtype) for _ in range(max(MAX_PRODUCTS, SELECTION_PRODUCTS))]

    runs: dict[tuple[str, float], Run] = {("dense", 0.0): _dense(x, in_calls(weights))}
    counts = {("dense", 0.0): len(weights)}
    for sparsity, k in kept.items():
        runs["sparse", sparsity] = _sparse(x, in_calls(stored), Product(k, columns, form))
        counts["sparse", sparsity] = len(stored)
        runs["selection", sparsity] = _sparse(x, [narrow], Product(k, SELECTION_COLUMNS, form))
        counts["selection", sparsity] = len(narrow)
    seconds, bandwidth = take_turns(runs, rounds)

    spreads = {key: Spread.of([value / counts[key] * 1e6 for value in values]) for key, values in seconds.items()}
    dense, itemsize = spreads["dense", 0.0].median, torch_dtype.itemsize
    records = []
    for sparsity, k in kept.items():
        sparse, selection = spreads["sparse", sparsity], spreads["selection", sparsity].median
        read = k * columns * itemsize if form is None else form.bytes_read(k, features, columns)
        gb_per_s = read / sparse.median / 1e3
        records.append(
            {
                "shape": [features, columns],
                "dtype": dtype,
                "sparsity": sparsity,
                "rows": rows,
                "us_median": sparse.median,
                "us_min": sparse.minimum,
                "us_max": sparse.maximum,
                "gb_per_s": gb_per_s,
                "bandwidth_share": gb_per_s / bandwidth.median,
                "dense_us_median": dense,
                "dense_gb_per_s": features * columns * itemsize / dense / 1e3,
                "ratio": dense / sparse.median,
                "selection_us": selection,
                "selection_share": selection / sparse.median,
                "bandwidth_gb_s": bandwidth.median,
            }
        )
    return records


def copies(size: Size, dtype: torch.dtype, total: int = 1) -> list[Tensor]:
    """Distinct weights of one size that take `total` bytes together, or more; of several calls each is whole."""
    each = size[0] * size[1]
    count = -(-total // (each * dtype.itemsize))
    if count > MAX_PRODUCTS:
        count = -(-count // MAX_PRODUCTS) * MAX_PRODUCTS
    unit = ALIGNMENT // dtype.itemsize  # Inductor copies an input that is not aligned before it reads it
    stride = -(-each // unit) * unit
    memory = torch.empty(count * stride, dtype=dtype)
    drawn = torch.randn(min(2**20 + 7, len(memory))).to(dtype)
    for start in range(0, len(memory), len(drawn)):
        part = memory[start : start + len(drawn)]
        part.copy_(drawn[: len(part)])
    use_huge_pages([memory])  # as folded weights are
    return [memory[index * stride :][:each].view(size) for index in range(count)]


def packed_copies(size: Size, form: WeightFormat, total: int = 1) -> list[Tensor]:
    """The same of packed weights, all of one weight's codes."""
    packed = pack(torch.randn(size), form)
    made = copies(form.shape(*size), PACKED_DTYPE, total)
    for weight in made:
        weight.copy_(packed)
    return made


def in_calls(weights: list[Tensor]) -> list[list[Tensor]]:
    """Weights of the products of each compiled call."""
    products = min(len(weights), MAX_PRODUCTS)
    return [weights[start : start + products] for start in range(0, len(weights), products)]


@dataclass(frozen=True)
class Product:
    """A sparse product of one row: `k` features kept, `columns` outputs, weights plain or in a format."""

    k: int
    columns: int
    form: WeightFormat | None

    def call(self, graph: torch.fx.Graph, x: torch.fx.Node, weight: torch.fx.Node) -> torch.fx.Node:
        if self.form is None:
            return graph.call_function(ops.sparse_linear, (x, weight, self.k))
        return graph.call_function(ops.sparse_linear_packed, (x, weight, self.k, self.columns, self.form.name))


def take_turns(runs: dict[tuple[str, float], Run], rounds: int) -> tuple[dict[tuple[str, float], list[float]], Spread]:
    """Seconds of every run in every round, and the bandwidth met in these rounds."""
    bandwidth = Bandwidth()
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for key, run in runs.items():
            if key[0] == "selection":
                run()  # what it works on has just been computed, so it is in a cache
            else:
                bandwidth.sample()
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
        if turn == 0:
            bandwidth.taken()
    return {key: values[1:] for key, values in seconds.items()}, bandwidth.taken()


def _compiled(product: Product, pairs: list[tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Products as one graph, by Inductor alone: Dynamo's guards on every weight would be timed with them."""
    graph = torch.fx.Graph()
    inputs = [(graph.placeholder(f"x{index}"), graph.placeholder(f"w{index}")) for index in range(len(pairs))]
    graph.output(tuple(product.call(graph, x, weight) for x, weight in inputs))
    module = torch.fx.GraphModule({}, graph)
    examples: list[Any] = [tensor for pair in pairs for tensor in pair]
    # Inductor's cache knows neither our templates nor our lowerings; with their digest in its key it does
    tag = f"larosa-{source_digest()}"
    with compiler_config.patch(cache_key_tag=tag), functorch_config.patch(enable_autograd_cache=False):  # type: ignore[attr-defined]
        compiled: Callable[..., Any] = torch._inductor.compile(module, examples)
    return compiled


def _sparse(x: list[Tensor], calls: list[list[Tensor]], product: Product) -> Run:
    compiled = _compiled(product, list(zip(x, calls[0], strict=False)))
    inputs = [[tensor for pair in zip(x, weights, strict=False) for tensor in pair] for weights in calls]
    return lambda: [compiled(*tensors) for tensors in inputs]


def _dense(x: list[Tensor], calls: list[list[Tensor]]) -> Run:
    # the same memory as the sparse ones', seen as [out, in]: by its turn nothing of it is in a cache
    pairs = [
        (row, weight.view(-1).view(weight.shape[1], weight.shape[0]))
        for weights in calls
        for row, weight in zip(x, weights, strict=False)
    ]
    return lambda: [F.linear(row, weight) for row, weight in pairs]


def table(dtype: str, rows: int, records: list[dict[str, Any]]) -> Table:
    """The records of one dtype and number of rows."""
    made = Table(title=f"sparse_linear, {dtype}, {rows} row(s); us: median (min, max)")
    columns = ("in x out", "dropped", "us", "GB/s", "of bandwidth", "dense us", "dense GB/s", "ratio", "selection us")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for record in records:
        made.add_row(
            "{}x{}".format(*record["shape"]),
            f"{record['sparsity']:.0%}",
            f"{record['us_median']:.1f} ({record['us_min']:.1f}, {record['us_max']:.1f})",
            f"{record['gb_per_s']:.1f}",
            f"{record['bandwidth_share']:.0%}",
            f"{record['dense_us_median']:.1f}",
            f"{record['dense_gb_per_s']:.1f}",
            f"{record['ratio']:.2f}x",
            f"{record['selection_us']:.1f} ({record['selection_share']:.0%})",
        )
    return made


def sizes(text: str) -> list[Size]:
    """`4096x4096,llama-1b` -> (in, out) of each product; for argparse."""
    found: list[Size] = []
    for part in text.split(","):
        numbers = part.split("x")
        if part in SHAPES:
            found += SHAPES[part].products.values()
        elif len(numbers) == 2 and all(number.isdecimal() and int(number) for number in numbers):
            found.append((int(numbers[0]), int(numbers[1])))
        else:
            raise argparse.ArgumentTypeError(f"a shape is INxOUT or one of {', '.join(SHAPES)}; got {part!r}")
    return found


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in; `shapes` becomes a list of sizes, each once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model's shapes, bf16, three sparsities")
    parser.add_argument("--shapes", type=sizes, help="INxOUT or model shapes, with commas between")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--sparsities", nargs="+", type=measure.sparsity)
    parser.add_argument("--rows", nargs="+", type=measure.positive, default=[1], help="rows of x (default: 1)")
    parser.add_argument("--rounds", type=measure.positive, help="turns of every variant")
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every shape")
    arguments = parser.parse_args(argv)
    models = ["llama-1b"] if arguments.quick else list(SHAPES)
    known = [SQUARE, *(size for name in models for size in SHAPES[name].products.values())]
    arguments.shapes = list(dict.fromkeys(arguments.shapes or (known if arguments.quick else [*known, *ODD])))
    arguments.dtypes = arguments.dtypes or (["bf16"] if arguments.quick else list(DTYPES))
    arguments.sparsities = arguments.sparsities or list(QUICK_SPARSITIES if arguments.quick else SPARSITIES)
    arguments.rounds = arguments.rounds or (10 if arguments.quick else 20)
    return arguments


if __name__ == "__main__":
    main()
