"""How many layers share a basis, chosen by measuring: all candidates read the same bytes, and the nearest one wins."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import granularity, site_search
from larosa_compile.allocation import CANDIDATES, Rotation
from larosa_compile.granularity import best_granularity
from larosa_compile.held_out import HeldOut
from larosa_compile.recipe import Recipe
from tests.support.models import tiny_model, token_ids
from tests.support.simulation import divergence

BATCHES = [token_ids(4, 32, seed, 512) for seed in range(2)]
HELD_OUT = [token_ids(4, 32, seed, vocabulary=512) for seed in range(10, 13)]
SPARSITY = 0.5


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=5, vocab_size=512)


@pytest.fixture(scope="module")
def candidates(model: PreTrainedModel) -> dict[Rotation, Recipe]:
    """As `calibrate` makes them from scratch, one by one."""
    torch._dynamo.reset()
    return {
        rotation: larosa_compile.calibrate(model, BATCHES, SPARSITY, rotation=rotation, progress=False)
        for rotation in CANDIDATES
    }


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def bytes_read(model: PreTrainedModel, recipe: Recipe) -> int:
    return larosa_compile.explain(model, recipe=recipe).graphs[0].sparse_bytes


def test_all_candidates_read_the_same_bytes_and_the_nearest_wins(
    model: PreTrainedModel, candidates: dict[Rotation, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: dict[str, Recipe] = {}
    original = granularity._fitted

    def remembered(recipe: Recipe, propagation: granularity.Propagation, budget: int) -> Recipe:
        made = original(recipe, propagation, budget)
        fitted[str(next(name for name, found in candidates.items() if found is recipe))] = made
        return made

    monkeypatch.setattr(granularity, "_fitted", remembered)
    best = best_granularity(model, candidates, HELD_OUT, progress=False)
    budget = bytes_read(model, candidates[CANDIDATES[0]])
    # all sites move by one factor, so what is left is less than one feature of each
    site_bytes = larosa_compile.explain(model, recipe=best).graphs[0].sites
    features = sum(site.dense_bytes // site.features for site in site_bytes)
    for recipe in fitted.values():
        assert budget - features < bytes_read(model, recipe) <= budget
    compared = best.calibration["rotations_compared"]
    assert set(compared) == set(map(str, CANDIDATES))
    for name, said in compared.items():
        assert said == pytest.approx(divergence(model, fitted[name], HeldOut.of(HELD_OUT).checked), rel=1e-3)
    assert best.calibration["rotation"] == min(compared, key=compared.get)
    assert best.sites == fitted[str(best.calibration["rotation"])].sites
    # adapters have to be paid for
    path = "model.layers.0.mlp.up_proj.weight"
    assert fitted["layer"].sites[path].sparsity > fitted["model"].sites[path].sparsity


def test_a_granularity_that_cannot_have_the_bytes_is_left_out(
    model: PreTrainedModel, candidates: dict[Rotation, Recipe]
) -> None:
    nearly_dense: dict[Rotation, Recipe] = {name: candidates[name].with_sparsity(0.01) for name in ("model", "layer")}
    best = best_granularity(model, nearly_dense, HELD_OUT, progress=False)
    assert set(best.calibration["rotations_compared"]) == {"model"}


def test_calibrate_compares_what_one_pass_over_the_text_has_seen(
    model: PreTrainedModel, candidates: dict[Rotation, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[Rotation, Recipe] = {}

    def kept(_: PreTrainedModel, given: dict[Rotation, Recipe], *rest: object) -> Recipe:
        seen.update(given)
        return given["auto"]

    monkeypatch.setattr(granularity, "best_granularity", kept)
    monkeypatch.setattr(site_search, "ROUNDS", 0)
    made = larosa_compile.calibrate(model, BATCHES, SPARSITY, allocate="search", search=HELD_OUT, progress=False)
    assert made.rotations_digest == seen["auto"].rotations_digest
    assert {"auto", "layer", 4} <= seen.keys()
    for name, recipe in seen.items():
        assert recipe.sites == candidates[name].sites
        for basis, expected in candidates[name].spectra.items():
            assert torch.allclose(recipe.spectra[basis], expected, atol=1e-6)
            # moments added up in another order: their eigenvectors agree as far as eigenvalues are apart
            q, other = recipe.rotations[basis].double(), candidates[name].rotations[basis].double()
            rebuilt, wanted = (matrix * expected.double() @ matrix.T for matrix in (q, other))
            assert torch.allclose(rebuilt, wanted, atol=1e-5)


def test_granularities_that_come_to_the_same_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny_model("llama", num_hidden_layers=1, vocab_size=512)
    seen: list[Rotation] = []

    def kept(_: PreTrainedModel, given: dict[Rotation, Recipe], *rest: object) -> Recipe:
        seen.extend(given)
        return next(iter(given.values()))

    monkeypatch.setattr(granularity, "best_granularity", kept)
    monkeypatch.setattr(site_search, "ROUNDS", 0)
    larosa_compile.calibrate(small, BATCHES, SPARSITY, allocate="search", search=HELD_OUT, progress=False)
    assert seen == ["auto"]
