"""Config: every option, every refusal."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from larosa_compile.config import Config
from larosa_compile.errors import OptionError, RecipeError
from larosa_compile.recipe import Recipe
from larosa_compile.site import SiteRecipe


@pytest.fixture(autouse=True)
def no_dump_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAROSA_DUMP", raising=False)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(0.5, {"a.weight": SiteRecipe(0.5, 1.0)}, {}, {"a.weight": (4, 4)}, {})


@pytest.mark.parametrize("options", [None, {}])
def test_defaults(options: Any) -> None:
    config = Config.from_options(options)
    assert config == Config(recipe=None, dump=None, lowering="inductor")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dump = Path("elsewhere")  # type: ignore[misc]


def test_all_options(recipe: Recipe, tmp_path: Path) -> None:
    config = Config.from_options({"recipe": recipe, "dump": str(tmp_path), "lowering": "eager"})
    assert config == Config(recipe=recipe, dump=tmp_path, lowering="eager")


def test_recipe_may_be_a_path_and_is_read_once_per_version(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "r.larosa.safetensors"
    recipe.save(file)
    first = Config.from_options({"recipe": file}).recipe
    assert first is not None
    assert first.digest == recipe.digest
    assert Config.from_options({"recipe": str(file)}).recipe is first
    recipe.with_sparsity(0.25).save(file)
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution
    second = Config.from_options({"recipe": file}).recipe
    assert second is not None
    assert second.sparsity == 0.25


def test_recipe_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        Config.from_options({"recipe": tmp_path / "none"})


def test_dump_variable_is_the_default_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAROSA_DUMP", str(tmp_path))
    assert Config.from_options().dump == tmp_path
    assert Config.from_options({"dump": tmp_path / "other"}).dump == tmp_path / "other"
    assert Config.from_options({"dump": None}).dump is None
    monkeypatch.setenv("LAROSA_DUMP", "")
    assert Config.from_options().dump is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"lowring": "eager"},
            "unknown option 'lowring'; expected one of 'calibration_tokens', 'dump', 'lowering', 'method', 'prompts', "
            "'recipe', 'release_originals', 'self_check', 'sparsity', 'weights'; did you mean 'lowering'",
        ),
        (
            {"rotation": "layer"},
            "unknown option 'rotation'; expected one of .*, 'sparsity', 'weights'; leave it out, or give one of these$",
        ),
        ({3: None}, "unknown option 3;"),
        ({"recipe": 0.5}, "option 'recipe' must be a Recipe, the path of a recipe file, or None, got 0.5"),
        ({"recipe": ""}, "option 'recipe' must be"),
        ({"dump": True}, "option 'dump' must be the path of a folder, or None, got True"),
        ({"lowering": "triton"}, "option 'lowering' must be one of 'inductor', 'eager', got 'triton'"),
        ({"lowering": None}, "option 'lowering' must be"),
        ({"self_check": 1}, "option 'self_check' must be True or False, got 1"),
        ({"lowering": ["eager"]}, "option 'lowering' must be"),
        ([("dump", None)], "options must be a mapping, got list"),
    ],
)
def test_refusals(options: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        Config.from_options(options)
