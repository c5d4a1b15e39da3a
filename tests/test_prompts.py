"""`options={"prompts": "dense"}`: what reads all weights anyway drops nothing, what is decoded afterwards does."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

import larosa_compile
from larosa_compile.caches import CACHE
from larosa_compile.kernels.support import skips_weights
from larosa_compile.passes.pipeline import facts_of
from larosa_compile.passes.plan import make_plan
from tests.support.decoder import Decoder, choices_for, ids
from tests.support.graphs import capture_graph
from tests.support.models import relative_error, tiny_model, token_ids
from tests.support.simulation import simulated

EXACT = 1e-5
"""Relative error of float32 logits through three folded layers."""

PROMPT = 12


def compiled(model: PreTrainedModel, recipe: larosa_compile.Recipe | None = None, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="larosa", options={"recipe": recipe, "prompts": "dense"} | options)


def calibrated(model: PreTrainedModel, **options: Any) -> larosa_compile.Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 32, seed) for seed in range(3)], 0.5, **options)


def call(model: Any, ids: torch.Tensor, cache: StaticCache | None = None) -> torch.Tensor:
    given = {} if cache is None else {CACHE: cache}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=cache is not None, **given).logits
    return logits


def cache_of(model: PreTrainedModel) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=PROMPT + 4)


@pytest.mark.parametrize(
    ("method", "lowering"), [({}, "inductor"), ({"selection": "relative"}, "eager"), ({"method": "cats"}, "eager")]
)
def test_a_prompt_is_exact_and_what_follows_is_sparse(method: dict[str, Any], lowering: str) -> None:
    model = tiny_model("llama")
    recipe = calibrated(model, **method)
    fast, prompt = compiled(model, recipe, lowering=lowering), token_ids(1, PROMPT)
    following = token_ids(1, 2, seed=5)
    cache, expected_cache = cache_of(model), cache_of(model)
    assert relative_error(call(fast, prompt, cache), call(model, prompt, expected_cache)) < EXACT
    for token in following.split(1, dim=1):
        dense = call(model, token, deepcopy(expected_cache))
        with simulated(model, recipe):
            expected = call(model, token, expected_cache)
        assert relative_error(expected, dense) > 0.01, "the method must change something for this to test"
        assert relative_error(call(fast, token, cache), expected) < EXACT


def test_the_report_says_which_graph_drops_nothing() -> None:
    model = tiny_model("llama")
    fast = compiled(model, calibrated(model), lowering="eager")
    call(fast, token_ids(1, PROMPT))
    call(fast, token_ids(1, 1))
    prompt, token = larosa_compile.explain(fast).graphs
    assert all(site.kept == site.features for site in prompt.sites) and prompt.bytes_skipped_share <= 0
    assert all(site.kept < site.features for site in token.sites) and token.bytes_skipped_share > 0.3
    assert "sparsity 0.5, dense prompts" in str(prompt)
    # folded alike, so both read the same weights
    assert [site.read for site in prompt.sites] == [site.read for site in token.sites]


@pytest.mark.parametrize(("rows", "is_dense"), [((1, 8), False), ((2, 4), False), ((1, 9), True), ((3, 3), True)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_as_many_rows_as_a_kernel_takes_stay_sparse(rows: tuple[int, int], is_dense: bool, dynamic: bool) -> None:
    captured = capture_graph(Decoder(2), ids(*rows), dynamic=dynamic or None)
    facts, choices = facts_of(captured.graph, captured.fake_mode), choices_for(2, 0.5)
    assert all(site.is_sparse for site in make_plan(facts, choices).sites)
    sites = make_plan(facts, choices, dense_prompts=True).sites
    # a number of rows that may be any has no kernel that skips
    assert sites and all(site.is_sparse != (is_dense or dynamic) for site in sites)


def test_packed_weights() -> None:
    model = tiny_model("llama")
    recipe, prompt = calibrated(model), token_ids(1, PROMPT)
    packed = {"weights": "int8", "lowering": "eager"}
    whole = call(compiled(model, recipe, sparsity=0.0, prompts="sparse", **packed), prompt)
    assert relative_error(call(compiled(model, recipe, **packed), prompt), whole) < EXACT


def test_a_recipe_that_is_learnt() -> None:
    model = tiny_model("llama")
    fast = compiled(model, calibration_tokens=64, sparsity=0.5, lowering="eager")
    call(fast, token_ids(4, 32))
    prompts = token_ids(4, 32, seed=1)
    assert relative_error(call(fast, prompts), call(model, prompts)) < EXACT
    assert larosa_compile.recipe_of(model) is not None
    one = token_ids(1, 1)
    assert relative_error(call(fast, one), call(model, one)) > 0.01


def test_rows_whose_weights_are_read_one_by_one() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert skips_weights(cpu, 8, 64, 32) and not skips_weights(cpu, 9, 64, 32)
    # each row reads its own there
    assert skips_weights(gpu, 2, 64, 32) and not skips_weights(gpu, 3, 64, 32) and skips_weights(gpu, 1, 64, 64)
    assert not skips_weights(cpu, None, 64, 32) and not skips_weights(gpu, None, 64, 32)
