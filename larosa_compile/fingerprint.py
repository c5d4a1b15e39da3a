"""Fingerprint of a model: the paths and shapes of its parameters; and where the parameters of a graph are in it."""

from collections.abc import Mapping

import torch

from larosa_compile.errors import RecipeMismatchError

Fingerprint = Mapping[str, tuple[int, ...]]
"""Parameter path -> shape."""


def fingerprint(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Every name of every parameter, tied ones included: a graph may know a tied weight by any of them."""
    return {path: tuple(p.shape) for path, p in model.named_parameters(remove_duplicate=False)}


def locate(model: Fingerprint, found: Fingerprint) -> dict[str, str]:
    """Path in a graph -> path in the model, for every parameter met in the graph.

    A graph may hold a part of the model, a layer compiled by itself for instance, or the model inside a wrapper;
    its paths then lack a prefix, or have one more.

    Raises:
        RecipeMismatchError: a path is unknown to the model or its shape differs, or the part fits several places.
    """
    prefixes = [pair for pair in _prefixes(model, next(iter(found), "")) if _fits(model, found, *pair)]
    if not found or ("", "") in prefixes:
        return {path: path for path in found}
    if len(prefixes) == 1:
        lacking, extra = prefixes[0]
        return {path: lacking + path.removeprefix(extra) for path in found}
    if prefixes:
        fitting = ", ".join(repr(lacking.removesuffix(".")) for lacking, _ in prefixes[:3])
        raise RecipeMismatchError(
            f"this part of a model fits {len(prefixes)} places of the recipe ({fitting}, …); call "
            "recipe.attach(model) with the whole model before compiling a part of it"
        )
    raise RecipeMismatchError(
        f"the recipe was measured on another model: {_differences(model, found)}. "
        "Calibrate this model, or load the recipe that belongs to it."
    )


def _prefixes(model: Fingerprint, path: str) -> list[tuple[str, str]]:
    """(prefix that the graph's paths lack, prefix that they have too much) by which `path` may be found."""
    names = path.split(".")
    lacking = [(known.removesuffix(path), "") for known in model if f".{known}".endswith(f".{path}")]
    extra = ["".join(f"{name}." for name in names[:count]) for count in range(1, len(names))]
    return lacking + [("", prefix) for prefix in extra if path.removeprefix(prefix) in model]


def _fits(model: Fingerprint, found: Fingerprint, lacking: str, extra: str) -> bool:
    return all(
        path.startswith(extra) and model.get(lacking + path.removeprefix(extra)) == tuple(shape)
        for path, shape in found.items()
    )


def _differences(model: Fingerprint, found: Fingerprint) -> str:
    differing = [
        f"{path}: found {list(shape)}, " + (f"expected {list(model[path])}" if path in model else "not in the recipe")
        for path, shape in found.items()
        if model.get(path) != tuple(shape)
    ]
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    return "; ".join(differing[:3]) + more
