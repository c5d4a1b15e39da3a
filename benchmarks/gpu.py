"""What a real GPU does: correctness first, then its bandwidth, single products, and decoding. Under 10 minutes.

Products go over copies of their weight that no cache holds, inside one CUDA graph. Decoding is greedy, one sequence,
through a static cache: torch.compile's reduce-overhead and larosa's take turns. Medians; every dense baseline is of the
same run.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
import larosa_compile.kernels.lowering
from benchmarks import measure, shapes
from benchmarks.decoding import Variant, random_ids
from larosa_compile.backend import larosa
from larosa_compile.decoding import compare
from larosa_compile.kernels import ops, reference
from larosa_compile.kernels.formats import FORMATS, pack, unpack
from larosa_compile.passes.plan import kept_features

NO_GPU = "no GPU: benchmarks.gpu measures on one; benchmarks.gpu_offline compiles for GPUs that are not there"
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.75)
READ_BYTES = 2**30
"""Larger than any GPU's cache by far."""

CONTEXT = 64
"""Tokens of the prompt."""

Bench = Callable[[Callable[[], object]], float]
"""Median milliseconds of a call."""

out = Console(width=None if sys.stdout.isatty() else 130, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    from triton.testing import do_bench

    def bench(call: Callable[[], object]) -> float:
        return float(do_bench(call, return_mode="median"))

    device = torch.device("cuda")
    meta = measure.machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    with torch.no_grad():
        check(device)
        meta["gpu_bandwidth_gb_s"] = bandwidth_gb_s(device, bench)
        out.print(f"{meta['gpu']}: reads {meta['gpu_bandwidth_gb_s']:.0f} GB/s; results are right")
        records = []
        for size in shapes.SHAPES[arguments.shape].products.values():
            records += product_records(size, device, bench, recorded)
            measure.write_so_far(arguments.json, meta, records)
        out.print(product_table(records))
        model = shapes.build(arguments.shape, arguments.layers).to(device)
        decoded = decode_records(
            model, variants_of(model, device, "reduce-overhead"), device, arguments.tokens, arguments.rounds
        )
        measure.write_so_far(arguments.json, meta, [*records, *decoded])
        for record in decoded:
            out.print(f"{record['variant']} {record['sparsity']:.0%}: {record['tokens_per_s']:.1f} tokens/s")


def check(device: torch.device) -> None:
    """Raises AssertionError where a kernel on this device does not give what the reference gives."""
    from tests.support.products import assert_is_product, special_rows

    for dtype in reference.MAGNITUDE_VIEWS:
        for features, columns in ((101, 333), (1500, 70)):
            compiled = torch.compile(lambda x, w: (ops.sparse_linear(x, w, 40), ops.sparsify(x, 40)), dynamic=False)
            weight_t = torch.randn(features, columns).to(dtype)
            for row in special_rows(features, dtype).values():
                product, kept = compiled(row.to(device), weight_t.to(device))
                assert_is_product(product.cpu(), row, weight_t, 40)
                torch.testing.assert_close(kept.cpu(), reference.sparsify(row, 40), rtol=0, atol=0, equal_nan=True)
        for form in FORMATS.values():
            packed, x = pack(torch.randn(1100, 333), form), torch.randn(1, 1100).to(dtype)
            read_packed = torch.compile(ops.sparse_linear_packed, dynamic=False)
            for k in (350, 1100):
                product = read_packed(x.to(device), packed.to(device), k, 333, form.name)
                assert_is_product(product.cpu(), x, unpack(packed, 1100, 333, form), k)
    torch._dynamo.reset()


def bandwidth_gb_s(device: torch.device, bench: Bench) -> float:
    """Of reading a buffer larger than the cache, in 10⁹ bytes per second."""
    buffer = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / bench(buffer.sum) / 1e6


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as one CUDA graph: calls from Python would take longer than what they launch."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def product_records(
    size: tuple[int, int],
    device: torch.device,
    bench: Bench,
    record: Callable[[Callable[[], object]], Callable[[], object]],
    weight_bytes: int = READ_BYTES,
) -> list[dict[str, Any]]:
    """A record per sparsity of one product [in, out] in bfloat16, as those of `benchmarks.kernels`."""
    features, columns = size
    count = -(-weight_bytes // (2 * features * columns))
    x = torch.randn(1, features, device=device).bfloat16()
    weights = [torch.randn(features, columns, device=device).bfloat16() for _ in range(count)]

    def microseconds(product: Callable[[Tensor], Tensor]) -> float:
        return bench(record(lambda: [product(weight) for weight in weights])) / count * 1e3

    dense_us = microseconds(lambda weight: x @ weight)
    records = []
    for sparsity in SPARSITIES:
        k = kept_features(sparsity, features)
        torch._dynamo.reset()
        compiled = torch.compile(ops.sparse_linear, dynamic=False)
        us = microseconds(lambda weight, run=compiled, k=k: run(x, weight, k))  # type: ignore[misc]
        records.append(
            {
                "shape": [features, columns],
                "dtype": "bf16",
                "sparsity": sparsity,
                "rows": 1,
                "us_median": us,
                "gb_per_s": 2 * k * columns / us / 1e3,
                "dense_us_median": dense_us,
                "ratio": dense_us / us,
            }
        )
    return records


def variants_of(model: PreTrainedModel, device: torch.device, mode: str | None) -> dict[tuple[str, float], Any]:
    """(Name, sparsity) -> the model, to be called as that variant: torch.compile's, and larosa at two sparsities."""
    recipe = larosa_compile.calibrate(model, [random_ids(model, 256, seed=1).to(device)], sparsity=0.5)
    variants: dict[tuple[str, float], Any] = {("inductor", 0.0): torch.compile(model, mode=mode)}
    for sparsity in (0.4, 0.5):
        # torch.compile takes a mode or options, larosa both
        backend = functools.partial(larosa, options={"recipe": recipe.with_sparsity(sparsity)}, mode=mode)
        variants["larosa", sparsity] = torch.compile(model, backend=backend)
    return variants


def decode_records(
    model: PreTrainedModel, variants: dict[tuple[str, float], Any], device: torch.device, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Tokens per second of variants that take turns; the median leaves out tokens that record a CUDA graph."""
    labelled = {str(Variant(*key)): forward for key, forward in variants.items()}
    found = compare(model, labelled, random_ids(model, CONTEXT, seed=2).to(device), tokens, rounds)
    spreads = {key: found[str(Variant(*key))][1] for key in variants}
    return [
        {
            "variant": name,
            "sparsity": sparsity,
            "tokens_per_s": 1 / spread.median,
            "spread": [1 / spread.maximum, 1 / spread.minimum],
            "layers": model.config.num_hidden_layers,
        }
        for (name, sparsity), spread in spreads.items()
    ]


def product_table(records: list[dict[str, Any]]) -> Table:
    made = Table(title="sparse_linear, bf16, one row; medians")
    for column in ("in x out", "dropped", "us", "GB/s", "dense us", "ratio"):
        made.add_column(column, justify="right", no_wrap=True)
    for record in records:
        made.add_row(
            "{}x{}".format(*record["shape"]),
            f"{record['sparsity']:.0%}",
            f"{record['us_median']:.1f}",
            f"{record['gb_per_s']:.0f}",
            f"{record['dense_us_median']:.1f}",
            f"{record['ratio']:.2f}x",
        )
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four layers, fewer tokens and rounds")
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="llama-7b")
    parser.add_argument("--layers", type=measure.positive, help="cut the model to this depth")
    parser.add_argument("--tokens", type=measure.positive, help="decoded and timed in a round")
    parser.add_argument("--rounds", type=measure.positive, help="turns of every variant")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    arguments = parser.parse_args(argv)
    arguments.layers = arguments.layers or (4 if arguments.quick else None)
    arguments.tokens = arguments.tokens or (32 if arguments.quick else 64)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    return arguments


if __name__ == "__main__":
    main()
