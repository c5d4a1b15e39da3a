"""`larosa eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from larosa_compile.cli.options import (
    AsJson,
    Device,
    DtypeOption,
    Model,
    OtherSparsity,
    OtherWeights,
    RecipeFile,
    existing_files,
)


def evaluate(
    model: Model,
    recipe: RecipeFile,
    text: Annotated[
        list[Path],
        typer.Option("--text", callback=existing_files, help="A text file; may be given again.", show_default=False),
    ],
    sparsity: OtherSparsity = None,
    weights: OtherWeights = None,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens in a window; by default 1024, or all a model takes.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="At most so many, from the start.")] = 16,
    dtype: DtypeOption = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on some text, dense and sparse."""
    import torch

    from larosa_compile.cli.opening import open_model, open_recipe, open_tokenizer
    from larosa_compile.cli.output import print_json, print_table, table
    from larosa_compile.cli.texts import file_texts, window_length, windows_of
    from larosa_compile.evaluation import next_token_losses, perplexity
    from larosa_compile.progress import progress_bar

    used = open_recipe(recipe, sparsity, weights)
    tokenizer, loaded = open_tokenizer(model), open_model(model, dtype, device)
    asked = window_length(loaded, context)
    found = windows_of(file_texts(text, windows * asked), tokenizer, asked, windows, "--text")
    length = found[0].shape[1]
    used.attach(loaded)
    options: Any = {"recipe": used}
    variants: dict[str, Any] = {"dense": loaded, "sparse": torch.compile(loaded, backend="larosa", options=options)}
    measured: dict[str, float] = {}
    with progress_bar(True) as bar:
        for name, forward in variants.items():
            ids = (window.to(loaded.device) for window in bar.track(found, description=f"{name} windows"))
            measured[name] = perplexity(next_token_losses(forward, ids))
    gap, tokens = measured["sparse"] - measured["dense"], len(found) * (length - 1)
    protocol = (
        f"{len(found)} windows of {length} tokens without overlap, from the start of the text; all next-token losses "
        "of a window; sparse: every token sparse, through the compiled graph"
    )
    if as_json:
        result = {"model": model, "recipe": used.digest, "sparsity": used.sparsity, "weights": used.weights}
        result |= {"perplexity": measured, "gap": gap}
        print_json(result | {"tokens": tokens, "windows": len(found), "context": length, "protocol": protocol})
        return
    shown = table("model", "perplexity", "gap")
    shown.add_row("dense", f"{measured['dense']:.3f}", "")
    shown.add_row(
        f"sparse, nominal {used.sparsity:g}, {used.weights} weights", f"{measured['sparse']:.3f}", f"{gap:+.3f}"
    )
    print_table(shown)
    typer.echo(f"{tokens} tokens predicted: {protocol}")
