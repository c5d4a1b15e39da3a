"""`larosa explain`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from larosa_compile.cli.options import (
    AsJson,
    Device,
    DtypeOption,
    Model,
    OptionalRecipeFile,
    OtherSparsity,
    OtherWeights,
    existing_files,
    writable_file,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WINDOWS = 8
"""Of text, for the perplexity of a page: each is read at half a dozen sparsities."""


def explain(
    model: Model,
    recipe: OptionalRecipeFile = None,
    sparsity: OtherSparsity = None,
    weights: OtherWeights = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", callback=writable_file, help="Write a page with figures as well."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", callback=existing_files, help="For the page: to measure perplexity on."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens in a window; by default 1024, or all a model takes.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Of the text, at most so many.")] = WINDOWS,
    speed: Annotated[bool, typer.Option("--speed", help="For the page: measure speed, in minutes.")] = False,
    dtype: DtypeOption = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Say what the compiler finds in a model and does with it: streams, sites, bytes, what stays dense and why.

    Without a recipe, what `larosa calibrate` would choose. A page needs one.
    """
    if html is not None and recipe is None:
        raise typer.BadParameter("a page shows a recipe, got none; give its file with --recipe", param_hint="--html")
    for name, given in (("--text", text), ("--speed", speed)):
        if given and html is None:
            raise typer.BadParameter("it is measured for a page; give its file with --html", param_hint=name)
    import larosa_compile
    from larosa_compile.cli.opening import open_model, open_recipe
    from larosa_compile.cli.output import note, print_json
    from larosa_compile.progress import progress_bar

    used = open_recipe(recipe, sparsity, weights) if recipe is not None else None
    loaded = open_model(model, dtype, device)
    with progress_bar(True) as bar:
        bar.add_task("analysing", total=None)
        report = larosa_compile.explain(loaded, recipe=used, sparsity=0.5 if sparsity is None else sparsity)
    if html is not None and used is not None:
        read = _windows(model, loaded, text, context, windows) if text is not None else None
        name = Path(model).name if Path(model).exists() else model
        html.write_text(
            larosa_compile.html_report(loaded, used, windows=read, speed=speed, name=name), encoding="utf-8"
        )
        note(f"{html}: {html.stat().st_size / 1e3:.0f} kB")
    if not as_json:
        typer.echo(str(report))
        return
    totals = ("dense_bytes", "sparse_bytes", "bytes_skipped_share")
    graphs = [asdict(graph) | {name: getattr(graph, name) for name in totals} for graph in report.graphs]
    print_json({"model": model, "recipe": used.digest if used else None, "graphs": graphs})


def _windows(
    name: str, model: "PreTrainedModel", text: list[Path], context: int | None, windows: int
) -> "list[Tensor]":
    """Windows of the text on the model's device, as `larosa eval` reads it."""
    from larosa_compile.cli.opening import open_tokenizer
    from larosa_compile.cli.texts import file_texts, window_length, windows_of

    length = window_length(model, context)
    found = windows_of(file_texts(text, windows * length), open_tokenizer(name), length, windows, "--text")
    return [window.to(model.device) for window in found]
