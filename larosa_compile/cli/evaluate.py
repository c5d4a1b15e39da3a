"""`larosa eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from larosa_compile.cli.options import AsJson, Device, DtypeOption, Model, OtherSparsity, RecipeFile


def evaluate(
    model: Model,
    recipe: RecipeFile,
    text: Annotated[list[Path], typer.Option("--text", help="A text file; may be given again.", show_default=False)],
    sparsity: OtherSparsity = None,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a window.")] = 1024,
    windows: Annotated[int, typer.Option("--windows", min=1, help="At most so many, from the start.")] = 16,
    dtype: DtypeOption = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on some text, dense and sparse."""
    import torch

    from larosa_compile.cli.opening import open_model, open_recipe, open_tokenizer
    from larosa_compile.cli.output import print_json, print_table, table
    from larosa_compile.cli.texts import file_texts, windows_of
    from larosa_compile.evaluation import next_token_losses, perplexity
    from larosa_compile.loading import check_positions
    from larosa_compile.progress import progress_bar

    used = open_recipe(recipe, sparsity)
    texts = file_texts(text, windows * context)
    found = windows_of(texts, open_tokenizer(model), context, windows, "--text")
    loaded = open_model(model, dtype, device)
    length = found[0].shape[1]
    check_positions(loaded, length, "--context")
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
        result = {"model": model, "recipe": used.digest, "sparsity": used.sparsity, "perplexity": measured, "gap": gap}
        print_json(result | {"tokens": tokens, "windows": len(found), "context": length, "protocol": protocol})
        return
    shown = table("model", "perplexity", "gap")
    shown.add_row("dense", f"{measured['dense']:.3f}", "")
    shown.add_row(f"sparse, nominal {used.sparsity:g}", f"{measured['sparse']:.3f}", f"{gap:+.3f}")
    print_table(shown)
    typer.echo(f"{tokens} tokens predicted: {protocol}")
