"""The recipes that `benchmarks.perplexity` compares: one calibration a method, thresholds measured at each sparsity."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile.passes.plan import kept_features
from larosa_compile.passes.selection import TOP_K
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import OWN_DTYPE
from larosa_compile.report import GraphReport
from larosa_compile.thresholds import with_thresholds

METHODS: dict[str, dict[str, str]] = {
    "larosa": {"rotation": "layer"},
    "larosa-search": {"rotation": "layer", "allocate": "search"},
    "larosa-relative-search": {"rotation": "layer", "allocate": "search", "selection": "relative"},
    "larosa-threshold": {"rotation": "layer", "selection": "threshold"},
    "larosa-relative": {"rotation": "layer", "selection": "relative"},
    "larosa-shared": {"rotation": "auto"},
    "larosa-shared-search": {"rotation": "auto", "allocate": "search"},
    "larosa-shared-relative": {"rotation": "auto", "selection": "relative"},
    "larosa-shared-relative-search": {"rotation": "auto", "allocate": "search", "selection": "relative"},
    "magnitude": {"rotation": "none"},
    "magnitude-relative": {"rotation": "none", "selection": "relative"},
    "teal": {"method": "teal"},
    "teal-greedy": {"method": "teal"},
    "cats": {"method": "cats"},
}
"""Name -> arguments of `calibrate`. "larosa" has the paper's settings, "shared" bases that layers share; magnitude has
the sites of larosa, not rotated, and greedy chooses besides."""

SEARCHED_AT = 0.5
"""The nominal sparsity at whose bytes, as larosa reads them, a search chooses."""

STEPS = 30
"""Of a bisection for a sparsity."""

MOST = 0.95
"""The nominal sparsity that such a bisection goes up to."""


@dataclass(frozen=True)
class Run:
    """A method of choosing what to drop, a format of weights, a nominal sparsity, a protocol.

    place: the sparsity that was asked for, where bytes are made equal to those that larosa skips there.
    """

    method: str
    weights: str
    sparsity: float
    protocol: str = "all"
    place: float | None = None


@dataclass
class Recipes:
    """Recipes of one model, learnt from the same token ids; a calibration is made when it is first asked for.

    searched: what sites' sparsities are chosen on, and thresholds in a rotated basis are measured on. resume: a folder
    where searches write how far they are. folder: where the recipes of runs are saved, if they are to be.
    """

    model: PreTrainedModel
    learnt: list[torch.Tensor]
    searched: list[torch.Tensor] = field(default_factory=list)
    resume: Path | None = None
    folder: Path | None = None
    _made: dict[str, Recipe] = field(default_factory=dict)
    _reports: dict[str, GraphReport] = field(default_factory=dict)

    def of(self, run: Run) -> Recipe:
        """The recipe of a run, thresholds measured at its sparsity."""
        calibrated = self.calibrated(run.method)
        recipe = calibrated.with_sparsity(run.sparsity)
        if promises_an_average(recipe) and recipe.sparsity != calibrated.sparsity:
            recipe = self._with_thresholds(recipe)
        recipe = recipe.with_weights(run.weights)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{run.method}-{100 * run.sparsity:.0f}" + (f"-{run.weights}" if run.weights != OWN_DTYPE else "")
            recipe.save(self.folder / f"{name}.larosa.safetensors")
        return recipe

    def equal_bytes(self, method: str, share: float) -> float | None:
        """The nominal sparsity at which a method skips this share of the linear weight bytes; None if it never does.

        As far as a recipe promises: thresholds keep their share on average.
        """
        recipe = self.calibrated(method)
        if self.promised(method, recipe.with_sparsity(MOST)) < share:
            return None
        low, high = 0.0, MOST
        for _ in range(STEPS):
            middle = (low + high) / 2
            skipped = self.promised(method, recipe.with_sparsity(middle))
            low, high = (middle, high) if skipped < share else (low, middle)
        return high

    def promised(self, method: str, recipe: Recipe) -> float:
        """The share of linear weight bytes that a recipe of a method skips, weights in the model's dtype."""
        report = self.report(method)
        shares = {
            site.paths[0]: kept_features(recipe.sites[site.paths[0]].sparsity, site.features) / site.features
            for site in report.sites
        }
        return report.with_shares(shares).bytes_skipped_share

    def report(self, method: str) -> GraphReport:
        """What `explain` says of a method."""
        if method not in self._reports:
            recipe = self.calibrated(method)
            self._reports[method] = larosa_compile.explain(self.model, recipe=recipe).graphs[0]
        return self._reports[method]

    def calibrated(self, method: str) -> Recipe:
        """The recipe of a method, at the sparsity that it was made at; made when it is first asked for."""
        if method not in self._made:
            self._made[method] = self._make(method)
        return self._made[method]

    def _make(self, method: str) -> Recipe:
        asked: dict[str, Any] = dict(METHODS[method])
        if "rotation" in asked and "selection" in asked:
            # what `calibrate` would make with these arguments; its longest part is made once
            selection = asked.pop("selection")
            plainer = next(name for name, arguments in METHODS.items() if arguments == asked)
            return self._with_thresholds(self.calibrated(plainer).with_selection(selection))
        sparsity: float | None = SEARCHED_AT
        if method.endswith("-greedy"):
            asked["search"] = self.learnt[:1]
        if "allocate" in asked:
            share = self.promised("larosa", self.calibrated("larosa"))
            plainer = next(name for name, arguments in METHODS.items() if arguments == {"rotation": asked["rotation"]})
            sparsity = self.equal_bytes(plainer, share)
            asked["search"] = self.searched
            if self.resume is not None:
                self.resume.mkdir(parents=True, exist_ok=True)
                asked["resume"] = self.resume / f"{method}.json"
        assert sparsity is not None
        return larosa_compile.calibrate(self.model, self.learnt, sparsity, **asked)

    def _with_thresholds(self, recipe: Recipe) -> Recipe:
        return with_thresholds(self.model, recipe, (recipe.rotations and self.searched) or self.learnt)


def promises_an_average(recipe: Recipe) -> bool:
    """Whether a site of a recipe keeps what it does on average only."""
    return any(site.selection != TOP_K for site in recipe.sites.values())
