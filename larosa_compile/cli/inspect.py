"""`larosa inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from larosa_compile.cli.options import AsJson

if TYPE_CHECKING:
    from larosa_compile.recipe import Recipe


def inspect(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="What `larosa calibrate` wrote.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Say what a recipe holds and where it comes from."""
    from larosa_compile.cli.output import print_json, print_table, table
    from larosa_compile.recipe import Recipe

    found = summary(Recipe.load(recipe)) | {"file": str(recipe), "file_bytes": recipe.stat().st_size}
    if as_json:
        print_json(found)
        return
    typer.echo(
        f"{recipe}: a recipe at nominal sparsity {found['sparsity']:g}, {found['file_bytes'] / 1e6:.1f} MB\n"
        f"digest      {found['digest']}\n"
        f"model       {found['parameters']} names of parameters\n"
        f"method      {found['method']}\n"
        f"weights     {found['weights']}\n"
        f"bases       {_bases(found['bases'])}"
    )
    for key, value in found["calibration"].items():
        said = ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else value
        typer.echo(f"{key:11} {said}")
    sites = table("kind of site", "sites", "sparsity", "coefficient", "chosen by", "in a rotated basis")
    for kind, row in found["kinds"].items():
        sites.add_row(
            kind,
            str(row["sites"]),
            _range(row["sparsity"]),
            _range(row["coefficient"]),
            ", ".join(row["selections"]),
            str(row["rotated"]),
        )
    print_table(sites)


def summary(recipe: "Recipe") -> dict[str, Any]:
    """What a recipe holds, as JSON values; `kinds`: by kind of site, its smallest and largest numbers."""
    kinds: dict[str, Any] = {}
    for kind in sorted({site.kind for site in recipe.sites.values()}):
        sites = [site for site in recipe.sites.values() if site.kind == kind]
        sparsities, coefficients = [site.sparsity for site in sites], [site.coefficient for site in sites]
        kinds[kind] = {
            "sites": len(sites),
            "sparsity": [min(sparsities), max(sparsities)],
            "coefficient": [min(coefficients), max(coefficients)],
            "selections": sorted({site.selection for site in sites}),
            "rotated": sum(site.basis is not None for site in sites),
        }
    return {
        "digest": recipe.digest,
        "sparsity": recipe.sparsity,
        "method": recipe.method,
        "weights": recipe.weights,
        "sites": len(recipe.sites),
        "kinds": kinds,
        "bases": {key: len(rotation) for key, rotation in recipe.rotations.items()},
        "parameters": len(recipe.parameters),
        "calibration": dict(recipe.calibration),
    }


def _bases(bases: dict[str, int]) -> str:
    sizes = sorted(set(bases.values()))
    return f"{len(bases)} of {' or '.join(map(str, sizes))} features" if bases else "none: every site in its own basis"


def _range(pair: list[float]) -> str:
    low, high = pair
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
