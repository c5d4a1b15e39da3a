"""Methods as data: what each computes, keeps, stores and refuses, against hooks on the dense model."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import registry
from larosa_compile.config import Config
from larosa_compile.errors import OptionError, RecipeError
from larosa_compile.evaluation import next_token_losses
from larosa_compile.recipe import Recipe
from larosa_compile.shares import CountingModel
from tests.support.models import relative_error, tiny_model, token_ids
from tests.support.simulation import simulated

BATCHES = [token_ids(4, 64, seed) for seed in range(3)]

METHODS: dict[str, dict[str, Any]] = {
    "teal": {"method": "teal"},
    "cats": {"method": "cats"},
    "larosa-relative": {"selection": "relative"},
}


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    registry.drop_graphs()
    yield
    registry.drop_graphs()


@cache
def calibrated(name: str) -> tuple[PreTrainedModel, Recipe]:
    # wide enough a vocabulary for the head's input to be rotated at run time
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=320)
    return model, larosa_compile.calibrate(model, BATCHES, 0.5, progress=False, **METHODS[name])


def compiled(model: PreTrainedModel, recipe: Recipe | None, **options: Any) -> Any:
    given = {"lowering": "eager"} | ({} if recipe is None else {"recipe": recipe}) | options
    return torch.compile(model, backend="larosa", options=given)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_method(name: str) -> None:
    model, recipe = calibrated(name)
    ids = token_ids(2, 9, seed=9)
    dense = logits(model, ids)
    with simulated(model, recipe.with_sparsity(0.3)):
        expected = logits(model, ids)
    found = logits(compiled(model, recipe, sparsity=0.3), ids)
    assert relative_error(found, expected) < 1e-4 < relative_error(expected, dense)


def test_nothing_is_dropped_at_sparsity_zero() -> None:
    model, recipe = calibrated("teal")
    ids = token_ids(2, 9, seed=9)
    assert relative_error(logits(compiled(model, recipe, sparsity=0.0), ids), logits(model, ids)) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_it_keeps_on_average_what_was_promised(name: str) -> None:
    """Of the text that was calibrated on, each site with those before it sparse."""
    model, recipe = calibrated(name)
    counting = CountingModel(model, recipe)
    for batch in BATCHES:
        counting(input_ids=batch, use_cache=False)
    assert counting.shares.keys() == recipe.sites.keys()
    for path, share in counting.shares.items():
        assert share == pytest.approx(1 - recipe.sites[path].sparsity, abs=0.01), path


def test_thresholds_in_a_rotated_basis_are_measured_on_held_out_text() -> None:
    """One window of calibration is far fewer tokens than features: the basis fits it, and nothing else."""
    model = tiny_model("llama", num_hidden_layers=1)
    learnt, held_out = [token_ids(1, 8, seed=1)], BATCHES
    recipe = larosa_compile.calibrate(model, learnt, 0.5, search=held_out, selection="relative", progress=False)
    counting = CountingModel(model, recipe)
    for batch in held_out:
        counting(input_ids=batch, use_cache=False)
    for path, share in counting.shares.items():
        assert share == pytest.approx(1 - recipe.sites[path].sparsity, abs=0.01), path


def test_top_k_is_counted_too() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    recipe = larosa_compile.calibrate(model, BATCHES[:1], 0.5, progress=False)
    counting = CountingModel(model, recipe)
    counting(input_ids=BATCHES[0], use_cache=False)
    features = {path: shape[1] for path, shape in recipe.parameters.items() if len(shape) == 2}
    for path, share in counting.shares.items():
        kept = max(1, round((1 - recipe.sites[path].sparsity) * features[path]))
        assert share == pytest.approx(kept / features[path], abs=1e-3)


def test_which_sites_a_method_has() -> None:
    sites = {name: calibrated(name)[1].sites for name in METHODS}
    assert "lm_head.weight" not in sites["teal"] and "lm_head.weight" in sites["larosa-relative"]
    assert {path.split(".", 3)[-1] for path in sites["cats"]} == {"mlp.down_proj.weight"}
    assert all(site.basis is None for name in ("teal", "cats") for site in sites[name].values())
    assert {site.selection for site in sites["cats"].values()} == {"gate"}
    assert len({site.quantiles for site in sites["teal"].values()}) == 4  # activations of a layer


def test_one_row_compiled() -> None:
    """Through Inductor, the function of the definitions."""
    model, recipe = calibrated("cats")
    ids = token_ids(1, 1, seed=4)
    expected = logits(compiled(model, recipe), ids)
    torch._dynamo.reset()
    fast = compiled(model, recipe, lowering="inductor")
    assert relative_error(logits(fast, ids), expected) < 1e-5
    report = larosa_compile.explain(fast).graphs[-1]
    assert report.is_average and "on average" in str(report) and "cats, nominal sparsity 0.5" in str(report)
    assert report.sites[0].selection == recipe.sites[report.sites[0].paths[0]].selection


def test_a_report_with_what_was_measured() -> None:
    model, recipe = calibrated("teal")
    report = larosa_compile.explain(model, recipe=recipe).graphs[0]
    site = report.sites[0]
    measured = report.with_shares({site.paths[0]: 0.25})
    assert measured.sites[0].kept == site.features // 4 and measured.sites[1:] == report.sites[1:]
    assert measured.sites[0].sparse_bytes == site.dense_bytes // 4
    assert measured.bytes_skipped_share > report.bytes_skipped_share


def test_the_file_holds_it(tmp_path: Path) -> None:
    _, recipe = calibrated("teal")
    recipe.save(tmp_path / "r.larosa.safetensors")
    loaded = Recipe.load(tmp_path / "r.larosa.safetensors")
    assert loaded.digest == recipe.digest and loaded.method == "teal" and loaded.sites == recipe.sites


def test_weights_in_fewer_bits() -> None:
    model, recipe = calibrated("teal")
    plain = next_token_losses(compiled(model, recipe), BATCHES[:1])
    packed = next_token_losses(compiled(model, recipe, weights="int8"), BATCHES[:1])
    assert packed != plain and packed == pytest.approx(plain, rel=0.02)


def test_dense_needs_no_recipe_and_drops_nothing() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    ids = token_ids(1, 1)
    fast = compiled(model, None, method="dense", calibration_tokens=0, lowering="inductor")
    assert relative_error(logits(fast, ids), logits(model, ids)) < 1e-5
    assert larosa_compile.explain(fast).graphs[0].bytes_skipped_share == 0


def test_the_option_must_be_the_method_of_the_recipe() -> None:
    model, recipe = calibrated("teal")
    ids = token_ids(1, 2)
    assert Config.from_options({"method": "teal"}).applied_to(recipe) is recipe
    with pytest.raises(Exception, match="must be that of the recipe, 'teal', or 'dense', got 'cats'; leave it out"):
        logits(compiled(model, recipe, method="cats"), ids)


def test_thresholds_are_not_learnt_from_traffic() -> None:
    with pytest.raises(Exception, match="for a model that has no recipe yet, got 'teal'; make one with"):
        logits(compiled(tiny_model("llama", num_hidden_layers=1), None, method="teal"), token_ids(1, 2))


def test_a_model_without_gates_has_no_site_for_cats() -> None:
    with pytest.raises(RecipeError, match=r"no linear of this model reads an activated gate .* use method='larosa'"):
        larosa_compile.calibrate(tiny_model("gpt2", num_hidden_layers=1), BATCHES[:1], method="cats", progress=False)


def test_a_method_rotates_or_does_not() -> None:
    with pytest.raises(OptionError, match="rotation for method 'teal' must be 'none' or None"):
        larosa_compile.calibrate(tiny_model("llama"), BATCHES, method="teal", rotation="model")
