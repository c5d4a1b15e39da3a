"""Folded weights in fewer bits, end to end on tiny decoders."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import larosa_compile
from larosa_compile import weights
from larosa_compile.errors import RecipeError
from larosa_compile.kernels.formats import FORMATS, KNOWN, PACKED_DTYPE, UNSORTED, pack, unpack
from larosa_compile.recipe import Recipe
from larosa_compile.released import is_released
from tests.support.models import relative_error, tiny_model, token_ids

EACH = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


def calibrated(model: Any, sparsity: float) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 32, seed) for seed in range(3)], sparsity)


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="larosa", options=options)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def formats_of(recipe: Recipe, name: str) -> dict[str, str]:
    """Path of a weight -> its format, for the untied models here."""
    return {path: UNSORTED.name if site.basis is None else name for path, site in recipe.sites.items()}


@EACH
def test_it_is_the_model_with_rounded_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights in the graph of packed products, against the same weights in the graph that has none."""
    model = tiny_model("llama")
    recipe, ids = calibrated(model, 0.5), token_ids(2, 11)
    found = logits(compiled(model, recipe=recipe, lowering="eager", weights=name), ids)
    plain, build = logits(compiled(model, recipe=recipe, lowering="eager"), ids), weights._fold
    forms = formats_of(recipe, name)
    rounded = set()

    def fold(spec: Any, *given: Any) -> Any:
        folded = build(spec, *given)
        if spec.key.startswith("weight "):
            form = KNOWN[forms[spec.paths[0]]]
            folded.tensor.copy_(unpack(pack(folded.tensor, form), *folded.tensor.shape, form))
            rounded.update(spec.paths)
        return folded

    monkeypatch.setattr(weights, "_folded", type(weights._folded)())
    monkeypatch.setattr(weights, "_fold", fold)
    options = {"recipe": recipe, "lowering": "eager", "self_check": False}
    expected = logits(compiled(model, **options), ids)
    assert rounded >= set(recipe.sites)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(plain, expected) > 1e-3, "rounding must change something for this to test"


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_eager(name: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=1)
    recipe = calibrated(model, 0.4)
    fast, slow = (compiled(model, recipe=recipe, weights=name, lowering=how) for how in ("inductor", "eager"))
    for ids in (token_ids(1, 1), token_ids(1, 12)):
        expected = logits(slow, ids)
        # in bfloat16 another order of sums may change which entries are kept
        assert relative_error(logits(fast, ids), expected) < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(("name", "allowed"), [("int8", 0.02), ("int4", 0.2)])
def test_rounding_alone_changes_little(name: str, allowed: float) -> None:
    model = tiny_model("qwen2")
    recipe, ids = calibrated(model, 0.0), token_ids(2, 9)
    assert (
        relative_error(logits(compiled(model, recipe=recipe, lowering="eager", weights=name), ids), logits(model, ids))
        < allowed
    )


