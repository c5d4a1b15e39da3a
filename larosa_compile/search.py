"""The paper's Algorithm 1: a grid search over how sparsity is split between kinds of linears."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from larosa_compile import registry
from larosa_compile.allocation import Coefficients
from larosa_compile.errors import OptionError
from larosa_compile.evaluation import next_token_losses
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe

GRID = tuple(Coefficients(readers=readers / 10, writers=2 - readers / 10) for readers in range(5, 12))
"""Pairs whose mean is 1, so that the four activations of a layer keep the nominal sparsity on average."""


def best_coefficients(
    model: torch.nn.Module,
    recipe: Recipe,
    held_out: Sequence[Tensor],
    *,
    grid: Sequence[Coefficients] = GRID,
    progress: bool = True,
) -> Recipe:
    """The recipe with the coefficients of the grid under which the sparse model predicts `held_out` best.

    Runs the rewritten graphs eagerly, one compile per grid point; resets Dynamo's caches in between, so that
    the number of candidates never meets its recompile limit.

    Raises:
        OptionError: there is no held-out token.

    Source: LaRoSA (arXiv 2507.01299) Algorithm 1, with next-token loss as the objective.
    """
    if not held_out:
        raise OptionError("search needs held-out token ids or texts, got none")
    scored = []
    with progress_bar(progress) as bar:
        for coefficients in bar.track(grid, description="coefficients"):
            by_kind = {"reader": coefficients.readers, "writer": coefficients.writers}
            candidate = recipe.with_coefficients(by_kind)
            options: Any = {"recipe": candidate, "lowering": "eager"}
            losses = next_token_losses(torch.compile(model, backend="larosa", options=options), held_out)
            registry.drop_graphs()
            scored.append((sum(losses), candidate))
    return min(scored, key=lambda pair: pair[0])[1]
