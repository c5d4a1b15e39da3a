"""Config: the options of `torch.compile(model, backend="larosa", options={...})`, checked and frozen."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from larosa_compile.arguments import checked_count, checked_sparsity
from larosa_compile.errors import OptionError, StaleRecipeError
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import METHODS, WEIGHTS

Lowering: TypeAlias = Literal["inductor", "eager"]
Prompts: TypeAlias = Literal["sparse", "dense"]

DUMP_VARIABLE = "LAROSA_DUMP"
"""Environment variable that stands in for the option `dump`."""


OPTIONS = (
    "calibration_tokens",
    "dump",
    "lowering",
    "method",
    "prompts",
    "recipe",
    "release_originals",
    "self_check",
    "sparsity",
    "weights",
)

CALIBRATION_TOKENS = 8192
"""Tokens that a model without a recipe runs dense for, while one is learnt from them."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's file as it was when it was read."""

    path: Path
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, value: object) -> "RecipeFile | None":
        """The file that a `recipe` option names; None for a Recipe and for no file."""
        if not isinstance(value, (str, os.PathLike)):
            return None
        path = Path(value).absolute()
        try:
            stat = path.stat()
        except OSError:
            return None
        return cls(path, stat.st_mtime_ns, stat.st_size)

    def check_unchanged(self) -> None:
        """Refuse to go on with what was read when the file has been written anew.

        Dynamo takes two compiles with the same path for the same compile and would reuse the older one.

        Raises:
            StaleRecipeError: the file differs in time or size; a file that is gone is no difference.
        """
        now = RecipeFile.of(self.path)
        if now is not None and now != self:
            raise StaleRecipeError(
                f"the recipe file {self.path} was written anew after the model was compiled with it; "
                "call torch._dynamo.reset() and compile again to use the new recipe"
            )


@dataclass(frozen=True)
class Config:
    """What the backend was asked to do.

    Attributes:
        recipe: what calibration measured; None when none was given. As an option also the path of a file.
        dump: folder to write the graphs and the report to; None writes nothing.
        lowering: "inductor" compiles the rewritten graph; "eager" runs it with the ops' reference
            definitions, for debugging.
        release_originals: give the memory of weights back once they are folded; the model then runs compiled only.
        self_check: compare every rewritten graph with the model, nothing dropped, before it is used. The check needs
            both sets of weights at once, so with `release_originals` it is off unless asked for.
        weights: the format of the sites' weights; None is what the recipe says.
        prompts: "dense" drops nothing where so many tokens are processed at once that all weights are read anyway, on
            CPUs more than eight: that costs no time, and what is decoded after it may lose less. "sparse" makes every
            token as sparse as the recipe says, which is what perplexity of whole texts is measured with.
        method: what the recipe has to have been made by; None is any. "dense" drops nothing and needs no recipe: what
            this backend does besides, to compare with.
        recipe_file: the file that `recipe` was read from, if it was.
        sparsity: nominal sparsity to run at, in [0, 1); None is the recipe's own, and 0.5 for one that is learnt.
        calibration_tokens: tokens that a model without a recipe runs dense for, while one is learnt from them; 0 is
            never, so that a missing recipe is an error.
    """

    recipe: Recipe | None = None
    dump: Path | None = None
    lowering: Lowering = "inductor"
    release_originals: bool = False
    self_check: bool = True
    weights: str | None = None
    prompts: Prompts = "sparse"
    method: str | None = None
    recipe_file: "RecipeFile | None" = None
    sparsity: float | None = None
    calibration_tokens: int = CALIBRATION_TOKENS

    @property
    def dense_prompts(self) -> bool:
        return self.prompts == "dense"

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None = None) -> "Config":
        """Check the options dict of `torch.compile`; None is the same as no options.

        The option `dump` defaults to the environment variable LAROSA_DUMP.

        Raises:
            OptionError: an option is unknown, or its value has the wrong type or is out of range.
            RecipeError: `recipe` is a path that holds no valid recipe.
        """
        if options is None:
            options = {}
        if not isinstance(options, Mapping):
            raise OptionError(
                f"options must be a mapping, got {type(options).__name__}; give it as options={{name: value}}"
            )
        for name in options:
            _check_known(name)
        sparsity, tokens = options.get("sparsity"), options.get("calibration_tokens", CALIBRATION_TOKENS)
        release = _flag("release_originals", options.get("release_originals", False))
        return cls(
            recipe=_recipe(options.get("recipe")),
            dump=_dump(options.get("dump", os.environ.get(DUMP_VARIABLE) or None)),
            lowering=cast(Lowering, _one_of("lowering", options.get("lowering", "inductor"), get_args(Lowering))),
            release_originals=release,
            self_check=_flag("self_check", options.get("self_check", not release)),
            weights=None if options.get("weights") is None else _one_of("weights", options["weights"], WEIGHTS),
            prompts=cast(Prompts, _one_of("prompts", options.get("prompts", "sparse"), get_args(Prompts))),
            method=None if options.get("method") is None else _one_of("method", options["method"], METHODS),
            recipe_file=RecipeFile.of(options.get("recipe")),
            sparsity=None if sparsity is None else checked_sparsity("option 'sparsity'", sparsity),
            calibration_tokens=checked_count("option 'calibration_tokens'", tokens, least=0),
        )

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe at the sparsity and with the weights that were asked for.

        Raises:
            OptionError: another method was asked for than it was made by.
        """
        if self.method not in (None, recipe.method):
            raise OptionError(
                f"option 'method' must be that of the recipe, {recipe.method!r}, or 'dense', got {self.method!r}; "
                f"leave it out, or make a recipe with larosa_compile.calibrate(model, batches, method={self.method!r})"
            )
        if self.sparsity is not None:
            recipe = recipe.with_sparsity(self.sparsity)
        return recipe if self.weights is None else recipe.with_weights(self.weights)


def _check_known(name: object) -> None:
    known = sorted(OPTIONS)
    if name in known:
        return
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "leave it out, or give one of these"
    raise OptionError(f"unknown option {name!r}; expected one of {', '.join(map(repr, known))}; {hint}")


def _recipe(value: object) -> Recipe | None:
    if value is None or isinstance(value, Recipe):
        return value
    path = _path("recipe", value, "a Recipe, the path of a recipe file, or None")
    file = RecipeFile.of(path)
    # Without a file the reader says best what is wrong with the path.
    return Recipe.load(path) if file is None else _loaded(file)


# The backend parses its options once per graph. Time and size are in the key so that a file written anew is
# read anew; the rotations are memory-mapped, so an entry holds little.
@lru_cache(maxsize=4)
def _loaded(file: RecipeFile) -> Recipe:
    return Recipe.load(file.path)


def _dump(value: object) -> Path | None:
    return None if value is None else _path("dump", value, "the path of a folder, or None")


def _path(name: str, value: object, allowed: str) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OptionError(f"option {name!r} must be {allowed}, got {value!r}; give one of these")
    return Path(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"option {name!r} must be True or False, got {value!r}; give one of them")
    return value


def _one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(
            f"option {name!r} must be one of {', '.join(map(repr, allowed))}, got {value!r}; give one of them"
        )
    return value
