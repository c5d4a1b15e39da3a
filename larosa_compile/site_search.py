"""`calibrate(…, allocate="search")`: each site its own sparsity, under one budget in bytes.

The budget is what a decode step reads with the coefficients that the search starts from. Rounds of measuring what a
byte at each site costs at the model's output, all others sparse, and moving bytes to where they save most. A round is
kept if it lowers the loss on text that it was not measured on; what is returned is never worse there than the start.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from larosa_compile import registry
from larosa_compile.budget import Offer, spend
from larosa_compile.calibration import text_digest
from larosa_compile.errors import OptionError
from larosa_compile.held_out import HeldOut, first
from larosa_compile.progress import progress_bar
from larosa_compile.propagation import NEAR, Marginal, PropagatedSite, Propagation
from larosa_compile.recipe import JSON, Recipe

ROUNDS = 4
MEASURED_TOKENS = 4096
"""Of a round: what marginal costs are measured on."""

FIRST_STEP = 0.12
"""How far a site may move in the first round, as a share of its features."""

LAST_STEP = 0.02
MOST_SPARSE = 0.75
"""No site becomes sparser than this, or than it was: beyond, what is measured here says little."""

NEIGHBOURS = 4
"""Sites of one form on either side, in the order of the graph, that a site's scale is taken from."""

MEMORY = 0.6
"""Weight of what earlier rounds measured, when sites were sparse otherwise."""

SMALLEST = 0.05
"""Of the mean slope of sites of one form: the least of any. A slope is noisy, and may come out negative."""


@dataclass
class _State:
    """Where a search is. Slopes and energies by site: per squared activation, summed over tokens that count less
    with every round."""

    key: str
    kept: dict[str, int]
    start: float
    best: float
    step: float
    round: int
    slopes: dict[str, float]
    energies: dict[str, float]


