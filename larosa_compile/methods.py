"""The methods that one set of graph passes serves, as data: which sites, in which basis, chosen how."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from larosa_compile.allocation import Coefficients, Rotation, check_rotation
from larosa_compile.errors import OptionError
from larosa_compile.passes.selection import GATE, RELATIVE, THRESHOLD, TOP_K
from larosa_compile.recipe_checks import LAROSA

GRID, GREEDY, SITES = "grid", "greedy", "sites"
"""Ways to choose coefficients: a grid of pairs by kind (LaRoSA, algorithm 1); block by block (TEAL, algorithm 1); each
site by what it costs at the model's output."""

Allocation = Literal["paper", "search"]
"""How sparsity is split between sites: as the method's paper does, or each site by its cost at the model's output."""


@dataclass(frozen=True)
class Method:
    """rotations: whether inputs are rotated. selections: the rules that it may choose by, its own first.

    coefficients: of its sites, where a caller gives none; 0 is no site for a head, and elsewhere one that is dense.
    search: how its paper chooses coefficients on held-out text; None where there is nothing to choose.
    """

    rotates: bool
    selections: tuple[str, ...]
    coefficients: Coefficients
    search: str | None


METHODS: dict[str, Method] = {
    LAROSA: Method(True, (TOP_K, THRESHOLD, RELATIVE), Coefficients(), GRID),
    "teal": Method(False, (THRESHOLD, RELATIVE), Coefficients(readers=1, writers=1, others=1, heads=0), GREEDY),
    "cats": Method(False, (GATE,), Coefficients(readers=1, writers=1, others=1, heads=0), None),
}
"""LaRoSA (arXiv 2507.01299); TEAL (arXiv 2408.14690); CATS (arXiv 2404.08763), on gated linears alone."""


@dataclass(frozen=True)
class Asked:
    """A method with what a caller asked of it, all of it known to fit."""

    method: str
    selection: str
    rotation: Rotation
    coefficients: Coefficients
    search: str | None


def asked(
    method: str,
    selection: str | None,
    rotation: Rotation | None,
    coefficients: Coefficients | None,
    allocate: str = "paper",
    searches: bool = False,
) -> Asked:
    """Checks what `calibrate` was asked for; None is the method's own. searches: whether there is held-out text.

    Raises:
        OptionError: there is no such method, or it does not choose, or rotate, in that way.
    """
    if method not in METHODS:
        raise OptionError(f"method must be one of {_quoted(METHODS)}, got {method!r}; give one of them")
    known = METHODS[method]
    if selection is not None and selection not in known.selections:
        raise OptionError(
            f"selection for method {method!r} must be {_quoted(known.selections)} or None, got {selection!r}; give "
            "one of these"
        )
    if rotation is None:
        rotation = "auto" if known.rotates else "none"
    check_rotation(rotation)
    if rotation != "none" and not known.rotates:
        raise OptionError(
            f"rotation for method {method!r} must be 'none' or None, as it selects in the model's own basis, got "
            f"{rotation!r}; leave it out, or use method='larosa'"
        )
    if not isinstance(coefficients, Coefficients | None):
        raise OptionError(
            f"coefficients must be an allocation.Coefficients or None, got {coefficients!r}; give such as "
            "Coefficients(readers=0.8, writers=1.2)"
        )
    if allocate not in get_args(Allocation):
        raise OptionError(f"allocate must be one of {_quoted(get_args(Allocation))}, got {allocate!r}; use one of them")
    if allocate == "search" and not known.rotates:
        raise OptionError(f"allocate for method {method!r} must be 'paper', got 'search'; use it with method='larosa'")
    if allocate == "search" and not searches:
        raise OptionError("allocate='search' needs held-out token ids or texts, got none; pass some as search=…")
    if searches and known.search is None:
        raise OptionError(
            f"search must be None for method {method!r}, as there is nothing to choose, got held-out text; leave it out"
        )
    chosen = selection or known.selections[0]
    search = SITES if allocate == "search" else known.search if searches else None
    return Asked(method, chosen, rotation, coefficients or known.coefficients, search)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
