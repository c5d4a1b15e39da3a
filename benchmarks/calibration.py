"""What a recipe is calibrated on, and what that changes: `python -m benchmarks.calibration [--quick] [--json FILE]`.

Perplexity at one sparsity, for recipes from more and less text, of several kinds, and from other windows of the same
text. Windows of a recipe are drawn from the first half of a text by a seed; a smaller draw is the beginning of a larger
one. Evaluated on windows of the second half of each `--evaluate` text: every token sparse, all next-token losses, the
rewritten graph run with the ops' definitions.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import assets, measure
from benchmarks.windows import halves_of, paired
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.plots import MARKERS, SERIES, figure
from larosa_compile.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS = (1024, 4096, 16384, 65536)
TEXTS = ("wiki", "c4", "code")
SEEDS = (0, 1, 2)

out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(measure.in_a_line(meta))
    model, tokenizer = assets.load_model(arguments.model, getattr(torch, arguments.dtype))
    texts = halves_of((*arguments.texts, *arguments.evaluate), tokenizer, arguments.context)
    learnt = {name: texts[name][0] for name in arguments.texts}
    held_out = {name: texts[name][1][: arguments.windows] for name in arguments.evaluate}
    draws = list(itertools.product(arguments.texts, arguments.tokens, arguments.seeds))
    found = measured(model, learnt, held_out, draws, arguments.sparsity)
    described = {"model": arguments.model, "context": arguments.context}
    records = measure.recorded(arguments.json, meta, described, found)
    out.print(table(records))
    if arguments.plot:
        arguments.plot.write_text(drawing(records), encoding="utf-8")


def drawn(windows: Sequence[Tensor], tokens: int, seed: int) -> list[Tensor]:
    """Windows `[1, context]` of about `tokens` tokens, at least one, in the order that the seed draws them.

    Raises:
        ValueError: the text has fewer.
    """
    count = max(1, round(tokens / windows[0].shape[1]))
    if count > len(windows):
        has = sum(window.numel() for window in windows)
        raise ValueError(f"half of the text has {has} tokens, and {tokens} were asked for; ask for fewer")
    return random.Random(seed).sample(list(windows), len(windows))[:count]


def measured(
    model: PreTrainedModel,
    learnt: dict[str, list[Tensor]],
    held_out: dict[str, list[Tensor]],
    draws: Sequence[tuple[str, int, int]],
    sparsity: float,
) -> Iterator[dict[str, Any]]:
    """A record for every draw (text, tokens, seed) and held-out text.

    `loss_over_dense` and its error: nats per token, from paired windows.
    """
    with progress_bar(True) as bar:
        task = bar.add_task("recipes", total=len(draws))
        dense = {name: next_token_losses(model, windows) for name, windows in held_out.items()}
        for text, tokens, seed in draws:
            windows = drawn(learnt[text], tokens, seed)
            torch._dynamo.reset()
            recipe = larosa_compile.calibrate(model, windows, sparsity, progress=False)
            options: dict[str, Any] = {"recipe": recipe, "lowering": "eager", "self_check": False}
            fast: Any = torch.compile(model, backend="larosa", options=options)
            for name, evaluated in held_out.items():
                losses = next_token_losses(fast, evaluated)
                over, error = paired(losses, dense[name])
                yield {
                    "calibration_text": text,
                    "calibration_tokens": sum(window.numel() for window in windows),
                    "seed": seed,
                    "sparsity": sparsity,
                    "text": name,
                    "tokens": sum(window.numel() for window in evaluated),
                    "ppl": perplexity(losses),
                    "dense_ppl": perplexity(dense[name]),
                    "gap": perplexity(losses) - perplexity(dense[name]),
                    "loss_over_dense": over,
                    "loss_over_dense_error": error,
                }
            bar.advance(task)


def by_setting(records: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[float]]:
    """(evaluated text, calibration text, tokens) -> gaps of perplexity, one for each seed."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for record in records:
        key = (record["text"], record["calibration_text"], record["calibration_tokens"])
        found.setdefault(key, []).append(record["gap"])
    return found


