"""Numbers that users give in several places, and what is said of one that is not allowed: given, allowed, to do."""

import math

from larosa_compile.errors import OptionError


def checked_sparsity(what: str, value: object) -> float:
    """A nominal sparsity as a float.

    Raises:
        OptionError: it is no number in [0, 1).
    """
    if not is_number(value) or not 0 <= float(value) < 1:  # type: ignore[arg-type]
        raise OptionError(f"{what} must lie in [0, 1), got {value!r}; give a share such as 0.5")
    return float(value)  # type: ignore[arg-type]


def checked_count(what: str, value: object, least: int) -> int:
    """A whole number.

    Raises:
        OptionError: it is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{what} must be a whole number, at least {least}, got {value!r}; give one such as 1024")
    return value


def is_number(value: object) -> bool:
    """Whether this is a finite number, truth values aside."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
