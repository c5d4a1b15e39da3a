"""`larosa explain`."""

from dataclasses import asdict

import typer

from larosa_compile.cli.options import AsJson, Device, DtypeOption, Model, OptionalRecipeFile, OtherSparsity


def explain(
    model: Model,
    recipe: OptionalRecipeFile = None,
    sparsity: OtherSparsity = None,
    dtype: DtypeOption = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Say what the compiler finds in a model and does with it: streams, sites, bytes, what stays dense and why.

    Without a recipe, what `larosa calibrate` would choose.
    """
    import larosa_compile
    from larosa_compile.cli.opening import open_model, open_recipe
    from larosa_compile.cli.output import print_json
    from larosa_compile.progress import progress_bar

    used = open_recipe(recipe, sparsity) if recipe is not None else None
    loaded = open_model(model, dtype, device)
    with progress_bar(True) as bar:
        bar.add_task("analysing", total=None)
        report = larosa_compile.explain(loaded, recipe=used, sparsity=0.5 if sparsity is None else sparsity)
    if not as_json:
        typer.echo(str(report))
        return
    totals = ("dense_bytes", "sparse_bytes", "bytes_skipped_share")
    graphs = [asdict(graph) | {name: getattr(graph, name) for name in totals} for graph in report.graphs]
    print_json({"model": model, "recipe": used.digest if used else None, "graphs": graphs})
