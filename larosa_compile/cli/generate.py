"""`larosa generate`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from larosa_compile.cli.options import (
    AsJson,
    Device,
    DtypeOption,
    Model,
    OptionalRecipeFile,
    OtherSparsity,
    OtherWeights,
)

if TYPE_CHECKING:
    from larosa_compile.generation import Continuation


def generate(
    model: Model,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What to go on from; may be given again.", show_default=False)
    ],
    recipe: OptionalRecipeFile = None,
    sparsity: OtherSparsity = None,
    weights: OtherWeights = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of each prompt.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="A prompt is a user's turn; by default if there is a template."),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Run the uncompiled model, to compare with.")] = False,
    dtype: DtypeOption = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Generate text, greedily, and say how fast."""
    if recipe is None and not dense:
        raise typer.BadParameter(
            "a recipe says what to skip, got none; give its file, or --dense", param_hint="--recipe"
        )
    from larosa_compile.cli.opening import open_model, open_recipe, open_tokenizer
    from larosa_compile.cli.output import note, print_json
    from larosa_compile.generation import Generator, prompt_ids
    from larosa_compile.progress import progress_bar

    used = None if dense or recipe is None else open_recipe(recipe, sparsity, weights)
    tokenizer = open_tokenizer(model)
    prompts = [prompt_ids(tokenizer, text, chat) for text in prompt]
    loaded = open_model(model, dtype, device)
    generator = Generator(loaded, tokenizer, prompts, max_new_tokens, used)
    with progress_bar(True) as bar:
        bar.add_task("warming up" if used is None else "compiling", total=None)
        warm_up_s = generator.warm_up()
    results = []
    for text, ids in zip(prompt, prompts, strict=True):
        found = generator.continuation(ids, visible=not as_json)
        results.append({"prompt": text} | described(found))
        if not as_json:
            note(speed(found))
    graphs = generator.compiled_graphs
    skipped = graphs[-1].bytes_skipped_share if graphs else 0.0
    if as_json:
        print_json(
            {
                "model": model,
                "recipe": used.digest if used else None,
                "sparsity": used.sparsity if used else 0.0,
                "weights": used.weights if used else "model",
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "device": str(loaded.device),
                "compile_s": warm_up_s if used else None,
                "compiled_graphs": len(graphs),
                "bytes_skipped_share": skipped,
                "continuations": results,
            }
        )
    elif used is None:
        note(f"not compiled, warmed up in {warm_up_s:.1f} s")
    else:
        note(
            f"compiled in {warm_up_s:.1f} s, {len(graphs)} graph(s) for {len(prompts)} prompt(s); "
            f"{skipped:.1%} of linear weight bytes skipped per token"
        )


def speed(found: "Continuation") -> str:
    """How fast a continuation was made, in one line."""
    decoded = f", then {found.tokens_per_s:.1f} tokens/s" if found.tokens_per_s is not None else ""
    return (
        f"[{found.prompt_tokens} tokens of prompt, {found.new_tokens} new; "
        f"first after {found.prefill_s:.2f} s{decoded}]"
    )


def described(found: "Continuation") -> dict[str, Any]:
    """A continuation as JSON values."""
    return {
        "text": found.text,
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": found.new_tokens,
        "prefill_s": found.prefill_s,
        "decode_s": found.decode_s,
        "tokens_per_s": found.tokens_per_s,
    }