def table(records: list[dict[str, Any]]) -> Table:
    """Gaps of perplexity: mean over seeds, and from the smallest to the largest."""
    settings = by_setting(records)
    first = records[0]
    made = Table(title=f"{first['model']} at {first['sparsity']:.0%}: perplexity over dense, by calibration")
    for column in ("evaluated on", "dense", "calibrated on"):
        made.add_column(column, justify="right" if column == "dense" else "left", no_wrap=True)
    counts = sorted({tokens for _, _, tokens in settings})
    for tokens in counts:
        made.add_column(f"{tokens} tokens", justify="right", no_wrap=True)
    dense = {record["text"]: record["dense_ppl"] for record in records}
    for text, calibrated in dict.fromkeys((text, calibrated) for text, calibrated, _ in settings):
        cells = [
            _spread(settings[text, calibrated, tokens]) if (text, calibrated, tokens) in settings else ""
            for tokens in counts
        ]
        made.add_row(text, f"{dense[text]:.2f}", calibrated, *cells)
    return made


def _spread(gaps: list[float]) -> str:
    mean = f"{statistics.mean(gaps):+.2f}"
    return f"{mean} ({min(gaps):.2f} to {max(gaps):.2f})" if len(gaps) > 1 else mean


def drawing(records: list[dict[str, Any]]) -> str:
    """An SVG: the gap against calibration tokens on the first held-out text, a line per calibration text."""
    settings = by_setting(records)
    evaluated = records[0]["text"]

    def draw(axes: "Axes") -> None:
        texts = dict.fromkeys(record["calibration_text"] for record in records)
        for text, colour, marker in zip(texts, SERIES, MARKERS, strict=False):
            points = sorted((n, gaps) for (e, t, n), gaps in settings.items() if (e, t) == (evaluated, text))
            x, means = [n for n, _ in points], [statistics.mean(gaps) for _, gaps in points]
            axes.plot(x, means, color=colour, marker=marker, label=f"calibrated on {text}")
            axes.fill_between(x, [min(g) for _, g in points], [max(g) for _, g in points], color=colour, alpha=0.15)
        counts = sorted({n for _, _, n in settings})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{round(n / 1024)}k" for n in counts])
        axes.set_xlabel("calibration tokens")
        axes.set_ylabel(f"perplexity over dense, on {evaluated}")
        axes.set_ylim(0, 1.1 * max(math.ceil(max(gaps)) for gaps in settings.values()))
        axes.legend()

    first = records[0]
    title = f"{first['model']} at {first['sparsity']:.0%}: perplexity lost against calibration tokens"
    return figure("calibration", title, draw)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 and 4096 tokens of one text, two seeds, two windows")
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    known = f"{', '.join(assets.TEXTS)}, or a file"
    parser.add_argument("--texts", nargs="+", help=f"to calibrate on: {known} (default: {' '.join(TEXTS)})")
    parser.add_argument("--tokens", nargs="+", type=measure.positive, help="to calibrate on (default: 1k to 64k)")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the windows drawn (default: 0 1 2)")
    parser.add_argument(
        "--evaluate", nargs="+", default=["wiki"], help=f"texts to evaluate on: {known} (default: wiki)"
    )
    parser.add_argument("--windows", type=measure.positive, help="to evaluate on, at least 2 (default: 8)")
    parser.add_argument("--context", type=measure.positive, default=1024)
    parser.add_argument("--sparsity", type=measure.sparsity, default=0.5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--plot", type=Path, help="draw it into this SVG file (extra `report`)")
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every recipe")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.texts = arguments.texts or list(TEXTS[:1] if quick else TEXTS)
    arguments.tokens = arguments.tokens or list(TOKENS[:2] if quick else TOKENS)
    arguments.seeds = arguments.seeds or list(SEEDS[:2] if quick else SEEDS)
    arguments.windows = arguments.windows or (2 if quick else 8)
    if arguments.windows < 2:
        parser.error(f"--windows must be at least 2, for an error to be known, got {arguments.windows}")
    return arguments


if __name__ == "__main__":
    main()
