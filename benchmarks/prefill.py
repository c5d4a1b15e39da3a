"""Reading a prompt: one forward pass over many tokens, larosa against torch.compile, which is dense.

larosa selects the same activations for every token, but a prompt's tokens together meet every weight: what is measured
is what the folded weights, as decoding reads them, and the residual adapters cost. Variants take turns in one process;
logits are those of the last token.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import StaticCache

from benchmarks import decoding, measure, shapes
from benchmarks.decoding import VARIANTS, Subject, Variant
from larosa_compile.caches import CACHE
from larosa_compile.decoding import Forward, Spread
from larosa_compile.progress import progress_bar

out = Console(width=None if sys.stdout.isatty() else 130, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(f"{meta['device']}, {meta['threads']} threads, torch {meta['torch']}")
    subject = Subject.prepared(arguments.shape, arguments.layers, arguments.tokens, calibrated=True, windows=4)
    chosen = itertools.product(arguments.variants, arguments.sparsities)
    variants = [Variant("inductor"), *(Variant(name, sparsity) for name, sparsity in chosen)]
    records: list[dict[str, Any]] = []
    with progress_bar(True) as bar:
        task = bar.add_task(subject.name, total=len(arguments.tokens) * len(variants) * (arguments.rounds + 1))
        for tokens in arguments.tokens:
            records += measured(subject, tokens, variants, arguments.rounds, lambda: bar.advance(task))
            decoding.forget_compiled()
            measure.write_so_far(arguments.json, meta, records)
    out.print(table(records))


def measured(
    subject: Subject, tokens: int, variants: Sequence[Variant], rounds: int, done: Callable[[], object]
) -> list[dict[str, Any]]:
    """A record per variant for the prompt of `tokens`; `done` is called after every pass."""
    ids, empty = subject.prompts[tokens], StaticCache(config=subject.model.config, max_cache_len=tokens)
    forwards = [variant.forward(subject.model, subject.recipe) for variant in variants]
    seconds: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds + 1):
        for forward, taken in zip(forwards, seconds, strict=True):
            taken.append(_seconds(forward, ids, copy.deepcopy(empty)))
            done()
    # the first pass compiles
    spreads = [Spread.of(taken[1:]) for taken in seconds]
    return [
        {
            "model": subject.name,
            "layers": subject.layers,
            "variant": variant.name,
            "sparsity": variant.sparsity,
            "tokens": tokens,
            "ms": spread.median * 1e3,
            "spread": [spread.minimum * 1e3, spread.maximum * 1e3],
            "vs_first": spreads[0].median / spread.median,
        }
        for variant, spread in zip(variants, spreads, strict=True)
    ]


def _seconds(forward: Forward, ids: torch.Tensor, cache: StaticCache) -> float:
    with torch.no_grad():
        start = time.perf_counter()
        forward(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


def table(records: list[dict[str, Any]]) -> Table:
    """A row per prompt length and variant."""
    first = records[0]
    made = Table(title=f"{first['model']}, {first['layers']} layers, bf16: one pass over a prompt")
    for column in ("tokens", "variant", "ms (low, high)", f"vs {first['variant']}"):
        made.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for record in records:
        low, high = record["spread"]
        made.add_row(
            str(record["tokens"]),
            str(Variant(record["variant"], record["sparsity"])),
            f"{record['ms']:.0f} ({low:.0f}, {high:.0f})",
            f"{record['vs_first']:.2f}x",
        )
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four layers, one length")
    known = f"{', '.join(shapes.SHAPES)}, smollm2, a hub name, a folder or a GGUF file"
    parser.add_argument("--shape", default="llama-1b", help=known)
    parser.add_argument("--layers", type=measure.positive, help="cut a known shape to this depth")
    parser.add_argument("--tokens", nargs="+", type=measure.positive, help="lengths of the prompt")
    larosa = [name for name in VARIANTS if Variant(name).is_larosa]
    parser.add_argument(
        "--variants", nargs="+", choices=larosa, default=["larosa"], help="to compare with torch.compile"
    )
    parser.add_argument("--sparsities", nargs="+", type=measure.sparsity, default=[0.5], help="of larosa")
    parser.add_argument("--rounds", type=measure.positive, default=5, help="turns of every variant")
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every length")
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.layers is None and arguments.shape in shapes.SHAPES:
        arguments.layers = 4
    arguments.tokens = arguments.tokens or ([128] if arguments.quick else [128, 512, 2048])
    if arguments.layers is not None:
        try:
            shapes.check_depth(arguments.shape, arguments.layers)
        except ValueError as error:
            parser.error(str(error))
    return arguments


if __name__ == "__main__":
    main()
