"""Perplexity of a real model by method, format of weights and sparsity, next to the bytes that each skips.

Windows of `--context` tokens without overlap, all next-token losses, every token sparse, through the compiled graph.
Calibration takes windows from the start of its text, evaluation from the middle of its own on, so that one text may
serve both; `larosa-search` chooses at 50 % on the windows between. ± is the standard error over windows of the paired
difference to dense, in nats per token.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import assets, measure
from larosa_compile.calibration import token_batches
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import WEIGHTS
from larosa_compile.site_search import search_sites

METHODS = ("magnitude", "larosa", "larosa-search")
SPARSITIES = (0.0, 0.25, 0.4, 0.5)

out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@dataclass(frozen=True)
class Run:
    """A method of choosing what to drop, a format of weights, a nominal sparsity."""

    method: str
    weights: str
    sparsity: float

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe of larosa as this run's; magnitude is without rotations."""
        made = recipe.with_sparsity(self.sparsity).with_weights(self.weights)
        return made.without_rotation() if self.method == "magnitude" else made


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(
        f"{meta['device']}, {meta['threads']} threads; torch {meta['torch']}, transformers {meta['transformers']}"
    )
    model, tokenizer = assets.load_model(arguments.model, getattr(torch, arguments.dtype))
    texts = {name: windows_of(name, tokenizer, arguments.context) for name in (arguments.calibration, arguments.text)}
    learnt = texts[arguments.calibration][: arguments.calibration_windows]
    found = texts[arguments.text]
    held_out = found[len(found) // 2 :][: arguments.windows]
    recipe = larosa_compile.calibrate(model, learnt, sparsity=0.5, rotation=arguments.rotation)
    recipes = {}
    if "larosa-search" in arguments.methods:
        start = arguments.calibration_windows
        unseen = texts[arguments.calibration][: len(texts[arguments.calibration]) // 2]
        searched = unseen[start : start + arguments.search_windows]
        recipes["larosa-search"] = search_sites(model, recipe, searched, resume=arguments.resume)
    runs = [Run(*run) for run in itertools.product(arguments.methods, arguments.weights, arguments.sparsities)]
    described = {
        "model": arguments.model,
        "protocol": "all",
        "context": arguments.context,
        "tokens": len(held_out) * arguments.context,
        "calibration": f"{arguments.calibration}, {recipe.calibration['tokens']} tokens, rotation {arguments.rotation}",
        "text": arguments.text,
    }
    records = []
    for record in measured(model, recipe, runs, held_out, recipes):
        records.append(described | record)
        measure.write_so_far(arguments.json, meta, records)
    out.print(table(records))


def windows_of(name: str, tokenizer: Any, context: int) -> list[torch.Tensor]:
    """All whole windows `[1, context]` of one of our texts, or of a file."""
    text = Path(name).read_text(encoding="utf-8") if Path(name).is_file() else assets.text(name)
    return list(token_batches(text, tokenizer, context))


def measured(
    model: PreTrainedModel,
    recipe: Recipe,
    runs: Sequence[Run],
    held_out: list[torch.Tensor],
    recipes: Mapping[str, Recipe] | None = None,
) -> Iterator[dict[str, Any]]:
    """A record of the dense model, then one of each run. `losses`: nats per token, by window.

    recipes: of methods that have one of their own.
    """
    with progress_bar(True) as bar:
        task = bar.add_task("perplexity", total=len(runs) + 1)
        dense = next_token_losses(model, held_out)
        bar.advance(task)
        yield {"method": "dense", "weights": "model", "sparsity": 0.0} | _scores(dense, dense, 0.0)
        for run in runs:
            torch._dynamo.reset()
            used = run.of((recipes or {}).get(run.method, recipe))
            fast: Any = torch.compile(model, backend="larosa", options={"recipe": used, "self_check": False})
            losses = next_token_losses(fast, held_out)
            skipped = larosa_compile.explain(model, recipe=used).graphs[0].bytes_skipped_share
            bar.advance(task)
            yield {"method": run.method, "weights": run.weights, "sparsity": run.sparsity} | _scores(
                losses, dense, skipped
            )


def _scores(losses: list[float], dense: list[float], skipped: float) -> dict[str, Any]:
    mean, error = paired(losses, dense)
    ppl = perplexity(losses)
    return {
        "losses": losses,
        "bytes_skipped_share": skipped,
        "ppl": ppl,
        "gap": ppl - perplexity(dense),
        "loss_over_dense": mean,
        "loss_over_dense_error": error,
    }


def paired(losses: list[float], base: list[float]) -> tuple[float, float]:
    """Mean difference of two methods' losses on the same windows, and its standard error."""
    differences = [loss - other for loss, other in zip(losses, base, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def table(records: list[dict[str, Any]]) -> Table:
    """The records of one model and text."""
    first = records[0]
    made = Table(title=f"{first['model']}, {first['tokens']} tokens of {first['text']}; {first['calibration']}")
    for column in ("method", "weights", "sparsity", "bytes skipped", "perplexity", "gap", "of dense", "nats per token"):
        made.add_column(column, justify="left" if column in ("method", "weights") else "right", no_wrap=True)
    for record in records:
        made.add_row(
            record["method"],
            record["weights"],
            f"{record['sparsity']:.0%}",
            f"{record['bytes_skipped_share']:.1%}",
            f"{record['ppl']:.3f}",
            f"{record['gap']:+.3f}",
            f"{record['gap'] / first['ppl']:+.2%}",
            f"{record['loss_over_dense']:+.4f} ± {record['loss_over_dense_error']:.4f}",
        )
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two windows, 50 %% only")
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    known = f"{', '.join(assets.TEXTS)}, or a file"
    parser.add_argument("--text", default="wiki", help=f"to evaluate on: {known} (default: wiki)")
    parser.add_argument("--calibration", default="wiki", help=f"to calibrate on: {known} (default: wiki)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["larosa"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["model"], help="formats of weights")
    parser.add_argument("--sparsities", nargs="+", type=measure.sparsity)
    parser.add_argument("--rotation", default="layer", choices=("layer", "model", "auto", "none"))
    parser.add_argument("--context", type=measure.positive, default=1024)
    parser.add_argument("--windows", type=measure.positive, help="to evaluate on, at least 2 (default: 16)")
    parser.add_argument("--calibration-windows", type=measure.positive, help="(default: 24)")
    parser.add_argument("--search-windows", type=measure.positive, default=24, help="for larosa-search (default: 24)")
    parser.add_argument("--resume", type=Path, help="where the search of larosa-search writes how far it is")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every run")
    arguments = parser.parse_args(argv)
    arguments.sparsities = arguments.sparsities or ([0.5] if arguments.quick else list(SPARSITIES))
    arguments.windows = arguments.windows or (2 if arguments.quick else 16)
    arguments.calibration_windows = arguments.calibration_windows or (4 if arguments.quick else 24)
    if arguments.windows < 2:
        parser.error(f"--windows must be at least 2, for an error to be known, got {arguments.windows}")
    return arguments


if __name__ == "__main__":
    main()
