"""`larosa bench`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from larosa_compile.cli.options import AsJson, Device, DtypeOption, Model, OtherSparsity, OtherWeights, RecipeFile

if TYPE_CHECKING:
    from larosa_compile.decoding import Spread


def bench(
    model: Model,
    recipe: RecipeFile,
    sparsity: OtherSparsity = None,
    weights: OtherWeights = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of the prompt, which are random.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=127, help="Timed in a round of each variant.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="In which the variants take turns.")] = 5,
    dtype: DtypeOption = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure decode speed: torch.compile against larosa, in turns, both without Dynamo's guards on modules."""
    import torch

    from larosa_compile.cli.opening import open_model, open_recipe
    from larosa_compile.cli.output import print_json, print_table, table
    from larosa_compile.decoding import ROOM, compare
    from larosa_compile.generation import unguarded
    from larosa_compile.loading import check_positions
    from larosa_compile.progress import progress_bar

    used = open_recipe(recipe, sparsity, weights)
    loaded = open_model(model, dtype, device)
    check_positions(loaded, context + ROOM, f"--context and {ROOM} tokens behind it together")
    used.attach(loaded)
    variants: dict[str, Any] = {
        "torch.compile": torch.compile(loaded, options=unguarded()),
        "larosa": torch.compile(loaded, backend="larosa", options=unguarded(recipe=used)),
    }
    prompt = torch.randint(loaded.config.get_text_config().vocab_size, (1, context), generator=_seeded())
    with progress_bar(True) as bar:
        task = bar.add_task("compile, then decode", total=len(variants) * (rounds + 1))
        found = compare(loaded, variants, prompt.to(loaded.device), tokens, rounds, done=lambda: bar.advance(task))
    rows = {name: described(warm, spread) for name, (warm, spread) in found.items()}
    ratio = found["torch.compile"][1].median / found["larosa"][1].median
    where = f"{loaded.device}, {torch.get_num_threads()} threads, {str(loaded.dtype).removeprefix('torch.')}"
    protocol = f"one sequence, greedy, static cache, context {context}; {rounds} rounds of {tokens} tokens, in turns"
    if as_json:
        print_json(
            {
                "model": model,
                "recipe": used.digest,
                "sparsity": used.sparsity,
                "weights": used.weights,
                "device": where,
                "torch": torch.__version__,
                "protocol": protocol,
                "variants": rows,
                "speedup": ratio,
            }
        )
        return
    shown = table("variant", "tokens/s", "ms/token", "fastest", "slowest", "first 4 tokens, s", title=protocol)
    for name, row in rows.items():
        label = f"{name}, sparsity {used.sparsity:g}, {used.weights} weights" if name == "larosa" else name
        numbers = (
            row["tokens_per_s"],
            row["ms_per_token"],
            row["fastest_ms"],
            row["slowest_ms"],
            row["first_tokens_s"],
        )
        shown.add_row(label, *(f"{number:.1f}" for number in numbers))
    print_table(shown)
    typer.echo(f"{ratio:.2f}x as fast; {where}, torch {torch.__version__}")


def described(warm: float, spread: "Spread") -> dict[str, float]:
    """A variant's measurements; first_tokens_s: its first four tokens, compile included."""
    return {
        "tokens_per_s": 1 / spread.median,
        "ms_per_token": spread.median * 1e3,
        "fastest_ms": spread.minimum * 1e3,
        "slowest_ms": spread.maximum * 1e3,
        "tokens": spread.count,
        "first_tokens_s": warm,
    }


def _seeded() -> Any:
    """The same random prompt in every run."""
    import torch

    return torch.Generator().manual_seed(0)
