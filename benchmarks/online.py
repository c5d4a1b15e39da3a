"""A recipe learnt from traffic against one that was calibrated: perplexity at the same sparsity and as many tokens.

Traffic is the calibration text in prompts of varying length, in turn, as the compiled model is called with them; the
explicit calibration reads as many tokens of the same text in windows of 1024. Perplexity: windows of 1024 tokens
without overlap behind that text, every token sparse, all next-token losses. One compiled function runs throughout: it
is dense while it learns, and what is evaluated is what it has switched to.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import assets, measure
from larosa_compile.calibration import token_batches
from larosa_compile.collection import recipe_of
from larosa_compile.errors import MissingRecipeError
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.progress import progress_bar

CONTEXT = 1024
LENGTHS = (37, 512, 120, 260, 18, 900, 75, 330)
"""Tokens of the prompts, in turn."""

out = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(measure.in_a_line(meta))
    model, tokenizer = assets.load_model(arguments.model, torch.bfloat16)
    windows = list(token_batches(assets.text("wiki"), tokenizer, CONTEXT))
    held_out = windows[len(windows) // 2 :][: arguments.windows]
    text = torch.cat(windows[: -(-arguments.tokens // CONTEXT)], 1)[:, : arguments.tokens]
    options = {"lowering": arguments.lowering}
    records = compared(arguments.model, model, text, held_out, arguments.sparsity, options)
    out.print(table(records))
    if arguments.json:
        measure.write(arguments.json, meta, records)


def compared(
    name: str,
    model: PreTrainedModel,
    text: Tensor,
    held_out: list[Tensor],
    sparsity: float,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """A record each for the dense model, explicit calibration on `text` [1, tokens], and learning from it.

    options: of the backend, for both.
    """
    records: list[dict[str, Any]] = []

    def add(method: str, losses: list[float], tokens: int, prompts: int) -> None:
        ppl = perplexity(losses)
        over = ppl / records[1]["ppl"] - 1 if len(records) > 1 else None
        records.append(
            {
                "model": name,
                "method": method,
                "lowering": options["lowering"],
                "sparsity": 0.0 if method == "dense" else sparsity,
                "calibration_tokens": tokens,
                "prompts": prompts,
                "evaluation_tokens": sum(window.numel() for window in held_out),
                "ppl": ppl,
                "over_explicit": over,
            }
        )

    with progress_bar(True) as bar:
        task = bar.add_task("dense, learning, explicit", total=3)
        add("dense", next_token_losses(model, held_out), 0, 0)
        bar.advance(task)

        # first, as a calibration would be remembered for the model
        asked = {"sparsity": sparsity, "calibration_tokens": text.numel(), **options}
        learning = torch.compile(model, backend="larosa", options=asked)
        prompts = call_with(learning, text)
        online = next_token_losses(learning, held_out)
        learnt = recipe_of(learning)
        bar.advance(task)

        torch._dynamo.reset()
        windows = [window for window in text.split(CONTEXT, 1) if window.numel()]
        recipe = larosa_compile.calibrate(model, windows, sparsity, progress=False)
        explicit = torch.compile(model, backend="larosa", options={"recipe": recipe, **options})
        add("calibrate", next_token_losses(explicit, held_out), int(str(recipe.calibration["tokens"])), len(windows))
        add("online", online, int(str(learnt.calibration["tokens"])), prompts)
        bar.advance(task)
    return records


def call_with(model: Any, text: Tensor) -> int:
    """Calls a compiled model with prompts, all of `text` [1, tokens]; returns how many they were.

    Raises:
        RuntimeError: it had a recipe before the last.
    """
    count = 0
    with torch.no_grad():
        for prompt in prompts_of(text):
            try:
                recipe_of(model)
            except MissingRecipeError:
                pass
            else:
                raise RuntimeError(f"the model had a recipe after {count} prompts, before the text was through")
            model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=False)
            count += 1
    return count


def prompts_of(text: Tensor) -> Iterator[Tensor]:
    """`text` [1, tokens] in pieces of `LENGTHS`, in turn."""
    start = index = 0
    while start < text.shape[1]:
        yield text[:, start : start + LENGTHS[index % len(LENGTHS)]]
        start += LENGTHS[index % len(LENGTHS)]
        index += 1


def table(records: list[dict[str, Any]]) -> Table:
    """A row per method."""
    first = records[0]
    made = Table(title=f"{first['model']}, bfloat16: perplexity over {first['evaluation_tokens']} held-out tokens")
    for column in ("method", "sparsity", "learnt from", "perplexity", "over explicit"):
        made.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for record in records:
        learnt = f"{record['calibration_tokens']} tokens, {record['prompts']} calls" if record["prompts"] else ""
        over = "" if record["over_explicit"] is None else f"{record['over_explicit']:+.2%}"
        made.add_row(record["method"], f"{record['sparsity']:.0%}", learnt, f"{record['ppl']:.2f}", over)
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2048 tokens and two windows")
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    parser.add_argument("--tokens", type=measure.positive, help="to learn from, 8192 by default")
    parser.add_argument("--windows", type=measure.positive, help="of 1024 tokens to evaluate on, 16 by default")
    parser.add_argument("--sparsity", type=measure.sparsity, default=0.5, help="nominal, 0.5 by default")
    parser.add_argument(
        "--lowering", choices=("inductor", "eager"), default="inductor", help="eager: the ops' definitions, no compile"
    )
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    arguments = parser.parse_args(argv)
    arguments.tokens = arguments.tokens or (2048 if arguments.quick else 8192)
    arguments.windows = arguments.windows or (2 if arguments.quick else 16)
    return arguments


if __name__ == "__main__":
    main()
