"""`calibrate`: a model and some text in, a recipe out."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

import larosa_compile
from larosa_compile import registry
from larosa_compile.allocation import CANDIDATES, Coefficients, Rotation
from larosa_compile.allocation import allocate as allocated
from larosa_compile.arguments import checked_count, checked_sparsity
from larosa_compile.block_search import greedy_allocation
from larosa_compile.capture import Boxed, Captured, boxed, capture, check_has_values, check_is_readable, compile_alone
from larosa_compile.errors import InferenceOnlyError, OptionError, RecipeError
from larosa_compile.fingerprint import fingerprint
from larosa_compile.kernels import half
from larosa_compile.methods import GREEDY, SITES, Allocation, Asked, asked
from larosa_compile.moments import Moments, observe
from larosa_compile.passes.pipeline import facts_of
from larosa_compile.passes.selection import GATE, TOP_K
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import JSON, Recipe
from larosa_compile.recipe_checks import LAROSA
from larosa_compile.released import check_not_released
from larosa_compile.site import SiteRecipe
from larosa_compile.thresholds import with_thresholds

Allocations = dict[Rotation, dict[str, SiteRecipe]]
"""Sites by path, for each of several ways to share bases between layers."""

Batches = str | Iterable[str] | Iterable[Tensor]
"""Token ids `[batch, tokens]` or `[tokens]`, or texts, for which a tokenizer is needed."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer: text in, a mapping with `input_ids` out."""

    def __call__(self, text: str) -> Mapping[str, Any]: ...


