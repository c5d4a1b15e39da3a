"""`make demo`: one real model, from calibration to tokens per second, with what it costs in perplexity.

Every figure is measured while it runs. Perplexity: windows of 1024 tokens without overlap, every token sparse,
all next-token losses; ± is the standard error over windows of the paired difference. Speed: one sequence, greedy,
static cache, variants taking turns.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CompileConfig, PreTrainedModel

import larosa_compile
from benchmarks import assets, measure
from benchmarks.methods import Run
from benchmarks.perplexity import Tokens, measured, table
from benchmarks.windows import paired
from larosa_compile.calibration import token_batches
from larosa_compile.decoding import compare
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import OWN_DTYPE

SPARSITIES = (0.25, 0.4, 0.5)
CONTEXT = 1024
PROMPT = "The history of the steam engine begins"

out = Console(width=None if sys.stdout.isatty() else 110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    parser.add_argument("--quick", action="store_true", help="fewer windows and rounds")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    arguments = parser.parse_args()
    calibration, evaluation, rounds = (4, 2, 2) if arguments.quick else (24, 16, 5)

    meta = measure.machine()
    out.print(
        f"{meta['device']}, {meta['threads']} threads, {meta['cpu_capability']}, reads {meta['bandwidth_gb_s']} GB/s; "
        f"torch {meta['torch']}, transformers {meta['transformers']}"
    )
    model, tokenizer = assets.load_model(arguments.model, torch.bfloat16)
    windows = list(token_batches(assets.text("wiki"), tokenizer, CONTEXT))
    held_out = windows[len(windows) // 2 :][:evaluation]

    start = time.perf_counter()
    recipe = larosa_compile.calibrate(model, windows[:calibration], sparsity=0.5)
    out.print(
        f"calibrated {arguments.model} on {recipe.calibration['tokens']} tokens of wiki text in "
        f"{time.perf_counter() - start:.0f} s: {recipe}"
    )
    records = perplexities(arguments.model, model, recipe, held_out)
    sample(model, tokenizer, recipe)
    prompt = windows[-1][:, :128]
    records += speeds(arguments.model, model, recipe, prompt, rounds)
    if arguments.json:
        measure.write(arguments.json, meta, records)


def perplexities(name: str, model: PreTrainedModel, recipe: Recipe, held_out: list[torch.Tensor]) -> list[Any]:
    """Dense, magnitude and LaRoSA perplexity, each through the compiled graph."""
    runs = [Run(method, OWN_DTYPE, sparsity) for sparsity in SPARSITIES for method in ("magnitude", "larosa")]
    described = {
        "model": name,
        "context": CONTEXT,
        "calibration": f"{recipe.calibration['tokens']} tokens of wiki",
    }

    def recipe_of(run: Run) -> Recipe:
        made = recipe.with_sparsity(run.sparsity)
        return made.without_rotation() if run.method == "magnitude" else made

    records = [described | record for record in measured(model, recipe_of, runs, {"wiki": Tokens(held_out)})]
    out.print(table(records))
    losses = {(record["method"], record["sparsity"]): record["losses"] for record in records}
    for sparsity in SPARSITIES:
        mean, error = paired(losses["larosa", sparsity], losses["magnitude", sparsity])
        out.print(f"larosa − magnitude at {sparsity:.0%}: {mean:+.4f} ± {error:.4f} nats per token")
    return records


def sample(model: PreTrainedModel, tokenizer: Any, recipe: Recipe) -> None:
    """A greedy continuation by `model.generate`, decoded by the sparse graph."""
    torch._dynamo.reset()
    config = CompileConfig(backend="larosa", mode=None, fullgraph=False, options={"recipe": recipe})
    config._compile_all_devices = True  # transformers compiles `generate` on accelerators only by default
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=48,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
        pad_token_id=tokenizer.eos_token_id,
    )
    out.print(f"\n[bold]generate, greedy, 50 % sparse:[/bold] {tokenizer.decode(tokens[0])}\n", highlight=False)


def speeds(name: str, model: PreTrainedModel, recipe: Recipe, prompt: torch.Tensor, rounds: int) -> list[Any]:
    """Decode tokens per second of eager, Inductor and larosa."""
    torch._dynamo.reset()
    variants: dict[str, Any] = {"eager": model, "inductor": torch.compile(model)}
    sparsities = {f"larosa {sparsity:.0%}": sparsity for sparsity in SPARSITIES}
    for variant, sparsity in sparsities.items():
        options: Any = {"recipe": recipe.with_sparsity(sparsity)}
        variants[variant] = torch.compile(model, backend="larosa", options=options)
    with progress_bar(True) as bar:
        task = bar.add_task("decode", total=len(variants) * (rounds + 1))
        found = compare(model, variants, prompt, 32, rounds, lambda: bar.advance(task))

    context = prompt.shape[1]
    shown = Table(title=f"decode, one sequence, greedy, static cache, context {context}, bfloat16")
    for column in ("variant", "tokens/s", "ms/token", "min", "max", "vs inductor", "compile s"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    base = found["inductor"][1].median
    records = []
    for variant, (warm, spread) in found.items():
        milliseconds = [f"{value * 1e3:.1f}" for value in (spread.median, spread.minimum, spread.maximum)]
        shown.add_row(variant, f"{1 / spread.median:.1f}", *milliseconds, f"{base / spread.median:.2f}x", f"{warm:.0f}")
        records.append(
            {
                "model": name,
                "variant": variant.partition(" ")[0],
                "sparsity": sparsities.get(variant, 0.0),
                "context": context,
                "tokens_per_s": 1 / spread.median,
                "spread": [1 / spread.maximum, 1 / spread.minimum],
                "compile_s": warm,
            }
        )
    out.print(shown)
    return records


if __name__ == "__main__":
    main()
