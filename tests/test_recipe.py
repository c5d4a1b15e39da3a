"""Recipe: validation, derived recipes, the digest, and the file."""

import dataclasses
import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from larosa_compile.errors import LarosaError, RecipeError, RecipeMismatchError
from larosa_compile.recipe import Recipe
from larosa_compile.site import SiteRecipe

D = 8
Q_PROJ, DOWN = "layers.0.q_proj.weight", "layers.0.down_proj.weight"


def orthogonal(d: int = D, seed: int = 0) -> Tensor:
    """A random orthogonal `[d, d]`, made in float64."""
    square = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q: Tensor = torch.linalg.qr(square).Q
    return q.float().contiguous()


def make(**changes: Any) -> Recipe:
    """A valid recipe with one rotated site and one in its own basis; `changes` replace fields."""
    fields: dict[str, Any] = {
        "sparsity": 0.5,
        "sites": {Q_PROJ: SiteRecipe(0.4, 0.8, "layer.0"), DOWN: SiteRecipe(0.6, 1.2)},
        "rotations": {"layer.0": orthogonal()},
        "parameters": {Q_PROJ: (12, D), DOWN: (D, 20)},
        "calibration": {"tokens": 4096, "text": "wiki", "versions": {"torch": "2.13.0"}},
    }
    return Recipe(**{**fields, **changes})


def same(a: Recipe, b: Recipe) -> bool:
    """Whether two recipes hold equal values."""
    return (
        a.header() == b.header()
        and list(a.sites) == list(b.sites)
        and a.rotations.keys() == b.rotations.keys()
        and all(torch.equal(a.rotations[key], b.rotations[key]) for key in a.rotations)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.larosa.safetensors"


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.2, math.nan, math.inf, True, "0.5", None])
def test_sparsity_out_of_range_is_refused(sparsity: Any) -> None:
    with pytest.raises(RecipeError, match="sparsity must"):
        SiteRecipe(sparsity, 1.0)
    with pytest.raises(RecipeError, match="sparsity must"):
        make(sparsity=sparsity)
    with pytest.raises(RecipeError, match="sparsity must"):
        make().with_sparsity(sparsity)


