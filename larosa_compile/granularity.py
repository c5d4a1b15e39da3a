"""How many layers share a basis, by what each way costs at the model's output when all of them read the same bytes.

A basis more fits its layers better; its residual adapter is read whole, and what it reads has to be dropped elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from larosa_compile import registry
from larosa_compile.allocation import Rotation
from larosa_compile.held_out import HeldOut
from larosa_compile.moments import Moments
from larosa_compile.progress import progress_bar
from larosa_compile.propagation import Propagation
from larosa_compile.recipe import Recipe
from larosa_compile.site import MAX_SPARSITY, SiteRecipe

FACTORS = (0.5, 2.0)
"""Between these, coefficients are scaled for that; what cannot have the bytes is left out."""

STEPS = 30
"""Of a bisection for a sparsity."""


def with_other_bases(
    recipe: Recipe, moments: Moments, allocations: Mapping[Rotation, Mapping[str, SiteRecipe]]
) -> dict[Rotation, Recipe]:
    """The recipe at each of these granularities, without those that come to the same.

    moments: of the recipe's bases. allocations: its sites, each of whose bases is that of one or more of the recipe's.
    """
    made: dict[Rotation, Recipe] = {}
    for rotation, sites in allocations.items():
        if any(sites == other.sites for other in made.values()):
            continue
        made[rotation] = recipe if sites == recipe.sites else _with_bases(recipe, moments, sites)
    return made


def _with_bases(recipe: Recipe, moments: Moments, sites: Mapping[str, SiteRecipe]) -> Recipe:
    bases = ((site.basis, sites[path].basis) for path, site in recipe.sites.items())
    owners = {basis: owner for basis, owner in bases if basis is not None and owner is not None}
    rotations, spectra = moments.joined(owners).principal_components()
    return replace(recipe, sites=sites, rotations=rotations, spectra=spectra)


def best_granularity(
    model: torch.nn.Module, candidates: Mapping[Rotation, Recipe], held_out: Sequence[Tensor], progress: bool = True
) -> Recipe:
    """The candidate under which the sparse model is nearest to the dense one, at the bytes that the first one reads.

    The others drop less or more for that, every site by one factor. held_out: token ids [batch, tokens].

    Raises:
        OptionError: there are fewer than two pieces of text, or the model is traced as several graphs.
    """
    text = HeldOut.of(held_out)
    with torch.no_grad():
        dense = [model(input_ids=ids, use_cache=False).logits for ids in text.checked]
    fitted: dict[Rotation, Recipe] = {}
    found: dict[Rotation, float] = {}
    budget = 0
    with progress_bar(progress) as bar:
        for rotation, candidate in bar.track(candidates.items(), description="layers a basis"):
            propagation = Propagation(model, candidate, text.checked[0])
            budget = budget or propagation.bytes_read(propagation.kept(candidate))
            recipe = _fitted(candidate, propagation, budget)
            kept = propagation.kept(recipe)
            if propagation.bytes_read(kept) <= budget:
                fitted[rotation] = recipe
                found[rotation] = propagation.mean_divergence(text.checked, kept, dense)
            # Dynamo would hold the graphs, and the weights folded for them
            registry.drop_graphs()
    best = min(found, key=lambda rotation: found[rotation])
    compared = {str(rotation): divergence for rotation, divergence in found.items()}
    return fitted[best].with_sites(fitted[best].sites, {"rotation": best, "rotations_compared": compared})


def _fitted(recipe: Recipe, propagation: Propagation, budget: int) -> Recipe:
    """The recipe with every coefficient times one factor, the smallest with which it reads no more than `budget`."""
    low, high = FACTORS
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = propagation.bytes_read(propagation.kept(_scaled(recipe, middle))) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return _scaled(recipe, high)


def _scaled(recipe: Recipe, factor: float) -> Recipe:
    sites = {
        path: replace(
            site,
            coefficient=site.coefficient * factor,
            sparsity=min(site.coefficient * factor * recipe.sparsity, MAX_SPARSITY),
        )
        for path, site in recipe.sites.items()
    }
    return recipe.with_sites(sites)
