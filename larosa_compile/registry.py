"""What this process knows about a model, held by its parameters and gone with them: its recipe, what is being
collected for one, its reports."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from larosa_compile.collection import Collection
    from larosa_compile.recipe import Recipe
    from larosa_compile.report import GraphReport

_paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
_recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()
_collections: WeakIdKeyDictionary = WeakIdKeyDictionary()
_reports: WeakIdKeyDictionary = WeakIdKeyDictionary()
_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember_paths(model: torch.nn.Module) -> None:
    """Makes this process know the parameters of `model` by their paths in it, whichever part of it is compiled."""
    for path, parameter in model.named_parameters():
        _paths[parameter] = path


def path_of(parameter: Tensor) -> str | None:
    """The path of a parameter in the model it was remembered with."""
    path: str | None = _paths.get(parameter)
    return path


def remember_origin(model: torch.nn.Module, origin: str) -> None:
    """Makes reports say what the weights of `model` were before, such as "were dequantised from a.gguf"."""
    for parameter in model.parameters():
        _origins[parameter] = origin


def origin_of(parameter: Tensor) -> str | None:
    """What a parameter was before, if that is known."""
    origin: str | None = _origins.get(parameter)
    return origin


def remember_recipe(model: torch.nn.Module, recipe: "Recipe") -> None:
    """Makes `recipe` the one that a compile of `model` without options uses."""
    remember_paths(model)
    replaces = recipe_of(model.parameters()) is not None or any(p in _collections for p in model.parameters())
    for parameter in model.parameters():
        _recipes[parameter] = recipe
        _collections.pop(parameter, None)
    if replaces:
        # graphs compiled from the old recipe are equal to Dynamo's eye: same model, same backend, same options
        drop_graphs()


def drop_graphs() -> None:
    """Forgets every compiled graph, and what was reported of them."""
    torch._dynamo.reset()
    _reports.clear()


def recipe_of(parameters: Iterable[Tensor]) -> "Recipe | None":
    """The recipe of the first parameter that has one."""
    return next((_recipes[parameter] for parameter in parameters if parameter in _recipes), None)


def remember_collection(parameters: Iterable[Tensor], collection: "Collection") -> None:
    """Makes `collection` the one that graphs of these parameters report to."""
    for parameter in parameters:
        _collections[parameter] = collection


def collections_of(parameters: Iterable[Tensor]) -> "list[Collection]":
    """The collections that these parameters are known to, each once."""
    return list(dict.fromkeys(_collections[parameter] for parameter in parameters if parameter in _collections))


def remember_learnt(collection: "Collection", recipe: "Recipe") -> None:
    """Makes `recipe` the one that later graphs of the parameters of `collection` are compiled from."""
    for parameter, owner in list(_collections.items()):
        if owner is collection:
            _recipes[parameter] = recipe


def add_report(parameters: Iterable[Tensor], report: "GraphReport") -> None:
    """Keeps a graph's report with the first of its parameters."""
    first = next(iter(parameters), None)
    if first is not None:
        _reports.setdefault(first, []).append(report)


def reports_of(parameters: Iterable[Tensor]) -> "list[GraphReport]":
    """Reports of every graph compiled from these parameters, oldest first."""
    return [report for parameter in parameters for report in _reports.get(parameter, [])]
