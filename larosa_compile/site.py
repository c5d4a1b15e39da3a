"""What a recipe says of one linear."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from larosa_compile.errors import RecipeError
from larosa_compile.passes.plan import HEAD
from larosa_compile.passes.selection import RULES, TOP_K
from larosa_compile.recipe_checks import checked_number, checked_sparsity

MAX_SPARSITY = 0.99
"""Where a derived site sparsity is clipped: a site that keeps nothing would be a constant."""

KINDS = ("reader", "writer", "other", HEAD)

QUANTILES = 100
"""Of what a threshold compares with, at sparsities 0, 0.01, … 0.99."""

UNMEASURED = (0.0,) * QUANTILES
"""Thresholds that everything reaches."""


@dataclass(frozen=True)
class SiteRecipe:
    """How the input of one linear is sparsified.

    Attributes:
        sparsity: fraction of the input's features set to zero, in [0, 1).
        coefficient: sparsity of this site per unit of nominal sparsity.
        basis: key of the rotation the input is sparsified in; None is the activation's own basis.
        kind: what the linear does, for coefficients by kind: "reader" and "writer" of a residual stream, "other"
            inside a block, "head".
        selection: "top-k" (the largest magnitudes of every row), "threshold" (magnitudes from a number on), "relative"
            (from a multiple of the row's root mean square on), or "gate" (a threshold on the activated gate that is a
            factor of the input). All but the first keep what was promised on average only.
        quantiles: for a threshold, what a share of i/100 of the entries that were calibrated on lies below, for i from
            0 to 99: of their magnitudes, of these over the row's root mean square, or of the gate's. None for Top-K.

    Raises:
        RecipeError: a number is out of range or not finite, or there are no quantiles where they are needed.
    """

    sparsity: float
    coefficient: float
    basis: str | None = None
    kind: str = "other"
    selection: str = TOP_K
    quantiles: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", checked_sparsity(self.sparsity))
        coefficient = checked_number("coefficient", self.coefficient)
        if coefficient < 0:
            raise RecipeError(f"coefficient must be at least 0, got {coefficient}")
        object.__setattr__(self, "coefficient", coefficient)
        if self.basis is not None and not isinstance(self.basis, str):
            raise RecipeError(f"basis must be the key of a rotation or None, got {self.basis!r}")
        if self.kind not in KINDS:
            raise RecipeError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.selection not in RULES:
            raise RecipeError(f"selection must be one of {', '.join(RULES)}, got {self.selection!r}")
        if self.quantiles is not None:
            object.__setattr__(self, "quantiles", _checked_quantiles(self.quantiles))
        if (self.selection == TOP_K) != (self.quantiles is None):
            given = "none" if self.quantiles is None else "some"
            raise RecipeError(
                f"quantiles must be given where a threshold selects, and only there; got {given} for "
                f"selection {self.selection!r}: calibrate again"
            )

    @property
    def threshold(self) -> float:
        """What the entries that are kept reach at this sparsity, between quantiles linearly; 0 for Top-K."""
        if self.quantiles is None:
            return 0.0
        below = min(int(self.sparsity * QUANTILES), QUANTILES - 2)
        share = self.sparsity * QUANTILES - below
        return (1 - share) * self.quantiles[below] + share * self.quantiles[below + 1]

    def header(self) -> dict[str, Any]:
        """The fields as JSON values, without those that recipes of older files do not have."""
        fields = dataclasses.asdict(self)
        if self.selection == TOP_K:
            del fields["selection"], fields["quantiles"]
        return fields


def _checked_quantiles(values: Sequence[float]) -> tuple[float, ...]:
    quantiles = tuple(checked_number("a quantile", value) for value in values)
    rising = all(low <= high for low, high in itertools.pairwise(quantiles))
    if len(quantiles) != QUANTILES or not rising or quantiles[0] != 0 or not math.isfinite(quantiles[-1]):
        raise RecipeError(
            f"quantiles must be {QUANTILES} numbers that never fall, from 0 on, got {len(quantiles)}; calibrate again"
        )
    return quantiles