@EACH
def test_the_report_counts_what_is_stored(name: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    recipe = calibrated(model, 0.0).with_weights(name)
    fast = compiled(model, recipe=recipe, lowering="eager")
    planned = larosa_compile.explain(model, recipe=recipe).graphs[0]
    logits(fast, token_ids(1, 5))
    (graph,) = larosa_compile.explain(fast).graphs
    stored = [kept.tensor for kept in weights._folded.values() if kept.tensor.dtype == PACKED_DTYPE]
    assert sum(site.sparse_bytes for site in graph.sites) == sum(tensor.numel() for tensor in stored)
    bits = {path: f"int{KNOWN[form].bits}" for path, form in formats_of(recipe, name).items()}
    assert {path: site.weights for site in graph.sites for path in site.paths} == bits
    assert name in str(graph) and [site.sparse_bytes for site in planned.sites] == [s.sparse_bytes for s in graph.sites]


def test_prefill_and_decode_share_packed_weights_and_nothing_else_is_kept() -> None:
    model = tiny_model("llama")
    fast = compiled(model, recipe=calibrated(model, 0.5), lowering="eager", weights="int8")
    logits(fast, token_ids(1, 5))
    before = {id(kept) for kept in weights._folded.values()}
    logits(fast, token_ids(1, 1))
    logits(fast, token_ids(1, 9))
    gc.collect()
    assert {id(kept) for kept in weights._folded.values()} == before
    shapes = [tuple(kept.tensor.shape) for kept in weights._folded.values() if kept.tensor.is_floating_point()]
    assert all(len(shape) == 1 or shape == (64, 64) for shape in shapes), "plain folded weights must be gone"


def test_originals_are_released_and_the_embedding_stays() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    recipe, ids = calibrated(model, 0.5), token_ids(1, 6)
    expected = logits(compiled(model, recipe=recipe, lowering="eager", weights="int4"), ids)
    options = {"recipe": recipe, "lowering": "eager", "weights": "int4", "release_originals": True}
    assert torch.equal(logits(compiled(model, **options), ids), expected)
    released = {path for path, parameter in model.named_parameters() if is_released(parameter)}
    assert released == set(recipe.sites) - {"model.embed_tokens.weight"}


def test_stacks_of_experts_keep_their_dtype_and_say_so() -> None:
    model = tiny_model("mixtral", num_local_experts=4)
    recipe = calibrated(model, 0.0).with_weights("int8")  # nothing dropped, so that rounding rarely moves an expert
    fast = compiled(model, recipe=recipe, lowering="eager")
    ids = token_ids(1, 6)
    assert (
        relative_error(
            logits(fast, ids), logits(compiled(model, recipe=recipe.with_weights("model"), lowering="eager"), ids)
        )
        < 0.05
    )
    graph = larosa_compile.explain(model, recipe=recipe).graphs[0]
    kept = {path for site in graph.sites if site.weights is None for path in site.paths}
    assert kept and kept == {refusal.site for refusal in graph.refusals if "stack of weights" in refusal.reason}


def test_the_recipe_says_the_format_and_the_option_overrides_it(tmp_path: Path) -> None:
    recipe = Recipe(0.5, {}, {}, {}, {})
    assert recipe.weights == "model" and "weights" not in recipe.header()
    file = tmp_path / "r.larosa.safetensors"
    recipe.with_weights("int4").save(file)
    loaded = Recipe.load(file)
    assert loaded.weights == "int4" and loaded.digest != recipe.digest
    assert loaded.with_weights("model").digest == recipe.digest
    with pytest.raises(RecipeError, match="one of 'model', 'int8', 'int4', got 'int5'"):
        recipe.with_weights("int5")
    model = tiny_model("llama", num_hidden_layers=1)
    ids, own = token_ids(1, 3), calibrated(model, 0.5)
    packed = logits(compiled(model, recipe=own.with_weights("int8"), lowering="eager"), ids)
    assert torch.equal(logits(compiled(model, recipe=own, weights="int8", lowering="eager"), ids), packed)
    plain = logits(compiled(model, recipe=own.with_weights("int8"), weights="model", lowering="eager"), ids)
    assert torch.equal(plain, logits(compiled(model, recipe=own, lowering="eager"), ids)) and not torch.equal(
        plain, packed
    )
    with pytest.raises(
        BackendCompilerFailed, match="OptionError: option 'weights' must be one of 'model', 'int8', 'int4', got 'int3'"
    ):
        compiled(model, recipe=own, weights="int3")(input_ids=ids)


def test_columns_of_a_folded_weight_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of linears side by side, with scales, and with a rotation of what they read or write."""
    model = tiny_model("llama", num_hidden_layers=2)
    recipe, build, seen = calibrated(model, 0.5), weights._fold, []

    def checking(spec: Any, parameters: Any, recipe: Recipe) -> Any:
        if spec.columns is not None:
            whole, last = spec.build(parameters, recipe.rotations), spec.shape[1] - 1
            for chosen in (slice(0, 5), slice(7, last), slice(last, last + 1)):
                some = spec.columns(parameters, recipe.rotations, chosen)
                torch.testing.assert_close(some, whole[:, chosen], rtol=1e-5, atol=1e-6)
            seen.append(spec.key)
        return build(spec, parameters, recipe)

    monkeypatch.setattr(weights, "_fold", checking)
    logits(compiled(model, recipe=recipe, lowering="eager", self_check=False), token_ids(1, 3))
    assert len(seen) == 9 and any(" | " in key for key in seen)
