"""How a site chooses the entries that it keeps: a rule, and where the rule needs one, a threshold."""

from dataclasses import dataclass

TOP_K = "top-k"
"""The k largest magnitudes of every row (LaRoSA): each token drops the same share."""

THRESHOLD = "threshold"
"""Magnitudes from a number on (TEAL, arXiv 2408.14690): a token drops what it drops, the share holds on average."""

RELATIVE = "relative"
"""Magnitudes from a multiple of the row's root mean square on."""

GATE = "gate"
"""Where the activated gate that is a factor of the input reaches a number (CATS, arXiv 2404.08763)."""

RULES = (TOP_K, THRESHOLD, RELATIVE, GATE)


@dataclass(frozen=True)
class Selection:
    """rule: one of `RULES`. threshold: what it compares with; nothing for Top-K."""

    rule: str = TOP_K
    threshold: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether every row keeps as many entries as were promised, rather than rows on average."""
        return self.rule == TOP_K

    def __str__(self) -> str:
        return self.rule if self.is_exact else f"{self.rule} {self.threshold:.4g}"


EVERY_ROW = Selection()
"""Exact Top-K."""