@pytest.mark.parametrize("coefficient", [-1, math.nan, math.inf, None])
def test_coefficient_out_of_range_is_refused(coefficient: Any) -> None:
    with pytest.raises(RecipeError, match="coefficient must"):
        SiteRecipe(0.5, coefficient)


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [
        (orthogonal().double(), "must be a float32 tensor, got torch.float64"),
        ([[1.0]], "must be a float32 tensor, got list"),
        (orthogonal()[:, :4], r"must be square, got shape \[8, 4\]"),
        (torch.zeros(0, 0), "must be square"),
        (orthogonal() * math.nan, "must be finite"),
        (orthogonal() * 1.001, "must be orthogonal, got max"),
        (torch.ones(D, D), "must be orthogonal, got max"),
    ],
)
def test_rotation_that_is_none_is_refused(rotation: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        make(rotations={"layer.0": rotation})


def test_site_needs_its_basis_and_the_basis_must_fit() -> None:
    with pytest.raises(RecipeError, match=r"names the basis 'layer\.0', which has no rotation"):
        make(rotations={})
    with pytest.raises(RecipeError, match=r"shape \[12, 9\], which does not fit the 8 features"):
        make(parameters={Q_PROJ: (12, 9)})
    make(parameters={Q_PROJ: (D, 12)})  # a weight kept as [in, out]
    make(parameters={})  # unknown shape: nothing to compare with


@pytest.mark.parametrize("calibration", [{"loss": math.nan}, {"path": Path("text")}])
def test_calibration_must_be_json(calibration: Any) -> None:
    with pytest.raises(RecipeError, match="calibration must hold finite JSON values"):
        make(calibration=calibration)


def test_recipe_is_frozen_and_independent_of_what_it_was_made_from() -> None:
    sites = {DOWN: SiteRecipe(0.6, 1.2)}
    recipe = make(sites=sites)
    sites.clear()
    assert list(recipe.sites) == [DOWN]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.sparsity = 0.1  # type: ignore[misc]


def test_column_major_rotation_becomes_contiguous() -> None:
    q = orthogonal().T.contiguous().T
    recipe = make(rotations={"layer.0": q})
    assert recipe.rotations["layer.0"].is_contiguous()
    assert torch.equal(recipe.rotations["layer.0"], q)


def test_with_sparsity_scales_every_site_by_its_coefficient() -> None:
    recipe = make()
    denser = recipe.with_sparsity(0.25)
    assert denser.sparsity == 0.25
    assert denser.sites == {Q_PROJ: SiteRecipe(0.2, 0.8, "layer.0"), DOWN: SiteRecipe(0.3, 1.2)}
    assert denser.rotations["layer.0"] is recipe.rotations["layer.0"]
    assert recipe.with_sparsity(0.9).sites[DOWN].sparsity == 0.99
    assert all(site.sparsity == 0 for site in recipe.with_sparsity(0).sites.values())
    assert same(denser.with_sparsity(0.5), recipe)


def test_without_rotation_keeps_sparsities_only() -> None:
    recipe = make()
    plain = recipe.without_rotation()
    assert not plain.rotations
    assert all(site.basis is None for site in plain.sites.values())
    assert [s.sparsity for s in plain.sites.values()] == [s.sparsity for s in recipe.sites.values()]
    assert same(recipe, make())


def test_digest_depends_on_every_field_and_on_no_order() -> None:
    recipe = make()
    reordered = make(sites=dict(reversed(list(recipe.sites.items()))))
    assert recipe.digest == make().digest == reordered.digest
    others = [
        recipe.with_sparsity(0.4),
        recipe.without_rotation(),
        make(rotations={"layer.0": orthogonal(seed=1)}),
        make(rotations={"layer.0": orthogonal(), "layer.1": orthogonal()}),
        make(parameters={}),
        make(calibration={}),
        make(spectra={"layer.0": torch.full((D,), 1 / D)}),
    ]
    assert len({recipe.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_repr_is_one_line() -> None:
    recipe = make()
    assert repr(recipe) == f"Recipe(sparsity=0.5, sites=2, bases=1, digest={recipe.digest[:12]})"


def test_parameters_of_another_model_are_refused() -> None:
    recipe = make()
    recipe.locate({})
    recipe.locate({Q_PROJ: (12, D)})
    with pytest.raises(RecipeMismatchError, match=r"q_proj\.weight: found \[13, 8\], expected \[12, 8\]\. "):
        recipe.locate({Q_PROJ: (13, D)})
    with pytest.raises(RecipeMismatchError, match=r"a: found \[1\], not in the recipe.*; and 2 more"):
        recipe.locate({name: (1,) for name in "abcde"})


def test_file_round_trip(path: Path) -> None:
    shared = orthogonal()
    recipe = make(rotations={"layer.0": shared, "layer.1": shared})
    recipe.save(path)
    loaded = Recipe.load(str(path))
    assert same(loaded, recipe)
    assert loaded.digest == recipe.digest
    make().save(path)  # replaces, and the recipe mapped from the old file stays whole
    assert same(loaded, recipe)
    assert same(Recipe.load(path), make())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_file_without_rotations(path: Path) -> None:
    plain = make().without_rotation()
    plain.save(path)
    assert same(Recipe.load(path), plain)


def test_file_opens_with_safetensors_alone(path: Path) -> None:
    make().save(path)
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("layer.0"), orthogonal())
        assert file.metadata()["format"] == "larosa-recipe"
        assert json.loads(file.metadata()["header"])["sparsity"] == 0.5


def test_file_has_the_mode_of_any_new_file(path: Path) -> None:
    make().save(path)
    other = path.with_name("other")
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_save_needs_an_existing_folder(path: Path) -> None:
    with pytest.raises(RecipeError, match="create the folder"):
        make().save(path.parent / "missing" / path.name)


def test_load_of_no_file(path: Path) -> None:
    with pytest.raises(RecipeError, match=r"does not exist; give a file that Recipe.save wrote"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="is not a file"):
        Recipe.load(path.parent)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_load_of_a_truncated_file(path: Path, keep: int) -> None:
    make().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RecipeError, match=r"is not a whole safetensors file.*truncated"):
        Recipe.load(path)


def test_load_of_other_files(path: Path) -> None:
    path.write_text("sparsity: 0.5\n" * 10)
    with pytest.raises(RecipeError, match="is not a whole safetensors file"):
        Recipe.load(path)
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(RecipeError, match=r"is a safetensors file but not a recipe \(format None"):
        Recipe.load(path)


def forge(path: Path, *, rotation: Tensor | None = None, **metadata: str) -> None:
    """Write a recipe file whose rotation or metadata is replaced while all else, digest included, stays."""
    make().save(path)
    with safe_open(path, framework="pt") as file:
        original = file.metadata()
    tensors = {"layer.0": orthogonal() if rotation is None else rotation}
    path.unlink()
    save_file(tensors, path, metadata={**original, **metadata})


@pytest.mark.parametrize(
    ("forgery", "reason"),
    [
        ({"schema": "1"}, "has recipe schema '1', this version reads '2', '3', '4'; upgrade"),
        ({"digest": "0" * 64}, "is damaged: its contents have digest"),
        ({"rotation": orthogonal(seed=1)}, "is damaged: its contents have digest"),
        ({"rotation": orthogonal() * math.nan}, "holds an invalid recipe: rotation 'layer.0' must be finite"),
        ({"rotation": torch.ones(D, D)}, "holds an invalid recipe: rotation 'layer.0' must be orthogonal"),
        ({"header": "{"}, "is damaged: its header is not JSON"),
        ({"header": "[]"}, "is damaged: its header is a list"),
        ({"header": "{}"}, "is damaged: its header cannot be read"),
        ({"header": '{"sites": {"a": {"sparsity": 0.5}}}'}, "is damaged: its header cannot be read"),
    ],
)
def test_load_of_a_forged_file(path: Path, forgery: dict[str, Any], reason: str) -> None:
    forge(path, **forgery)
    with pytest.raises(RecipeError, match=reason):
        Recipe.load(path)


def test_a_flipped_bit_is_noticed(path: Path) -> None:
    make().save(path)
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the lowest bit of one float: still orthogonal, but not what was saved
    path.write_bytes(data)
    with pytest.raises(LarosaError, match="is damaged"):
        Recipe.load(path)
