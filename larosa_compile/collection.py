"""What the graphs of one model see of its traffic, until it is enough for a recipe."""

import logging
import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from larosa_compile import registry
from larosa_compile.calibration import versions
from larosa_compile.capture import Captured
from larosa_compile.errors import MissingRecipeError, RecipeError
from larosa_compile.fingerprint import fingerprint
from larosa_compile.moments import Moments
from larosa_compile.recipe import JSON, Recipe
from larosa_compile.site import SiteRecipe

_log = logging.getLogger("larosa_compile")


class Collection:
    """What the graphs of one model have seen, and the recipe that it became. Safe to use from several threads.

    paths: parameter -> the path it is known by here, whichever graph it is met in.
    """

    def __init__(self, sparsity: float, wanted: int) -> None:
        self.sparsity, self.wanted = sparsity, wanted
        self.paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.recipe: Recipe | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._sites: dict[str, SiteRecipe] = {}
        self._moments = Moments()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self._moments.tokens

    def names(self, captured: Captured) -> dict[str, str] | None:
        """Path in a graph -> path here; None where two parameters would have one name."""
        known = {
            captured.graph.paths[node]: self.paths.get(tensor, captured.graph.paths[node])
            for node, tensor in captured.tensors.items()
        }
        taken = {path: parameter for parameter, path in self.paths.items()}
        clash = any(
            taken.get(known[captured.graph.paths[node]], tensor) is not tensor
            for node, tensor in captured.tensors.items()
        )
        return None if clash or len(set(known.values())) < len(known) else known

    def join(self, captured: Captured, sites: Mapping[str, SiteRecipe]) -> dict[str, SiteRecipe]:
        """Adds a graph, its parameters named by `names`; returns its sites.

        A site that an earlier graph has keeps the basis it has there, as one rotation belongs to one recipe.
        """
        with self._lock:
            for node, tensor in captured.tensors.items():
                self.paths[tensor] = captured.graph.paths[node]
            self._shapes |= captured.shapes
            self._sites = dict(sites) | self._sites
            joined = {path: replace(self._sites[path], sparsity=site.sparsity) for path, site in sites.items()}
        registry.remember_collection(captured.tensors.values(), self)
        return joined

    def add(self, basis: str, reader: Hashable, activation: Tensor, attention_mask: Tensor | None = None) -> None:
        """Adds what a reader sees [..., d], but for padding and what is not finite; nothing once there is a recipe."""
        with self._lock:
            if self.recipe is None:
                self._moments.add(basis, reader, _tokens_of(activation, attention_mask))

    def learnt(self) -> Recipe | None:
        """The recipe, from when enough tokens were seen of everything that will be rotated."""
        if self.recipe is None and self._moments.tokens >= self.wanted:
            with self._lock:
                bases = {site.basis for site in self._sites.values()} - {None}
                if self.recipe is None and bases <= self._moments.sums.keys():
                    self.recipe = self._made()
                    self._moments = Moments()
        return self.recipe

    def _made(self) -> Recipe:
        tokens = self._moments.tokens
        provenance: dict[str, JSON] = {
            "tokens": tokens,
            "source": "traffic",
            "rotation": "auto",
            "versions": versions(),
        }
        rotations, spectra = self._moments.principal_components()
        recipe = Recipe(self.sparsity, self._sites, rotations, self._shapes, provenance, spectra)
        registry.remember_learnt(self, recipe)
        _log.warning(
            "larosa has seen %d tokens of this model's traffic and now runs it sparse (nominal sparsity %g); "
            "larosa_compile.recipe_of(model).save(path) keeps what it learnt",
            tokens,
            self.sparsity,
        )
        return recipe


def is_whole(parameters: Iterable[Tensor]) -> bool:
    """Whether what was learnt of any of these parameters was learnt of all; so it is where nothing was learnt."""
    tensors = list(parameters)
    known = registry.collections_of(tensors)
    return not known or any(all(tensor in collection.paths for tensor in tensors) for collection in known)


def recipe_of(model: torch.nn.Module) -> Recipe:
    """The recipe of a model: the one it was calibrated with or given, or the one learnt from its traffic.

    model: a model, or what `torch.compile` returned for it.

    Raises:
        MissingRecipeError: there is none, or not yet.
        RecipeError: the model was compiled in parts, each of which learnt a recipe of its own.
    """
    original: torch.nn.Module = getattr(model, "_orig_mod", model)
    collections = registry.collections_of(original.parameters())
    recipe = registry.recipe_of(original.parameters())
    if recipe is None:
        seen = max((collection.tokens for collection in collections), default=0)
        wanted = max((collection.wanted for collection in collections), default=0)
        learning = f"it has seen {seen} of the {wanted} tokens it learns from; " if collections else ""
        raise MissingRecipeError(
            f"this model has no recipe: {learning}call the compiled model with more tokens, or make a recipe with "
            "larosa_compile.calibrate(model, batches)"
        )
    if not collections:
        return recipe
    if len(collections) > 1:
        raise RecipeError(
            f"this model was compiled in {len(collections)} parts with a recipe each, and one is allowed; make one for "
            "all of it with larosa_compile.calibrate(model, batches)"
        )
    known = collections[0].paths
    names = {known[p]: path for path, p in original.named_parameters() if p in known}
    sites = {names[path]: site for path, site in recipe.sites.items()}
    return Recipe(recipe.sparsity, sites, recipe.rotations, fingerprint(original), recipe.calibration)


def _tokens_of(activation: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The rows [tokens, d] of an activation [..., d] that are finite and no padding, where a mask tells.

    attention_mask: [batch, columns], 0 for padding, or [batch, …, columns, keys], True or near 0 for what may be seen:
    a query that sees nothing is padding. The last columns are the last tokens. Where the numbers do not fit, or the
    mask would leave nothing, as one that reaches beyond the tokens does, every row counts.
    """
    with torch.inference_mode(False), torch.no_grad():
        rows = activation.reshape(-1, activation.shape[-1])
        kept = rows.isfinite().all(-1)
        if attention_mask is not None:
            attended = _attended(attention_mask)
            tokens, rest = divmod(len(rows), len(attended))
            last = attended[:, attended.shape[1] - tokens :]
            if not rest and tokens <= attended.shape[1] and bool(last.any()):
                kept = kept & last.flatten().to(kept.device)
        return rows if bool(kept.all()) else rows[kept]


def _attended(mask: Tensor) -> Tensor:
    """A mask as booleans [batch, columns]."""
    if mask.ndim == 2:
        return mask != 0
    visible = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    return visible.any(-1).flatten(1, -2).any(1) if mask.ndim > 3 else visible.any(-1)
