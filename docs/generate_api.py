"""Prints docs/api.md, made of signatures and docstrings: `python docs/generate_api.py > docs/api.md`."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import larosa_compile
from larosa_compile import allocation, config, curves, errors, explanation, recipe, report, site

OBJECTS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (
        "Functions",
        (larosa_compile.calibrate, larosa_compile.explain, larosa_compile.html_report, larosa_compile.recipe_of),
    ),
    ("The recipe", (recipe.Recipe, site.SiteRecipe, allocation.Coefficients)),
    ("Options of the backend", (config.Config,)),
    ("Reports", (explanation.Report, report.GraphReport, report.SiteReport, report.StreamReport, report.OnlineReport)),
    ("Measured curves", (curves.perplexities, curves.speeds, curves.Perplexities, curves.Speeds, curves.Speed)),
)


def lines() -> Iterator[str]:
    """The page, line by line."""
    yield "# API reference"
    yield ""
    yield "Made from the docstrings by `python docs/generate_api.py > docs/api.md`; a test holds the two equal."
    yield "`calibrate`, `explain`, `html_report`, `recipe_of` and `Recipe` are names of `larosa_compile` itself."
    for title, objects in OBJECTS:
        yield from ("", f"## {title}")
        for item in objects:
            yield from _described(item, f"{item.__module__}.{item.__name__}", 3)
            if inspect.isclass(item):
                for name, member in _methods(item):
                    yield from _described(member, f"{item.__name__}.{name}", 4)
    yield from ("", "## Errors", "")
    yield from ("| error | also a | when |", "|---|---|---|")
    for error in (item for item in vars(errors).values() if inspect.isclass(item)):
        parents = ", ".join(f"`{parent.__name__}`" for parent in error.__bases__ if parent is not Exception)
        yield f"| `{error.__name__}` | {parents} | {inspect.getdoc(error)} |"


def _methods(item: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(item).items():
        function = member.__func__ if isinstance(member, classmethod) else member
        function = getattr(function, "fget", None) or getattr(function, "func", None) or function
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, function


def _described(item: Any, name: str, level: int) -> Iterator[str]:
    yield from ("", f"{'#' * level} `{name}`", "")
    if inspect.isfunction(item):
        yield from ("```text", f"{item.__name__}{_signature(item)}", "```", "")
    elif dataclasses.is_dataclass(item):
        fields = "\n".join(f"{field.name}: {_spelled(field.type)}" for field in dataclasses.fields(item))
        yield from ("```text", fields, "```", "")
    # as it stands in the source: indented lists and formulas would be reflowed otherwise
    yield from ("```text", inspect.getdoc(item) or "", "```")


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parts, keyword = list[str](), False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            parts.append("*")
        kind = "" if parameter.annotation is parameter.empty else f": {_spelled(parameter.annotation)}"
        simple = parameter.default is None or isinstance(parameter.default, (int, float, str))
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}" if simple else " = …"
        parts.append(f"{parameter.name}{kind}{default}")
    returned = "" if signature.return_annotation is signature.empty else f" -> {_spelled(signature.return_annotation)}"
    body = "".join(f"\n    {part}," for part in parts)
    return f"({body}\n){returned}" if len(parts) > 2 else f"({', '.join(parts)}){returned}"


def _spelled(kind: Any) -> str:
    """An annotation without the modules in it."""
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kind if isinstance(kind, str) else inspect.formatannotation(kind))


if __name__ == "__main__":
    print("\n".join(lines()))
