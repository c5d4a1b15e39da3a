"""`larosa calibrate`."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from larosa_compile.cli.options import (
    Allocation,
    Device,
    DtypeOption,
    Method,
    Model,
    Selection,
    Weights,
    existing_files,
    sparsity_in_range,
    writable_file,
)

if TYPE_CHECKING:
    from larosa_compile.allocation import Rotation


def _known_rotation(value: str | None) -> str | None:
    if (
        value is not None
        and value not in ("auto", "layer", "model", "none")
        and not (value.isdecimal() and int(value) > 0)
    ):
        raise typer.BadParameter(f"it must be auto, layer, model, none or a number of layers from 1 up, got {value!r}")
    return value


def calibrate(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="RECIPE", callback=writable_file, help="File to write.", show_default=False
        ),
    ],
    text: Annotated[
        list[Path] | None, typer.Option("--text", callback=existing_files, help="A text file; may be given again.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME[:SPLIT[:COLUMN]]", help="A data set on the hub, or a folder."),
    ] = None,
    sparsity: Annotated[
        float, typer.Option("--sparsity", callback=sparsity_in_range, help="Nominal share of activations to drop.")
    ] = 0.5,
    method: Annotated[Method, typer.Option("--method", help="What chooses the sites, and what they keep.")] = "larosa",
    selection: Annotated[
        Selection | None,
        typer.Option("--selection", help="How a site chooses what it keeps; by default as its method does."),
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(
            "--rotation",
            metavar="auto|layer|model|N|none",
            callback=_known_rotation,
            help="Layers per basis; by default auto, and none for methods that do not rotate.",
        ),
    ] = None,
    allocate: Annotated[
        Allocation, typer.Option("--allocate", help="Sparsity by kind as in the paper, or searched for each site.")
    ] = "paper",
    search_text: Annotated[
        list[Path] | None,
        typer.Option("--search-text", callback=existing_files, help="Held-out text to choose the split on."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="FILE", callback=writable_file, help="Where a search writes how far it is."),
    ] = None,
    weights: Annotated[
        Weights, typer.Option("--weights", help="Format that compiled weights are read in; model: the model's dtype.")
    ] = "model",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="To calibrate on, in whole windows.")] = 24576,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens in a window; by default 1024, or all a model takes.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: Device = None,
) -> None:
    """Measure a model on some text and write its recipe."""
    if (text is None) == (dataset is None):
        given = "neither" if text is None else "both"
        raise typer.BadParameter(f"one of them says what to calibrate on, got {given}", param_hint="--text / --dataset")
    if allocate == "search" and search_text is None:
        raise typer.BadParameter(
            "it is measured on held-out text, got none; give --search-text", param_hint="--allocate"
        )
    if resume is not None and allocate != "search":
        raise typer.BadParameter(f"it is of --allocate search, got {allocate}; give both", param_hint="--resume")
    import larosa_compile
    from larosa_compile.cli.opening import open_model, open_tokenizer
    from larosa_compile.cli.output import note
    from larosa_compile.cli.texts import dataset_texts, file_texts, window_length, windows_of

    texts = dataset_texts(dataset, tokens) if dataset is not None else file_texts(text or [], tokens)
    tokenizer, loaded = open_tokenizer(model), open_model(model, dtype, device)
    length = min(window_length(loaded, context), tokens)
    source = "--text" if dataset is None else f"--dataset {dataset!r}"
    windows = windows_of(texts, tokenizer, length, math.ceil(tokens / length), source)
    held_out = None
    if search_text is not None:
        found = windows_of(
            file_texts(search_text, tokens), tokenizer, length, math.ceil(tokens / length), "--search-text"
        )
        held_out = [window.to(loaded.device) for window in found]
    layers: Rotation | None = int(rotation) if rotation and rotation.isdecimal() else rotation  # type: ignore[assignment]
    start = time.perf_counter()
    recipe = larosa_compile.calibrate(
        loaded,
        [window.to(loaded.device) for window in windows],
        sparsity,
        method=method,
        selection=selection,
        rotation=layers,
        allocate=allocate,
        search=held_out,
        resume=resume,
    )
    recipe.with_weights(weights).save(output)
    measured = sum(window.numel() for window in windows)
    if measured < tokens:
        note(f"the text has fewer than {tokens} tokens: calibrated on all {measured}")
    typer.echo(
        f"{output}: {recipe}, {output.stat().st_size / 1e6:.1f} MB, "
        f"calibrated on {measured} tokens in {time.perf_counter() - start:.1f} s"
    )
