"""What commands open before they work: recipe first, as it is quick to find fault with; then model and tokenizer."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from larosa_compile.cli.options import Dtype, Weights
from larosa_compile.loading import DTYPES, load_model, load_tokenizer
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe


def open_recipe(path: Path, sparsity: float | None = None, weights: Weights | None = None) -> Recipe:
    """A recipe from its file, at another nominal sparsity and for weights in another format where these are given.

    Raises:
        RecipeError: there is no whole recipe in the file.
    """
    recipe = Recipe.load(path)
    recipe = recipe if sparsity is None else recipe.with_sparsity(sparsity)
    return recipe if weights is None else recipe.with_weights(weights)


def open_model(name: str, dtype: Dtype, device: str | None) -> PreTrainedModel:
    """A model from the hub, a folder or a GGUF file; a bar that only turns shows that it takes its time.

    Raises:
        ModelError: it cannot be loaded.
        OptionError: there is no such device.
    """
    with progress_bar(Path(name).exists()) as bar:  # a download brings bars of its own
        bar.add_task(f"loading {name}", total=None)
        return load_model(name, DTYPES.get(dtype), device)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    with progress_bar(Path(name).exists()) as bar:
        bar.add_task("loading the tokenizer", total=None)
        return load_tokenizer(name)
