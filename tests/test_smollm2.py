"""The method on a real pretrained model: SmolLM2-135M in float32, against eager and against the simulation.

Top-K is discontinuous: where rounding decides which of two nearly equal entries is kept, the outputs of two correct
implementations part, and every later token and layer sees it; so does one implementation in float32 and in float64.
So equality is asserted where no such tie has been met yet (most short sequences),
and perplexity on enough tokens for the ties to average out.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel, StaticCache

import larosa_compile
from benchmarks import assets
from larosa_compile.caches import CACHE
from larosa_compile.calibration import token_batches
from larosa_compile.evaluation import next_token_losses
from larosa_compile.recipe import Recipe
from tests.support.models import relative_error
from tests.support.simulation import simulated

CONTEXT = 256


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, Any]:
    return assets.load_model("smollm2", torch.float32)


@pytest.fixture(scope="module")
def windows(loaded: tuple[PreTrainedModel, Any]) -> list[torch.Tensor]:
    return list(token_batches(assets.text("wiki")[:40_000], loaded[1], CONTEXT))


@pytest.fixture(scope="module")
def recipe(loaded: tuple[PreTrainedModel, Any], windows: list[torch.Tensor]) -> Recipe:
    return larosa_compile.calibrate(loaded[0], windows[:8], sparsity=0.5)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: PreTrainedModel, recipe: Recipe) -> Any:
    return torch.compile(model, backend="larosa", options={"recipe": recipe})


@pytest.mark.parametrize(("rotation", "bases", "skipped"), [("auto", 5, 0.44), ("layer", 31, 0.375)])
def test_structure(
    loaded: tuple[PreTrainedModel, Any],
    windows: list[torch.Tensor],
    recipe: Recipe,
    rotation: str,
    bases: int,
    skipped: float,
) -> None:
    """30 layers of seven linears and the tied head, which has a basis of its own. What stays online is one adapter
    wherever the basis of the stream changes, one at either end, and the head's."""
    model, _ = loaded
    if rotation != "auto":
        recipe = larosa_compile.calibrate(model, windows[:1], sparsity=0.5, rotation=rotation)
    assert len(recipe.sites) == 211
    assert len(recipe.rotations) == bases
    (report,) = larosa_compile.explain(model, recipe=recipe).graphs
    assert len(report.sites) == 121, "q/k/v, o, gate/up, down of each layer; the head"
    assert len(report.online) == bases + 1
    assert not report.refusals
    assert report.bytes_skipped_share == pytest.approx(skipped, abs=0.005)


def test_sparsity_zero_is_exact(
    fresh: None, loaded: tuple[PreTrainedModel, Any], recipe: Recipe, windows: list[torch.Tensor]
) -> None:
    model, _ = loaded
    with torch.no_grad():
        expected = model(input_ids=windows[-1], use_cache=False).logits
        found = compiled(model, recipe.with_sparsity(0))(input_ids=windows[-1], use_cache=False).logits
    assert relative_error(found, expected) < 1e-4


def test_a_dense_prompt_is_exact_at_any_sparsity(
    fresh: None, loaded: tuple[PreTrainedModel, Any], recipe: Recipe, windows: list[torch.Tensor]
) -> None:
    model, _ = loaded
    options = {"recipe": recipe, "prompts": "dense", "lowering": "eager"}
    fast = torch.compile(model, backend="larosa", options=options)
    with torch.no_grad():
        expected = model(input_ids=windows[-1], use_cache=False).logits
        assert relative_error(fast(input_ids=windows[-1], use_cache=False).logits, expected) < 1e-4


def test_most_short_sequences_equal_the_simulation(
    fresh: None, loaded: tuple[PreTrainedModel, Any], recipe: Recipe, windows: list[torch.Tensor]
) -> None:
    model, _ = loaded
    ids = torch.cat(windows[-2:], 1).reshape(-1, 4)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        with simulated(model, recipe):
            expected = model(input_ids=ids, use_cache=False).logits
        found = compiled(model, recipe)(input_ids=ids, use_cache=False).logits
    errors = torch.tensor([relative_error(*pair) for pair in zip(found, expected, strict=True)])
    assert errors.median() < 1e-4
    assert relative_error(expected, dense) > 0.05, "half of the activations are gone: it must show"


@pytest.mark.slow
def test_sparse_perplexity_equals_the_simulation(
    fresh: None, loaded: tuple[PreTrainedModel, Any], recipe: Recipe
) -> None:
    model, tokenizer = loaded
    held_out = list(token_batches(assets.text("wiki"), tokenizer, 1024))[-64:]
    with simulated(model, recipe):
        expected = torch.tensor(next_token_losses(model, held_out))
    found = torch.tensor(next_token_losses(compiled(model, recipe), held_out))
    difference, error = found - expected, float((found - expected).std()) / len(held_out) ** 0.5
    print(f"backend over simulation: {difference.mean():+.4f} ± {error:.4f} nats")
    # by chance they part anew in every window, so the mean says whether one is worse, as far as its error lets it
    assert error < 0.004
    assert abs(difference.mean()) < 3 * error


@pytest.mark.slow
def test_decode_runs_templates_and_repeats_full_recomputation(
    fresh: None, loaded: tuple[PreTrainedModel, Any], recipe: Recipe, windows: list[torch.Tensor]
) -> None:
    """Of most short sequences, as above: which meet a tie is another matter on every processor."""
    model, _ = loaded
    fast, prompt = compiled(model, recipe), 2

    def read(cache: StaticCache, ids: torch.Tensor, start: int) -> torch.Tensor:
        position = torch.arange(start, start + ids.shape[1])[None]
        return fast(input_ids=ids, **{CACHE: cache}, use_cache=True, position_ids=position).logits

    errors, sequences = [], torch.cat(windows[-2:], 1).reshape(-1, 1, 4)[:32]
    with torch.no_grad():
        _, code = run_and_get_code(read, StaticCache(config=model.config, max_cache_len=64), sequences[0][:, :1], 0)
        for ids in sequences:
            cache = StaticCache(config=model.config, max_cache_len=64)
            found = [read(cache, ids[:, :prompt], 0)]
            found += [read(cache, ids[:, index : index + 1], index) for index in range(prompt, ids.shape[1])]
            with simulated(model, recipe):
                expected = model(input_ids=ids, use_cache=False).logits
            errors.append(relative_error(torch.cat(found, 1), expected))
    assert torch.tensor(errors).median() < 1e-4

    source = "\n".join(code)
    assert "larosa_sparse_gemv" in source
    assert "larosa_dot_gemv" not in source, "the head is a site"
    assert "extern_kernels." not in source and "torch.ops.aten._scaled_dot_product" not in source
