"""SiteRecipe: thresholds, how they are checked, and recipes that hold them."""

import math
from pathlib import Path
from typing import Any

import pytest

from larosa_compile.errors import RecipeError
from larosa_compile.recipe import Recipe
from larosa_compile.site import SiteRecipe
from tests.test_recipe import DOWN, Q_PROJ, make, same

RISING = tuple(index / 50 for index in range(100))


def test_thresholds_lie_between_quantiles() -> None:
    site = SiteRecipe(0.25, 1.0, selection="threshold", quantiles=RISING)
    assert site.threshold == pytest.approx(0.5)
    recipe = make(sites={DOWN: site}, method="teal")
    for sparsity in (0.0, 0.305, 0.99, 0.999):
        # what is clipped at 99 % has the last quantile
        assert recipe.with_sparsity(sparsity).sites[DOWN].threshold == pytest.approx(2 * min(sparsity, 0.99))
    assert SiteRecipe(0.4, 0.8).threshold == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"selection": "random"}, "selection must be one of top-k, threshold, relative, gate, got 'random'"),
        ({"selection": "threshold"}, "got none for selection 'threshold'"),
        ({"quantiles": RISING}, "got some for selection 'top-k'"),
        ({"selection": "gate", "quantiles": RISING[:50]}, "must be 100 numbers that never fall, from 0 on, got 50"),
        ({"selection": "gate", "quantiles": (*RISING[1:], 9.0)}, "from 0 on"),
        ({"selection": "gate", "quantiles": (*RISING[:-1], 0.5)}, "never fall"),
        ({"selection": "gate", "quantiles": (*RISING[:-1], math.inf)}, "a quantile must be a finite number"),
    ],
)
def test_wrong_thresholds_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        SiteRecipe(0.4, 0.8, **fields)


def test_thresholds_stay_in_the_basis_they_were_measured_in() -> None:
    rotated = SiteRecipe(0.4, 0.8, "layer.0", "reader", "relative", RISING)
    with pytest.raises(RecipeError, match="measured in its rotated basis"):
        make(sites={Q_PROJ: rotated}).without_rotation()


def test_methods_that_are_none_are_refused() -> None:
    with pytest.raises(RecipeError, match="method must be one of 'larosa', 'teal', 'cats', 'dense', got 'wanda'"):
        make(method="wanda")


@pytest.mark.parametrize("selection", ["threshold", "relative", "gate"])
def test_file_with_thresholds(tmp_path: Path, selection: str) -> None:
    path = tmp_path / "model.larosa.safetensors"
    recipe = make(sites={Q_PROJ: SiteRecipe(0.4, 0.8, None, "reader", selection, RISING)}, method="teal")
    recipe.save(path)
    loaded = Recipe.load(path)
    assert same(loaded, recipe) and loaded.method == "teal" and loaded.sites == recipe.sites


def test_what_older_files_do_not_have_is_not_written() -> None:
    header = make().header()
    assert "method" not in header and "weights" not in header
    assert set(header["sites"][DOWN]) == {"sparsity", "coefficient", "basis", "kind"}  # type: ignore[index, call-overload]
