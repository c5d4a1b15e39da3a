"""How exactly weights have to be folded: `python -m benchmarks.folding [--quick] [--json FILE]`.

A bfloat16 model with its weights folded and nothing dropped, against itself in float32, by how many features' rotations
are multiplied in both halves (`passes/products.py`): all, one in eight as the package does, none. ± is the standard
error over tokens of the paired difference to all.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import larosa_compile
from benchmarks import assets, edited, measure
from benchmarks.edited import Edited
from benchmarks.windows import paired
from larosa_compile import registry
from larosa_compile.passes import products
from larosa_compile.recipe import Recipe

WAYS = {"all": 1, "as the package": products.ONE_IN, "none": sys.maxsize}
"""Name -> one of how many features has both halves."""

out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(measure.in_a_line(meta))
    exact, tokenizer = assets.load_model(arguments.model, torch.float32)
    learnt, evaluated = edited.windows_for(arguments, tokenizer)
    held_out = evaluated[edited.WIKI]
    wanted = [logits(exact, ids) for ids in held_out]
    recipe = larosa_compile.calibrate(exact, learnt, sparsity=0.0)
    del exact
    found = measured(arguments.model, recipe, held_out, wanted)
    records = measure.recorded(arguments.json, meta, edited.described(arguments), found)
    out.print(table(records))


def measured(
    name: str, recipe: Recipe, held_out: Sequence[Tensor], wanted: Sequence[Tensor]
) -> Iterator[dict[str, Any]]:
    """A record for the dense model and for every way of folding it."""
    model, _ = assets.load_model(name, torch.bfloat16)
    yield {"folded": "not", "divergence": statistics.mean(divergences(model, held_out, wanted))}
    all_of_them: list[float] = []
    shipped = products.ONE_IN
    try:
        for way, products.ONE_IN in WAYS.items():
            model, _ = assets.load_model(name, torch.bfloat16)  # anew: of the same parameters nothing is folded twice
            folded = Edited(model, recipe)
            start = time.perf_counter()
            with torch.no_grad():
                folded(input_ids=held_out[0][:, :1], use_cache=False)
            seconds = time.perf_counter() - start
            found = divergences(folded, held_out, wanted)
            registry.drop_graphs()
            all_of_them = all_of_them or found
            over, error = paired(found, all_of_them)
            mean = statistics.mean(found)
            yield {"folded": way, "divergence": mean, "over_all": over, "over_all_error": error, "seconds": seconds}
    finally:
        products.ONE_IN = shipped


def divergences(model: Callable[..., Any], held_out: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """`KL(exact ‖ model)` of every token, nats. wanted: the exact model's logits [tokens, vocabulary] by window."""
    found: list[float] = []
    for ids, exact in zip(held_out, wanted, strict=True):
        other = logits(model, ids).log_softmax(-1)
        found += (exact.softmax(-1) * (exact.log_softmax(-1) - other)).sum(-1).tolist()
    return found


def logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Of one window, float32 [tokens, vocabulary]."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return found.float()


def table(records: list[dict[str, Any]]) -> Table:
    made = Table(title=f"{records[0]['model']}, nothing dropped, against float32")
    for name in ("both halves", "divergence, nats", "over all", "first call, s"):
        made.add_column(name, justify="left" if name == "both halves" else "right")
    for record in records:
        cells = ["", ""]
        if "over_all" in record:
            over = f"{record['over_all']:+.6f} ± {record['over_all_error']:.6f}"
            cells = [over, f"{record['seconds']:.1f}"]
        made.add_row(record["folded"] if cells[0] else "dense", f"{record['divergence']:.6f}", *cells)
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    return edited.parsed(edited.argument_parser(__doc__, "two windows, calibrated on four"), argv)


if __name__ == "__main__":
    main()