def calibrate(
    model: torch.nn.Module,
    batches: Batches,
    sparsity: float = 0.5,
    *,
    tokenizer: Tokenizer | None = None,
    context: int = 1024,
    method: str = LAROSA,
    selection: str | None = None,
    rotation: Rotation | None = None,
    coefficients: Coefficients | None = None,
    allocate: Allocation = "paper",
    search: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Recipe:
    """Measures a model on some text; the recipe is also remembered for a bare `torch.compile` of that model.

    Runs the captured graph over the batches once, summing second moments of the normalised stream activations
    in float64; nothing else is kept. Their eigenvectors are the rotations. Where a threshold selects, it runs over them
    once more, with the sites sparse, and counts magnitudes.

    Args:
        model: in eval mode, on its device; called as `model(input_ids=ids, use_cache=False)`.
        batches: token ids [batch, tokens], or texts; texts are joined and cut into windows of `context` tokens.
        sparsity: nominal share of activations to drop, in [0, 1).
        tokenizer: turns texts into token ids; needed for texts only.
        context: window length for texts, in tokens.
        method: "larosa"; "teal" (thresholds on magnitudes, no rotation, head dense); "cats" (thresholds on activated
            gates, no rotation: linears that read a gated product are sparse, all others dense).
        selection: how a site chooses what to keep. larosa: "top-k" (its own: every token drops the same share),
            "threshold" or "relative" (in units of a row's root mean square); teal: "threshold" (its own) or "relative";
            cats: "gate". Thresholds keep what was promised on average over text like `batches`.
        rotation: how many layers share a basis: "layer" (one each, as in the paper), "model" (all), a number of them,
            "none" (no rotation, as the other methods have it), or "auto", the default of larosa: as few bases as keep
            residual adapters below 2 % of the weight bytes read inside blocks, and with allocate="search" the best of
            several ways to share at these bytes.
        coefficients: site sparsity per unit of nominal sparsity by kind; by default the paper's values for larosa, and
            1 for the others.
        allocate: how sparsity is split. "paper": with these coefficients, or where there is held-out text as the
            method's paper chooses (larosa: the pair by kind that is best on it, Algorithm 1; teal: greedy by block, on
            the first of these batches; cats: nothing to choose). "search": each site its own, at the bytes that the
            coefficients would read, from what a byte at each costs at the model's output.
        search: held-out batches to choose on, and where a threshold selects in a rotated basis to measure it on; not
            those that were calibrated on.
        resume: a file that allocate="search" writes after each of its rounds, and goes on from where it is there.
        progress: show a progress bar on a terminal.

    Raises:
        InferenceOnlyError: the model is in training mode.
        ModelError: its weights are on the meta device, or of a class whose values cannot be read.
        ReleasedWeightsError: its weights were released after they were folded.
        OptionError: an argument is out of range, or texts came without a tokenizer.
        RecipeError: there was nothing to calibrate (no batches, or no residual stream in the model).

    Source: LaRoSA (arXiv 2507.01299) sections 3.2-3.4; TEAL (arXiv 2408.14690); CATS (arXiv 2404.08763).
    """
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, got {type(model).__name__}; load it and give it here")
    check_not_released(model.parameters())
    check_has_values(model.parameters())
    check_is_readable(model.parameters())
    if model.training:
        raise InferenceOnlyError("the model is in training mode; call model.eval() before calibrating it")
    sparsity = checked_sparsity("sparsity", sparsity)
    context = checked_count("context", context, least=1)
    plan = asked(method, selection, rotation, coefficients, allocate, search is not None)
    if resume is not None and (allocate != "search" or not isinstance(resume, (str, os.PathLike))):
        raise OptionError(
            f"resume must be None, or the path of a file with allocate='search', got {resume!r} with {allocate!r}; "
            "give both, or neither"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise OptionError(f"tokenizer must be callable or None, got {type(tokenizer).__name__}; give the model's own")
    ids = list(token_batches(batches, tokenizer, context))
    if not ids:
        raise RecipeError(
            "nothing to calibrate on: batches held no token, and at least one is needed; pass token ids or texts"
        )
    held_out = list(token_batches(search, tokenizer, context)) if search is not None else None
    if held_out == []:
        raise OptionError("search needs held-out token ids or texts, got none; pass some, or leave search out")

    registry.remember_paths(model)
    # the bases of every candidate are sums of those of layers
    compares = plan.search == SITES and plan.rotation == "auto"
    observed_in: Rotation = "layer" if compares else plan.rotation
    allocations: Allocations = {way: {} for way in (CANDIDATES if compares else (observed_in,))}
    sites, moments = allocations[observed_in], Moments()
    observed = _observing(model, allocations, sites, moments, sparsity, plan)
    with torch.no_grad(), progress_bar(progress) as bar:
        # without rotations there is nothing to learn here but which sites there are
        for batch in bar.track(ids if plan.rotation != "none" else ids[:1], description="calibrating"):
            observed(input_ids=batch, use_cache=False)
        if not sites:
            raise RecipeError(_without_sites(plan))
        eigen = bar.add_task("eigenvectors", total=None)
        rotations, spectra = moments.principal_components()
        bar.remove_task(eigen)

    recipe = Recipe(sparsity, sites, rotations, fingerprint(model), _provenance(ids, plan), spectra, method=plan.method)
    if held_out is not None and compares:
        from larosa_compile.granularity import best_granularity, with_other_bases

        recipe = best_granularity(model, with_other_bases(recipe, moments, allocations), held_out, progress)
    if held_out is not None:
        recipe = _chosen_on(held_out, model, recipe, plan, progress, resume)
    if plan.selection != TOP_K:
        # a basis fits the text that it was learnt from, and leaves more in the trailing features of any other
        unseen = held_out if held_out is not None and recipe.rotations else ids
        recipe = with_thresholds(model, recipe, unseen, progress)
    registry.remember_recipe(model, recipe)
    return recipe


def _chosen_on(
    held_out: list[Tensor],
    model: torch.nn.Module,
    recipe: Recipe,
    plan: Asked,
    progress: bool,
    resume: str | os.PathLike[str] | None,
) -> Recipe:
    """The recipe with its sparsity split as was asked for. What runs the compiled model is imported when it does."""
    if plan.search == GREEDY:
        return greedy_allocation(model, recipe, held_out[0], progress)
    from larosa_compile.search import best_coefficients
    from larosa_compile.site_search import search_sites

    # thresholds are measured at the sparsities that are chosen here
    exact = recipe.with_selection(TOP_K)
    if plan.search == SITES:
        found = search_sites(model, exact, held_out, progress=progress, resume=resume)
    else:
        found = best_coefficients(model, exact, held_out, progress=progress)
    return found.with_selection(plan.selection)


def token_batches(batches: Batches, tokenizer: Tokenizer | None, context: int) -> Iterator[Tensor]:
    """Token ids `[batch, tokens]`, one batch at a time; texts are joined and cut into windows, the rest dropped.

    Raises:
        OptionError: a text without a tokenizer, or an item that is neither text nor an integer tensor.
    """
    if not isinstance(batches, Iterable):
        raise OptionError(f"batches must be texts or token ids, got {_described(batches)}; give a list of them")
    items = [batches] if isinstance(batches, str) else list(batches)
    texts = [item for item in items if isinstance(item, str)]
    if texts and len(texts) == len(items):
        if tokenizer is None:
            raise OptionError(
                "batches are texts and got no tokenizer, which only token ids may do without; pass tokenizer=… as well"
            )
        # joined first, so that the tokenizer adds its special tokens once and not to every row of a dataset
        yield from _windows(tokenizer("\n\n".join(texts))["input_ids"], context)
        return
    for item in items:
        if not isinstance(item, Tensor) or item.dtype not in (torch.int32, torch.int64) or item.ndim not in (1, 2):
            raise OptionError(
                f"a batch must be a text or an integer tensor [batch, tokens], got {_described(item)}; give "
                "texts only, or token ids only"
            )
        if item.numel():
            yield item.reshape(-1, item.shape[-1])


def _windows(tokens: Sequence[int], context: int) -> Iterator[Tensor]:
    if len(tokens) < context:
        windows = [tokens] if tokens else []
    else:
        windows = [tokens[start : start + context] for start in range(0, len(tokens) - context + 1, context)]
    yield from (torch.tensor([window]) for window in windows)


def _described(item: object) -> str:
    return f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__


def _observing(
    model: torch.nn.Module,
    allocations: Allocations,
    observed: dict[str, SiteRecipe],
    moments: Moments,
    sparsity: float,
    plan: Asked,
) -> Any:
    """The model compiled so that its own graphs report to `moments`, in the bases of the sites of one allocation.

    Fills all allocations as graphs are captured.
    """

    def observe_graph(captured: Captured) -> Boxed:
        facts = facts_of(captured.graph, captured.fake_mode)
        for way, sites in allocations.items():
            sites |= allocated(facts, sparsity, plan.coefficients, way, plan.selection)
        observe(facts, observed, moments.add)
        module = captured.graph.module
        half.replace_products(module.graph)
        module.recompile()
        return boxed(lambda inputs: module(*inputs))

    def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return capture(graph, example_inputs, observe_graph)

    return compile_alone(model, backend)


def _without_sites(plan: Asked) -> str:
    if plan.selection == GATE:
        return (
            "no linear of this model reads an activated gate times a linear of the same activation, so there is no "
            "site for method 'cats'; use method='larosa' or 'teal'"
        )
    return "no linear of this model feeds a residual stream, so there is no site to make sparse"


def _provenance(ids: list[Tensor], plan: Asked) -> dict[str, JSON]:
    return {
        "tokens": sum(batch.numel() for batch in ids),
        "windows": sum(batch.shape[0] for batch in ids),
        "text_digest": text_digest(ids),
        "rotation": plan.rotation,
        "versions": versions(),
    }


def text_digest(batches: Sequence[Tensor]) -> str:
    """Hex SHA-256 over token ids."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, JSON]:
    """What a recipe says it was made with."""
    return {
        "larosa_compile": larosa_compile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
