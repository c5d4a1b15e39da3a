"""Spectra in recipes: validation and the file; what they are is the business of test_moments."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from larosa_compile.errors import RecipeError
from larosa_compile.recipe import Recipe
from tests.test_recipe import D, forge, make, same

SPECTRA = {"layer.0": torch.softmax(-torch.arange(D, dtype=torch.float32), 0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.larosa.safetensors"


def test_spectra_are_stored_and_go_with_their_rotations(path: Path) -> None:
    recipe = make(spectra=SPECTRA)
    recipe.save(path)
    loaded = Recipe.load(path)
    assert loaded.digest == recipe.digest
    assert loaded.rotations.keys() == {"layer.0"}
    assert torch.equal(loaded.spectra["layer.0"], SPECTRA["layer.0"])
    assert loaded.with_sparsity(0.1).spectra == loaded.spectra
    assert not loaded.without_rotation().spectra


def test_files_from_before_spectra_can_be_read(path: Path) -> None:
    forge(path, schema="2")
    assert same(Recipe.load(path), make())
    assert Recipe.load(path).digest == make().digest


@pytest.mark.parametrize(
    ("spectrum", "reason"),
    [
        ({"layer.1": SPECTRA["layer.0"]}, "must be a float32 vector"),
        ({"layer.0": SPECTRA["layer.0"][1:]}, "a number for each of 8 features"),
        ({"layer.0": SPECTRA["layer.0"].double()}, "must be a float32 vector"),
        ({"layer.0": SPECTRA["layer.0"] - 0.5}, "must hold shares from 0 to 1"),
        ({"layer.0": SPECTRA["layer.0"] * math.nan}, "must hold shares from 0 to 1"),
    ],
)
def test_a_spectrum_that_is_none_is_refused(spectrum: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        make(spectra=spectrum)
