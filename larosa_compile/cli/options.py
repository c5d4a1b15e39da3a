"""The options that several commands share, and what their values may be."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Weights = Literal["model", "int8", "int4"]
Method = Literal["larosa", "teal", "cats"]
Allocation = Literal["paper", "search"]
Selection = Literal["top-k", "threshold", "relative", "gate"]


def sparsity_in_range(value: float | None) -> float | None:
    """A sparsity as given.

    Raises:
        typer.BadParameter: it is not in [0, 1).
    """
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"it must lie in [0, 1), got {value:g}")
    return value


def existing_file(path: Path | None) -> Path | None:
    """A path as given.

    Raises:
        typer.BadParameter: there is no file.
    """
    if path is not None and not path.is_file():
        raise typer.BadParameter(f"{path} is no file; give one that exists")
    return path


def existing_files(paths: list[Path] | None) -> list[Path] | None:
    """Paths as given, which may be none.

    Raises:
        typer.BadParameter: one is no file.
    """
    for path in paths or ():
        existing_file(path)
    return paths or None


def writable_file(path: Path | None) -> Path | None:
    """A path as given, to write a file to.

    Raises:
        typer.BadParameter: it is a folder, or in none.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        fault = "is a folder" if path.is_dir() else f"is in {path.parent}, which is no folder"
        raise typer.BadParameter(f"{path} {fault}; give a file in a folder that exists")
    return path


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub name, a folder or a GGUF file.", show_default=False)]
RecipeFile = Annotated[
    Path,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        callback=existing_file,
        help="What `larosa calibrate` wrote.",
        show_default=False,
    ),
]
OptionalRecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", metavar="RECIPE", callback=existing_file, help="What `larosa calibrate` wrote."),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Of the weights; auto: the checkpoint's, bfloat16 for a GGUF file.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="As PyTorch names it; by default an accelerator, else cpu.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, to standard output.")]
OtherSparsity = Annotated[
    float | None,
    typer.Option("--sparsity", callback=sparsity_in_range, help="Nominal sparsity; by default the recipe's."),
]
OtherWeights = Annotated[
    Weights | None,
    typer.Option("--weights", help="Format of weights; model: the model's own dtype; by default what the recipe says."),
]
