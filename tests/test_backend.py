"""`torch.compile(model, backend="larosa")` end to end on tiny decoders with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel, StaticCache

import larosa_compile
from larosa_compile import registry
from larosa_compile.caches import CACHE
from larosa_compile.errors import (
    InferenceOnlyError,
    MissingRecipeError,
    OptionError,
    RecipeMismatchError,
    StaleRecipeError,
    StaleWeightsError,
)
from larosa_compile.recipe import Recipe
from tests.support.models import relative_error, tiny_model, token_ids
from tests.support.simulation import simulated

DENSE = 1e-5
"""Relative error of float32 logits through three folded layers; measured at 5e-7."""


def calibrated(model: PreTrainedModel, sparsity: float = 0.5, **options: Any) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 32, seed) for seed in range(3)], sparsity, **options)


def compiled(model: PreTrainedModel, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="larosa", options=options)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_sparsity_zero_is_exact(architecture: str, lowering: str) -> None:
    model = tiny_model(architecture)
    recipe = calibrated(model, 0.0)
    ids = token_ids(2, 9)
    assert relative_error(logits(compiled(model, recipe=recipe, lowering=lowering), ids), logits(model, ids)) < DENSE


@pytest.mark.parametrize("rotation", ["layer", "model", 2, "none"])
def test_every_rotation_granularity_equals_the_simulation(rotation: Any) -> None:
    model = tiny_model("llama")
    recipe = calibrated(model, 0.5, rotation=rotation)
    ids = token_ids(2, 11)
    with simulated(model, recipe):
        expected = logits(model, ids)
    assert relative_error(expected, logits(model, ids)) > 0.05, "the method must change something for this to test"
    assert relative_error(logits(compiled(model, recipe=recipe, lowering="eager"), ids), expected) < DENSE


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_compiled_sparse_model_equals_the_simulation(architecture: str) -> None:
    model = tiny_model(architecture)
    recipe = calibrated(model)
    for tokens in (12, 1):
        ids = token_ids(1, tokens)
        with simulated(model, recipe):
            expected = logits(model, ids)
        assert relative_error(logits(compiled(model, recipe=recipe), ids), expected) < DENSE


def test_bfloat16_is_as_close_to_float32_as_eager_is() -> None:
    exact = tiny_model("llama")
    ids = token_ids(2, 9)
    expected = logits(exact, ids)
    model = tiny_model("llama", dtype=torch.bfloat16)
    eager_error = relative_error(logits(model, ids), expected)
    error = relative_error(logits(compiled(model, recipe=calibrated(model, 0.0)), ids), expected)
    # one more rounding per layer (the adapter) next to eager's own
    assert error < 2 * eager_error


def decode(model: Any, config: Any, ids: torch.Tensor, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens through a static cache, and the last logits."""
    cache = StaticCache(config=config, max_cache_len=ids.shape[1] + steps)
    tokens: list[int] = []
    with torch.no_grad():
        last = model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[:, -1]
        for step in range(steps):
            tokens.append(int(last.argmax()))
            position = torch.tensor([[ids.shape[1] + step]])
            last = model(
                input_ids=torch.tensor([tokens[-1:]]), **{CACHE: cache}, use_cache=True, position_ids=position
            ).logits[:, -1]
    return tokens, last


def test_decode_through_a_static_cache_equals_full_recomputation() -> None:
    model = tiny_model("llama")
    recipe = calibrated(model)
    ids = token_ids(1, 7)
    tokens, last = decode(compiled(model, recipe=recipe), model.config, ids, 12)
    whole = torch.cat([ids, torch.tensor([tokens])], 1)
    with simulated(model, recipe):
        recomputed = logits(model, whole)
    assert tokens == recomputed[0, ids.shape[1] - 1 : -1].argmax(-1).tolist()
    assert relative_error(last, recomputed[:, -1]) < DENSE