def search_sites(
    model: torch.nn.Module,
    recipe: Recipe,
    held_out: Sequence[Tensor],
    *,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Recipe:
    """The recipe with each site's coefficient chosen on `held_out`, at the bytes that `recipe` reads.

    held_out: token ids [batch, tokens]; every third piece decides what is kept, and the others are measured on.
    resume: a file that is written after every round; a search of the same recipe on the same text goes on from it.

    Raises:
        OptionError: there are fewer than two pieces, the model is traced as several graphs, or `resume` is no file of
            this search.
    """
    text = HeldOut.of(held_out)
    key = _key(recipe, held_out)
    with progress_bar(progress) as bar:
        task = bar.add_task("sparsity of sites", total=1 + ROUNDS)
        state = _read(resume, key)
        propagation = Propagation(model, recipe, text.checked[0])
        sites = {
            name: site
            for name, site in propagation.sites.items()
            if site.feature_bytes and recipe.sites[name].sparsity > 0
        }
        budget = sum(site.feature_bytes * site.kept for site in sites.values())
        dense = [propagation.logits(ids) for ids in text.checked]
        if state is None:
            start = propagation.kept(recipe)
            before = propagation.mean_divergence(text.checked, start, dense)
            state = _State(key, start, before, before, FIRST_STEP, 0, {}, {})
        bar.update(task, completed=1 + state.round)
        while state.round < ROUNDS and state.step >= LAST_STEP and sites:
            squares = _measure(propagation, sites, state, text.measured)
            reached = {name: site for name, site in sites.items() if name in squares}
            rest = sum(site.feature_bytes * state.kept[name] for name, site in sites.items() if name not in squares)
            kept = state.kept | spend(_offers(reached, state, squares), budget - rest)
            found = propagation.mean_divergence(text.checked, kept, dense)
            if found < state.best:
                state.kept, state.best, state.step = kept, found, state.step * 0.7
            else:
                state.step /= 2
            state.round += 1
            _write(resume, state)
            bar.update(task, completed=1 + state.round)
    # Dynamo would hold the graphs, and the weights folded for them
    registry.drop_graphs()
    return _applied(recipe, propagation, state, held_out)


def _measure(
    propagation: Propagation, sites: Mapping[str, PropagatedSite], state: _State, measured: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Adds what this round's share of the batches says to what is known; returns the mean squares by rank."""
    share = len(first(measured, MEASURED_TOKENS))
    for values in (state.slopes, state.energies):
        values.update({name: value * MEMORY for name, value in values.items()})
    sums: dict[str, Marginal] = {}
    for ids in islice(cycle(measured), state.round * share, (state.round + 1) * share):
        _, found = propagation.marginals(ids, state.kept, propagation.logits(ids))
        sums = {name: sums[name] + marginal if name in sums else marginal for name, marginal in found.items()}
    reached = {name: site for name, site in sites.items() if name in sums}
    for name, site in reached.items():
        near = _near(site, state.kept[name], sums[name].squares)
        state.slopes[name] = state.slopes.get(name, 0.0) + sums[name].slope / near
        state.energies[name] = state.energies.get(name, 0.0) + sums[name].energy / near
    return {name: sums[name].squares for name in reached}


def _near(site: PropagatedSite, kept: int, squares: Tensor) -> float:
    """Mean square of the entries that a marginal cost was measured over."""
    around = max(1, round(NEAR * site.features))
    return float(squares[max(0, kept - around) : kept + around].mean().clamp_min(1e-30))


def _offers(sites: Mapping[str, PropagatedSite], state: _State, squares: Mapping[str, Tensor]) -> dict[str, Offer]:
    """What each site's features save, by rank: the site's cost per square, times the mean squares there."""
    costs = _costs(sites, state)
    offers = {}
    for name, site in sites.items():
        savings = costs[name] / site.feature_bytes * squares[name]
        reach, kept = max(1, round(state.step * site.features)), state.kept[name]
        least = min(kept, round((1 - MOST_SPARSE) * site.features))
        offers[name] = Offer(savings, site.feature_bytes, max(1, least, kept - reach), min(site.features, kept + reach))
    return offers


def _costs(sites: Mapping[str, PropagatedSite], state: _State) -> dict[str, float]:
    """What a dropped entry costs per square: a site's energy, on the scale that slopes have among its neighbours.

    A single slope is as large as its noise after one round; the energies are steady, and right between neighbours.
    """
    forms: dict[tuple[str, int, int], list[str]] = {}
    for name, site in sites.items():
        forms.setdefault((site.kind, site.features, site.feature_bytes), []).append(name)
    costs = {}
    for names in forms.values():
        least = SMALLEST * max(0.0, sum(state.slopes[name] for name in names) / len(names))
        for index, name in enumerate(names):
            near = names[max(0, index - NEIGHBOURS) : index + NEIGHBOURS + 1]
            slope = max(least, sum(state.slopes[other] for other in near) / len(near), 1e-30)
            energy = sum(state.energies[other] for other in near) / len(near)
            costs[name] = slope * (state.energies[name] / energy if energy > 0 else 1.0)
    return costs


def _applied(recipe: Recipe, propagation: Propagation, state: _State, held_out: Sequence[Tensor]) -> Recipe:
    sites = dict(recipe.sites)
    for name, site in propagation.sites.items():
        if state.kept[name] == site.kept:
            continue
        sparsity = 1 - state.kept[name] / site.features
        for path in site.paths:
            sites[path] = replace(sites[path], sparsity=sparsity, coefficient=sparsity / recipe.sparsity)
    allocation: dict[str, JSON] = {
        "method": "search",
        "objective": "mean KL(dense || sparse) of next tokens on every third piece, nats",
        "tokens": sum(ids.numel() for ids in held_out),
        "text_digest": text_digest(held_out),
        "rounds": state.round,
        "before": state.start,
        "after": state.best,
    }
    return recipe.with_sites(sites, {"allocation": allocation})


def _key(recipe: Recipe, held_out: Sequence[Tensor]) -> str:
    """What a search is of: its recipe and its text."""
    return f"{recipe.digest} {text_digest(held_out)}"


def _read(resume: str | os.PathLike[str] | None, key: str) -> _State | None:
    """The state that a search of the same recipe and text left, if there is a file."""
    if resume is None:
        return None
    if not Path(resume).absolute().parent.is_dir():
        raise OptionError(f"cannot write {resume}: resume names a file in a folder that exists; give another")
    if not Path(resume).exists():
        return None
    try:
        state = _State(**json.loads(Path(resume).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(
            f"{resume} holds no state of a search ({error}); give the file that an earlier search wrote, or a new name"
        ) from error
    if state.key != key:
        raise OptionError(
            f"{resume} is of a search of another recipe or text, where one of this is allowed; give the same model, "
            "texts and sparsity, or a new name"
        )
    return state


def _write(resume: str | os.PathLike[str] | None, state: _State) -> None:
    if resume is None:
        return
    partial = Path(f"{os.fspath(resume)}.partial")
    partial.write_text(json.dumps(asdict(state)), encoding="utf-8")
    os.replace(partial, resume)
