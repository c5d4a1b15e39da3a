"""The methods that one set of graph passes serves, as data: which sites, in which basis, chosen how."""

from collections.abc import Iterable
from dataclasses import dataclass

from larosa_compile.allocation import Coefficients, Rotation, check_rotation
from larosa_compile.errors import OptionError
from larosa_compile.passes.selection import GATE, RELATIVE, THRESHOLD, TOP_K
from larosa_compile.recipe_checks import LAROSA


@dataclass(frozen=True)
class Method:
    """rotations: whether inputs are rotated. selections: the rules that it may choose by, its own first.

    coefficients: of its sites, where a caller gives none; 0 is no site for a head, and elsewhere one that is dense.
    """

    rotates: bool
    selections: tuple[str, ...]
    coefficients: Coefficients


METHODS: dict[str, Method] = {
    LAROSA: Method(True, (TOP_K, THRESHOLD, RELATIVE), Coefficients()),
    "teal": Method(False, (THRESHOLD, RELATIVE), Coefficients(readers=1, writers=1, others=1, heads=0)),
    "cats": Method(False, (GATE,), Coefficients(readers=1, writers=1, others=1, heads=0)),
}
"""LaRoSA (arXiv 2507.01299); TEAL (arXiv 2408.14690), uniform; CATS (arXiv 2404.08763), on gated linears alone."""


@dataclass(frozen=True)
class Asked:
    """A method with what a caller asked of it, all of it known to fit."""

    method: str
    selection: str
    rotation: Rotation
    coefficients: Coefficients


def asked(method: str, selection: str | None, rotation: Rotation | None, coefficients: Coefficients | None) -> Asked:
    """Checks what `calibrate` was asked for; None is the method's own.

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
        rotation = "layer" if known.rotates else "none"
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
    return Asked(method, selection or known.selections[0], rotation, coefficients or known.coefficients)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
