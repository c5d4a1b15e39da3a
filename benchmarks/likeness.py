"""Layers put together by how alike what they read is: an alternative to as many layers a basis each, for comparison."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from larosa_compile.passes.plan import HEAD
from larosa_compile.recipe import Recipe

STEPS = 50
"""Of a bisection for a threshold."""


def shared(layered: Recipe, like: Recipe) -> Recipe:
    """`like` with other bases: as many of them, of neighbouring layers that are most alike.

    layered: the same model with a basis a layer, whose spectra say the second moments.
    """
    bases = _of_readers(layered)
    moments = [_moment(layered, basis) for basis in bases]
    sites = [site for site in like.sites.values() if site.kind != HEAD and site.basis is not None]
    kept = 1 - sum(site.sparsity for site in sites) / len(sites)
    runs = joined(moments, len(_of_readers(like)), kept)
    owner = {bases[layer]: bases[run[0]] for run in runs for layer in run}
    rotations = {basis: q for basis, q in like.rotations.items() if basis not in _of_readers(like)}
    for run in runs:
        rotations[bases[run[0]]] = _basis(_sum(moments, run)).float()
    found = {
        path: replace(site, basis=owner.get(str(layered.sites[path].basis), site.basis))
        for path, site in like.sites.items()
    }
    return replace(like, sites=found, rotations=rotations, spectra={})


def joined(moments: Sequence[Tensor], count: int, kept: float) -> list[list[int]]:
    """Runs of neighbours, `count` of them; at each step the pair is joined that adds least to what is dropped.

    moments: [d, d] float64 each, of trace one. kept: share of the features that every layer keeps.
    """
    runs = [[layer] for layer in range(len(moments))]
    own = [_dropped(moments, run, kept) for run in runs]
    pairs = [_dropped(moments, [layer, layer + 1], kept) for layer in range(len(moments) - 1)]
    while len(runs) > count:
        at = min(range(len(pairs)), key=lambda place: pairs[place] - own[place] - own[place + 1])
        runs[at : at + 2] = [runs[at] + runs[at + 1]]
        own[at : at + 2] = [pairs[at]]
        del pairs[at]
        for place in {max(0, at - 1), at} & set(range(len(pairs))):
            pairs[place] = _dropped(moments, runs[place] + runs[place + 1], kept)
    return runs


def energy_dropped(variances: Tensor, kept: float) -> float:
    """Share of the energy that independent normal entries of these variances lose, kept this share by magnitude."""
    deviations = variances.sqrt().clamp_min(1e-12 * float(variances.max()) ** 0.5)
    low, high = 0.0, 8 * float(deviations.max())
    for _ in range(STEPS):
        threshold = (low + high) / 2
        above = float(torch.erfc(threshold / deviations / math.sqrt(2)).mean())
        low, high = (threshold, high) if above > kept else (low, threshold)
    z = high / deviations
    below = torch.erf(z / math.sqrt(2)) - 2 * z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float((variances * below).sum() / variances.sum())


def _dropped(moments: Sequence[Tensor], run: Sequence[int], kept: float) -> float:
    """Energy that the layers of a run lose in a basis that they share, summed."""
    q = _basis(_sum(moments, run))
    return sum(energy_dropped((q * (moments[layer] @ q)).sum(0).clamp_min(0), kept) for layer in run)


def _sum(moments: Sequence[Tensor], run: Sequence[int]) -> Tensor:
    return torch.stack([moments[layer] for layer in run]).sum(0)


def _basis(moment: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(1)


def _moment(recipe: Recipe, basis: str) -> Tensor:
    q = recipe.rotations[basis].double()
    return q * recipe.spectra[basis].double() @ q.T


def _of_readers(recipe: Recipe) -> list[str]:
    """The bases of a stream, in the order of its layers."""
    found = (site.basis for site in recipe.sites.values() if site.kind != HEAD)
    return list(dict.fromkeys(basis for basis in found if basis is not None))