def test_decode_runs_the_template_and_no_dense_product_at_a_site(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    fast = compiled(model, recipe=calibrated(model), dump=tmp_path)
    with torch.no_grad():
        _, code = run_and_get_code(fast, input_ids=token_ids(1, 1), use_cache=False)
    source = "\n".join(code)
    assert "larosa_sparse_gemv" in source
    # the head is no site: it is the one dense product left
    assert source.count("extern_kernels.mm(") + source.count("extern_kernels.addmm(") <= 1
    # the dump has this code, and layers share kernels in it: what a call is for, its weight says
    dumped = (tmp_path / "graph_0" / "generated_code.py").read_text()
    assert dumped.strip() == source.strip()
    assert "weight_model_layers_2_mlp_down_proj_weight" in dumped


def test_prefill_and_decode_share_folded_weights() -> None:
    from larosa_compile import weights

    model = tiny_model("llama")
    fast = compiled(model, recipe=calibrated(model), lowering="eager")
    logits(fast, token_ids(1, 8))
    held = {id(weight) for weight in weights._folded.values()}
    logits(fast, token_ids(1, 1))
    assert held and {id(weight) for weight in weights._folded.values()} == held
    del fast
    torch._dynamo.reset()


def test_each_recipe_gives_its_own_result() -> None:
    model = tiny_model("llama")
    ids = token_ids(1, 8)
    quarter, half = calibrated(model, 0.25), calibrated(model, 0.5)
    results = []
    for recipe in (quarter, half, quarter.without_rotation()):
        fast = torch.compile(model, backend="larosa", options={"recipe": recipe})
        with simulated(model, recipe):
            expected = logits(model, ids)
        results.append(logits(fast, ids))
        assert relative_error(results[-1], expected) < DENSE
    assert relative_error(results[0], results[1]) > 0.01


def test_a_second_model_of_the_same_shape_gives_its_own_result_through_warm_caches() -> None:
    ids = token_ids(1, 8)
    for seed in (0, 1, 0):
        model = tiny_model("llama", seed=seed)
        recipe = calibrated(model)
        # Inductor first: what it caches for this model must not be served to larosa
        assert relative_error(logits(torch.compile(model), ids), logits(model, ids)) < DENSE
        with simulated(model, recipe):
            expected = logits(model, ids)
        assert relative_error(logits(compiled(model, recipe=recipe), ids), expected) < DENSE


def test_models_of_one_class_do_not_share_compiled_graphs() -> None:
    """To Dynamo two models of one class differ in their weights only, which are inputs; their folded copies are not."""
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    recipes = [calibrated(model) for model in models]
    torch._dynamo.reset()
    ids = token_ids(1, 8)
    for model, recipe in zip(models, recipes, strict=True):
        with simulated(model, recipe):
            expected = logits(model, ids)
        bare = torch.compile(model, backend="larosa", options={"lowering": "eager"})
        assert relative_error(logits(bare, ids), expected) < DENSE


def test_bare_compile_uses_the_last_calibration() -> None:
    model = tiny_model("llama")
    ids = token_ids(1, 8)
    for sparsity in (0.5, 0.0):
        recipe = calibrated(model, sparsity)
        assert registry.recipe_of(model.parameters()) is recipe
        with simulated(model, recipe):
            expected = logits(model, ids)
        assert relative_error(logits(torch.compile(model, backend="larosa"), ids), expected) < DENSE


def test_a_recipe_file_is_an_option(tmp_path: Path) -> None:
    model = tiny_model("llama")
    recipe = calibrated(model)
    path = tmp_path / "tiny.larosa.safetensors"
    recipe.save(path)
    ids = token_ids(1, 8)
    from_file = logits(compiled(model, recipe=str(path), lowering="eager"), ids)
    assert torch.equal(from_file, logits(compiled(model, recipe=recipe, lowering="eager"), ids))


def test_a_recipe_file_written_anew_is_noticed(tmp_path: Path) -> None:
    """Dynamo would reuse the first compile: to it, the same path is the same backend."""
    model = tiny_model("llama")
    path = tmp_path / "tiny.larosa.safetensors"
    recipe = calibrated(model, 0.5)
    recipe.save(path)
    ids = token_ids(1, 8)
    logits(compiled(model, recipe=str(path), lowering="eager"), ids)
    recipe.with_sparsity(0.25).save(path)
    again = torch.compile(model, backend="larosa", options={"recipe": str(path), "lowering": "eager"})
    with pytest.raises(StaleRecipeError, match=r"torch\._dynamo\.reset"):
        logits(again, ids)
    torch._dynamo.reset()
    with simulated(model, recipe.with_sparsity(0.25)):
        expected = logits(model, ids)
    assert relative_error(logits(again, ids), expected) < DENSE


def test_a_model_without_a_recipe_is_told_how_to_get_one() -> None:
    model = tiny_model("llama")
    with pytest.raises(Exception, match=r"larosa_compile\.calibrate\(model, batches\)") as caught:
        logits(compiled(model, calibration_tokens=0), token_ids(1, 4))
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, MissingRecipeError)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sparsty": 0.5}, OptionError, "unknown option 'sparsty'"),
        ({"lowering": "fast"}, OptionError, "'inductor', 'eager'"),
        ({"recipe": "nowhere.safetensors"}, Exception, "nowhere.safetensors"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(Exception, match=says) as caught:
        logits(compiled(tiny_model("llama"), **options), token_ids(1, 4))
    assert isinstance(caught.value.inner_exception, error)


def test_the_recipe_of_another_model_is_refused() -> None:
    recipe = calibrated(tiny_model("llama"))
    wider = tiny_model("llama", intermediate_size=192)
    with pytest.raises(Exception, match=r"mlp\.gate_proj\.weight: found \[192, 64\], expected \[160, 64\]") as caught:
        logits(compiled(wider, recipe=recipe), token_ids(1, 4))
    assert isinstance(caught.value.inner_exception, RecipeMismatchError)


def test_gradients_are_refused() -> None:
    model = tiny_model("llama")
    fast = compiled(model, recipe=calibrated(model))
    with pytest.raises(Exception, match=r"torch\.no_grad\(\)") as caught:
        fast(input_ids=token_ids(1, 4), use_cache=False)
    assert isinstance(caught.value.inner_exception, InferenceOnlyError)


def test_a_changed_weight_is_noticed_and_folded_again_after_a_reset() -> None:
    model = tiny_model("llama")
    recipe = calibrated(model)
    fast = compiled(model, recipe=recipe, lowering="eager")
    ids = token_ids(1, 8)
    logits(fast, ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(StaleWeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        logits(fast, ids)
    torch._dynamo.reset()
    with simulated(model, recipe):
        expected = logits(model, ids)
    assert relative_error(logits(fast, ids), expected) < DENSE


def test_lengths_may_vary() -> None:
    model = tiny_model("llama")
    recipe = calibrated(model)
    fast = compiled(model, recipe=recipe)
    for rows, tokens in ((1, 8), (1, 11), (3, 5), (1, 1)):
        ids = token_ids(rows, tokens)
        with simulated(model, recipe):
            expected = logits(model, ids)
        assert relative_error(logits(fast, ids), expected) < DENSE


def test_generate_compiles_decode_through_the_backend() -> None:
    from transformers import CompileConfig

    model = tiny_model("llama")
    recipe = calibrated(model, 0.0)
    torch._dynamo.reset()
    compile_config = CompileConfig(backend="larosa", mode=None, fullgraph=False, options={"recipe": recipe})
    compile_config._compile_all_devices = True  # transformers compiles `generate` on accelerators only by default
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = token_ids(1, 6)
    expected = model.generate(ids, **arguments)
    found = model.generate(ids, cache_implementation="static", compile_config=compile_config, **arguments)
    assert torch.equal(found, expected)
    assert any(report.rows == "1" for report in registry.reports_of(model.parameters()))
