"""A model without a recipe learns one from its traffic: what counts, when it switches, what is kept of it."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import StaticCache

import larosa_compile
from larosa_compile import online, registry
from larosa_compile.caches import CACHE
from larosa_compile.errors import OptionError
from larosa_compile.self_check import Fault
from tests.support.learning import DENSE, learning, logits, seen, small, sparse_logits, token_ids
from tests.support.models import relative_error, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(
    ("lowering", "shapes", "later"),
    [
        ("eager", [(2, 12), (3, 1), (2, 11)], [(1, 5), (4, 1)]),
        ("inductor", [(7, 1)] * 7, []),
    ],
)
def test_dense_until_enough_was_seen_and_sparse_from_then_on(
    lowering: str, shapes: list[Any], later: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    fast = learning(model, lowering=lowering, calibration_tokens=49)
    calls = [token_ids(*shape, seed) for seed, shape in enumerate(shapes)]
    with caplog.at_level(logging.INFO, "larosa_compile"):
        for ids in calls:
            assert relative_error(logits(fast, ids), logits(model, ids)) < DENSE
            assert registry.recipe_of(model.parameters()) is None
        assert seen(model) == 49 and not registry.reports_of(model.parameters())
        graphs = counters["stats"]["unique_graphs"]
        for index, ids in enumerate([*calls[:4], *(token_ids(*shape) for shape in later)]):
            found = logits(fast, ids)
            expected = sparse_logits(model, larosa_compile.recipe_of(fast), ids)
            assert relative_error(found, expected) < DENSE
            assert relative_error(found, logits(model, ids)) > 0.01, "sparsity must change something for this to test"
            if index < len(calls):
                assert counters["stats"]["unique_graphs"] == graphs, "switching traces nothing"
    begins, switches = [record for record in caplog.records if record.name == "larosa_compile"]
    assert "next 49 tokens" in begins.message and "calibration_tokens" in begins.message
    assert "49 tokens" in switches.message and "recipe_of(model).save(path)" in switches.message
    assert registry.reports_of(model.parameters())


def test_prompt_and_decoding_share_a_collection_and_count_each_token_once() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    fast = learning(model, calibration_tokens=1000)
    cache, ids = StaticCache(config=model.config, max_cache_len=32), token_ids(1, 9)
    with torch.no_grad():
        fast(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        for step in range(6):
            position = torch.tensor([[9 + step]])
            fast(input_ids=token_ids(1, 1, step), **{CACHE: cache}, use_cache=True, position_ids=position)
    assert seen(model) == 9 + 6


def test_what_is_learnt_may_be_read_in_fewer_bits() -> None:
    model = small()
    fast = learning(model, weights="int8", sparsity=0.25)
    for seed in range(2):
        logits(fast, token_ids(4, 12, seed))
    ids = token_ids(4, 12, 5)
    found = logits(fast, ids)
    assert all(site.weights == "int8" for graph in larosa_compile.explain(fast).graphs for site in graph.sites)
    recipe = larosa_compile.recipe_of(model)
    torch._dynamo.reset()
    options = {"lowering": "eager", "recipe": recipe, "sparsity": 0.25, "weights": "int8"}
    explicit = logits(torch.compile(model, backend="larosa", options=options), ids)
    assert relative_error(found, explicit) < DENSE
    assert relative_error(explicit, sparse_logits(model, recipe, ids)) > DENSE, "rounding must show for this to test"


def test_graphs_compiled_later_have_the_recipe_at_once() -> None:
    model = small()
    fast = learning(model)
    for _ in range(2):
        logits(fast, token_ids(4, 12))
    late = torch.compile(model, backend="larosa", options={"lowering": "eager", "sparsity": 0.25})
    recipe = larosa_compile.recipe_of(model)
    ids = token_ids(1, 2)
    for compiled, at in ((fast, recipe), (late, recipe.with_sparsity(0.25))):
        expected = sparse_logits(model, at, ids)
        assert relative_error(logits(compiled, ids), expected) < DENSE


def test_the_sparsity_of_a_recipe_is_an_option() -> None:
    model, ids = small(), token_ids(1, 8)
    recipe = larosa_compile.calibrate(model, [token_ids(4, 12)])
    expected = logits(learning(model, recipe=recipe.with_sparsity(0.25)), ids)
    for options in ({"recipe": recipe}, {}):  # the recipe given, or the one that was calibrated
        torch._dynamo.reset()
        assert torch.equal(logits(learning(model, sparsity=0.25, **options), ids), expected)


def test_a_calibration_meanwhile_takes_over() -> None:
    model, ids = small(), token_ids(1, 12)
    fast = learning(model, sparsity=None)
    logits(fast, ids)
    recipe = larosa_compile.calibrate(model, [token_ids(4, 12)], 0.25)
    assert larosa_compile.recipe_of(fast) is recipe
    expected = sparse_logits(model, recipe, ids)
    assert relative_error(logits(fast, ids), expected) < DENSE


def test_what_the_check_finds_stays_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = small(), token_ids(4, 12)
    fault = Fault(frozenset(), "the self-check found something")
    monkeypatch.setattr(online, "find_fault", lambda *_: fault)
    fast = learning(model)
    for _ in range(3):
        assert relative_error(logits(fast, ids), logits(model, ids)) < DENSE
    (report,) = registry.reports_of(model.parameters())
    assert not report.sites and {refusal.reason for refusal in report.refusals} == {fault.reason}
    assert "stays dense" in caplog.text
    # anew, it is compiled with the recipe that there now is
    torch._dynamo.reset()
    expected = sparse_logits(model, larosa_compile.recipe_of(model), ids)
    assert relative_error(logits(fast, ids), expected) < DENSE


def test_originals_cannot_be_released_while_they_run() -> None:
    with pytest.raises(Exception, match=r"'release_originals' must be False .* calibrate it first") as caught:
        logits(learning(small(), release_originals=True), token_ids(1, 4))
    assert isinstance(caught.value.inner_exception, OptionError)


def test_inference_mode() -> None:
    model, ids = small(), token_ids(4, 12)
    fast = learning(model)
    with torch.inference_mode():
        fast(input_ids=ids[:2], use_cache=False)
    logits(fast, ids)
    with torch.inference_mode():
        found = fast(input_ids=ids[:2], use_cache=False).logits.clone()
    expected = sparse_logits(model, larosa_compile.recipe_of(model), ids[:2])
    assert relative_error(found, expected) < DENSE


def test_a_graph_without_a_site_is_dense() -> None:
    class NoStream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model, x = NoStream().eval(), torch.randn(3, 16)
    with torch.no_grad():
        assert torch.allclose(learning(model)(x), model(x))
    (report,) = registry.reports_of(model.parameters())
    assert not report.sites
