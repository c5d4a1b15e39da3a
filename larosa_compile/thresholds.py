"""Thresholds measured: what share of the entries that a site selects from lies below a number, on some text.

The graph that is measured is the rewritten one, run operation by operation with its thresholds at work: each site drops
its share of every batch, and so meets what the sparse sites before it leave. Thresholds taken from a dense model would
drop another share than they promise.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from larosa_compile.kernels import ops
from larosa_compile.passes.pipeline import Rewritten
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe
from larosa_compile.site import QUANTILES
from larosa_compile.stepwise import compile_stepwise

_SHIFT = 15
"""Bits of a float32 that a bin of the histogram leaves out: eight of the mantissa are left, bins 0.4 % wide."""

_BINS = 1 << (31 - _SHIFT)

_MEASURED_FROM = 0.1
"""Sparsity that a site is planned with at least, so that it has a threshold to be measured; it drops its own share."""


class Magnitudes:
    """A histogram of magnitudes, spaced as floating-point numbers are: half a megabyte, however much is added."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, magnitudes: Tensor) -> None:
        """Adds every entry, float32 and not negative; what is no number counts as largest."""
        bits = magnitudes.contiguous().view(torch.int32).flatten() & 0x7FFF_FFFF
        self.counts += torch.bincount(bits >> _SHIFT, minlength=_BINS).to(self.counts.device)

    def quantile(self, share: float) -> float:
        """The number that this share of the entries lies below, linear within a bin."""
        return self.quantiles((share,))[0]

    def quantiles(self, shares: Sequence[float]) -> tuple[float, ...]:
        """`quantile` of each share; 0 for a share of 0."""
        total = self.counts.cumsum(0).double()
        wanted = torch.tensor(shares, dtype=torch.float64) * total[-1]
        place = torch.searchsorted(total, wanted).clamp_max(_BINS - 1)
        count = self.counts[place].double().clamp_min(1)
        within = ((wanted - (total[place] - count)) / count).clamp(0, 1)
        low, high = (((place + step) << _SHIFT).int().view(torch.float32).double() for step in (0, 1))
        largest = torch.finfo(torch.float32).max
        found = torch.lerp(low.nan_to_num(largest), high.nan_to_num(largest), within)
        return tuple(torch.where(wanted > 0, found, 0.0).tolist())


def with_thresholds(model: torch.nn.Module, recipe: Recipe, batches: Sequence[Tensor], progress: bool = True) -> Recipe:
    """The recipe with the thresholds of its sites measured on token ids [batch, tokens], at its nominal sparsity."""
    measured: dict[tuple[str, ...], Magnitudes] = {}
    planned = {path: replace(site, sparsity=max(site.sparsity, _MEASURED_FROM)) for path, site in recipe.sites.items()}

    compiled = compile_stepwise(
        model, recipe, lambda module, rewritten: _Measuring(module, rewritten, recipe, measured), planned
    )
    with torch.no_grad(), progress_bar(progress) as bar:
        for batch in bar.track(batches, description="thresholds"):
            compiled(input_ids=batch, use_cache=False)
    shares = [index / QUANTILES for index in range(QUANTILES)]
    sites = dict(recipe.sites)
    for paths, magnitudes in measured.items():
        quantiles = magnitudes.quantiles(shares)
        sites |= {path: replace(sites[path], quantiles=quantiles) for path in paths}
    # at another sparsity, sites would meet something else
    return recipe.with_sites(sites, {"thresholds_at": recipe.sparsity})


class _Measuring(Interpreter):
    """Runs a rewritten graph; each threshold is that of the site's sparsity in the batch at hand, and is counted."""

    def __init__(
        self, module: GraphModule, rewritten: Rewritten, recipe: Recipe, measured: dict[tuple[str, ...], Magnitudes]
    ) -> None:
        super().__init__(module)
        self._measured = measured
        self._paths: dict[Node, tuple[str, ...]] = {
            folded.selected: tuple(linear.path for linear in folded.site.linears)
            for folded in rewritten.sites
            if folded.selected is not None
        }
        self._sparsity = {node: recipe.sites[paths[0]].sparsity for node, paths in self._paths.items()}

    def run_node(self, n: Node) -> Any:
        if n not in self._paths:
            return super().run_node(n)
        (dense, _, relative), _ = self.fetch_args_kwargs_from_env(n)
        magnitudes = dense.float().abs()
        if relative:
            length = magnitudes.square().mean(-1, keepdim=True).sqrt()
            magnitudes = magnitudes / length.clamp_min(torch.finfo(torch.float32).tiny)
        batch = Magnitudes()
        batch.add(magnitudes)
        self._measured.setdefault(self._paths[n], Magnitudes()).counts += batch.counts
        return ops.keep_above(dense, batch.quantile(self._sparsity[n]), relative)
