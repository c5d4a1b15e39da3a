"""LaRoSA (layerwise rotated sparse activation) as a `torch.compile` backend.

The public names are loaded on first use: torch imports this package for its entry point, and a process
that only compiles should not pay for what calibration needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from larosa_compile.calibration import calibrate
    from larosa_compile.collection import recipe_of
    from larosa_compile.explanation import explain
    from larosa_compile.page import html_report
    from larosa_compile.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "calibrate", "explain", "html_report", "recipe_of"]

# No module may bear the name of one of these: importing it would set the attribute to the module.
_HOME = {
    "Recipe": "larosa_compile.recipe",
    "calibrate": "larosa_compile.calibration",
    "explain": "larosa_compile.explanation",
    "html_report": "larosa_compile.page",
    "recipe_of": "larosa_compile.collection",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home module (PEP 562).

    Raises:
        AttributeError: the package has no such public name.
    """
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
