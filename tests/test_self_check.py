"""A fold that is wrong does not reach the user: the sites it touched stay dense, and the report names them."""

import logging
import weakref
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import registry
from larosa_compile.caches import CACHE
from larosa_compile.passes import equivariance, fold
from larosa_compile.passes.graph import aten
from larosa_compile.recipe import Recipe
from tests.support.models import relative_error, tiny_model, token_ids

LAYERS = 2


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=LAYERS)


@pytest.fixture
def recipe(model: PreTrainedModel) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 16)], 0.0, progress=False)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    registry.drop_graphs()


def compiled_error(model: torch.nn.Module, recipe: Recipe, **options: Any) -> float:
    """Relative error of the compiled model's logits at the recipe's sparsity."""
    ids = token_ids(2, 9)
    chosen: Any = {"recipe": recipe, "lowering": "eager", **options}
    fast = torch.compile(model, backend="larosa", options=chosen)
    with torch.no_grad():
        return relative_error(fast(input_ids=ids).logits, model(input_ids=ids).logits)


def dense_sites(model: PreTrainedModel) -> dict[str, str]:
    """What the last compiled graph left dense, the head aside."""
    (report,) = larosa_compile.explain(model).graphs
    return {refusal.site: refusal.reason for refusal in report.refusals if "lm_head" not in refusal.site}


def break_fold(monkeypatch: pytest.MonkeyPatch, *broken: str) -> None:
    """Folds as if the norms before some weights had no scale, the mistake of folding nothing."""
    right = fold._fold_into

    def wrong(out: torch.Tensor, item: fold.LinearFold, *others: Any) -> None:
        if item.linear.path in broken:
            item = fold.LinearFold(item.linear, None, item.read, item.write)
        right(out, item, *others)

    monkeypatch.setattr(fold, "_fold_into", wrong)


def test_right_folds_pass(model: PreTrainedModel, recipe: Recipe) -> None:
    assert compiled_error(model, recipe) < 1e-5
    assert not dense_sites(model)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_wrong_fold_leaves_its_site_dense(
    model: PreTrainedModel,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    layer: int,
) -> None:
    broken = f"model.layers.{layer}.mlp.up_proj.weight"
    break_fold(monkeypatch, broken)
    # the test would show nothing if this fold were right after all
    assert compiled_error(model, recipe, self_check=False) > 1e-2
    registry.drop_graphs()
    with caplog.at_level(logging.WARNING, "larosa_compile"):
        assert compiled_error(model, recipe) < 1e-5
    faulty = dense_sites(model)
    # gate and up are one product
    assert set(faulty) == {broken, broken.replace("up", "gate")}
    assert all("self-check" in reason for reason in faulty.values())
    assert all(path in caplog.text for path in faulty)


def test_a_wrong_fold_is_found_after_the_graph_was_compiled(
    model: PreTrainedModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "model.layers.0.mlp.up_proj.weight"
    break_fold(monkeypatch, broken)
    assert compiled_error(model, recipe, lowering="inductor") < 1e-5
    assert set(dense_sites(model)) == {broken, broken.replace("up", "gate")}


def test_two_wrong_folds(model: PreTrainedModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer, name in ((0, "v"), (1, "q"))]
    break_fold(monkeypatch, *broken)
    assert compiled_error(model, recipe) < 1e-5
    assert {path.split(".")[2] for path in dense_sites(model)} == {"0", "1"}
    assert all("self_attn" in path for path in dense_sites(model))


def test_a_wrong_rule_takes_the_rotations_out(
    model: PreTrainedModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a number added to every feature were not noticed: the norm's epsilon would not be, a mean would."""
    monkeypatch.setitem(equivariance._RULES, aten.rsqrt.default, equivariance._RULES[aten.neg.default])
    # a right rotation of an equal recipe may still be held by what another test compiled
    monkeypatch.setattr("larosa_compile.weights._folded", weakref.WeakValueDictionary())
    monkeypatch.setattr("larosa_compile.passes.rotate.matrix", lambda rotations, basis: 2 * torch.eye(64).double())
    assert compiled_error(model, recipe, self_check=False) > 1e-2
    registry.drop_graphs()
    assert compiled_error(model, recipe) < 1e-5
    assert dense_sites(model)


def test_caches_are_left_as_they_were(model: PreTrainedModel, recipe: Recipe) -> None:
    """The check runs a graph that writes to its inputs; what it wrote must not be seen."""
    from transformers import StaticCache

    options: Any = {"recipe": recipe, "lowering": "eager"}
    fast = torch.compile(model, backend="larosa", options=options)
    ids, logits = token_ids(1, 8), []
    for forward in (model, fast):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache}, use_cache=True)
            for position in (8, 9):
                step = forward(
                    input_ids=ids[:, :1], **{CACHE: cache}, position_ids=torch.tensor([[position]]), use_cache=True
                )
            logits.append(step.logits)
    assert relative_error(logits[1], logits[0]) < 1e-5


def test_infinities_and_sizes_are_compared() -> None:
    from larosa_compile.self_check import _differ

    x = torch.randn(20, 8)
    masked = x.masked_fill(x > 1, -torch.inf)
    assert not _differ(masked, masked.clone())
    assert not _differ(masked + 1e-6, masked)
    assert _differ(x, masked)
    assert _differ(x[:, :4], x)
    assert _differ(x.double(), x)
    assert _differ(x + 0.01, x)
    assert not _differ(torch.zeros(0, 4), torch.zeros(0, 4))
    assert not _differ(torch.arange(3), torch.arange(3))
    one_row = x.clone()
    one_row[0] *= 2
    assert not _differ(one_row, x), "a token that meets another expert"
    assert _differ(torch.full_like(x, torch.nan), x)
