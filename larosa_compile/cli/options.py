"""The options that several commands share, and what their values may be."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def sparsity_in_range(value: float | None) -> float | None:
    """A sparsity as given.

    Raises:
        typer.BadParameter: it is not in [0, 1).
    """
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"it must lie in [0, 1), got {value:g}")
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub name, a folder or a GGUF file.", show_default=False)]
RecipeFile = Annotated[
    Path, typer.Option("--recipe", "-r", metavar="RECIPE", help="What `larosa calibrate` wrote.", show_default=False)
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
