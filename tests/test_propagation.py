"""The graph run with sparsity as data, against the simulation by hooks; marginal costs against finite differences."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile.errors import OptionError
from larosa_compile.propagation import Propagation
from larosa_compile.recipe import Recipe
from tests.support.models import relative_error, tiny_model, token_ids
from tests.support.simulation import simulated

IDS = token_ids(4, 48, seed=5)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2, vocab_size=512, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def recipe(model: PreTrainedModel) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 48, seed) for seed in range(2)], 0.5, progress=False)


@pytest.fixture(scope="module")
def propagation(model: PreTrainedModel, recipe: Recipe) -> Iterator[Propagation]:
    """Traced once; nothing in it changes."""
    torch._dynamo.reset()
    yield Propagation(model, recipe, IDS)
    torch._dynamo.reset()


def own(propagation: Propagation) -> dict[str, int]:
    return {name: site.kept for name, site in propagation.sites.items()}


def kl(dense: Tensor, sparse: Tensor) -> float:
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (dense, sparse))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def test_dense_is_the_model_and_sparse_is_the_recipe(
    model: PreTrainedModel, recipe: Recipe, propagation: Propagation
) -> None:
    dense = model(IDS).logits
    assert relative_error(propagation.logits(IDS), dense) < 1e-5
    # k of another recipe than the one that was compiled: it is data
    other = recipe.with_sparsity(0.3)
    kept = {
        name: max(1, round((1 - other.sites[name].sparsity) * site.features))
        for name, site in propagation.sites.items()
    }
    with simulated(model, other):
        expected = model(IDS).logits
    assert relative_error(propagation.logits(IDS, kept), expected) < 1e-4
    assert propagation.divergence(IDS, kept, dense) == pytest.approx(kl(dense, expected), rel=1e-3)


def test_the_bytes_are_those_of_the_report(model: PreTrainedModel, recipe: Recipe, propagation: Propagation) -> None:
    sites = propagation.sites.values()
    (report,) = larosa_compile.explain(model, recipe=recipe).graphs
    assert {(site.paths, site.features, site.kept, site.kept * site.feature_bytes) for site in sites} == {
        (site.paths, site.features, site.kept, site.sparse_bytes) for site in report.sites
    }


def test_the_last_selection_costs_what_finite_differences_say(propagation: Propagation) -> None:
    """Behind the head's selection there is no other. Curvature does not cancel where the entries inside are larger."""
    dense, kept = propagation.logits(IDS), own(propagation)
    (head,) = (name for name, site in propagation.sites.items() if site.kind == "head")
    divergence, found = propagation.marginals(IDS, kept, dense)
    assert found.keys() == propagation.sites.keys()
    assert divergence == pytest.approx(propagation.divergence(IDS, kept, dense), rel=1e-4)
    around = 3  # of 64 features: what a marginal is measured over
    fewer, more = (
        propagation.divergence(IDS, kept | {head: kept[head] + change}, dense) for change in (-around, around)
    )
    assert found[head].slope == pytest.approx((fewer - more) / (2 * around), rel=0.3)


def test_slopes_have_the_scale_of_finite_differences_through_other_selections(propagation: Propagation) -> None:
    dense, kept = propagation.logits(IDS), own(propagation)
    _, found = propagation.marginals(IDS, kept, dense)
    blocks = [name for name, site in propagation.sites.items() if site.kind != "head"]
    steps = {name: max(1, round(0.05 * propagation.sites[name].features)) for name in blocks}
    expected = sum(2 * steps[name] * found[name].slope for name in blocks)
    fewer, more = (
        propagation.divergence(IDS, kept | {name: kept[name] + sign * steps[name] for name in blocks}, dense)
        for sign in (-1, 1)
    )
    # a gradient that does not pass selections would be a fraction of it
    assert 0.6 < expected / (fewer - more) < 1.6


def test_squares_fall_with_rank(propagation: Propagation) -> None:
    _, found = propagation.marginals(IDS, own(propagation), propagation.logits(IDS))
    for name, marginal in found.items():
        assert len(marginal.squares) == propagation.sites[name].features
        assert bool((marginal.squares.diff() <= 0).all()) and marginal.energy > 0


def test_a_model_in_parts_is_refused(model: PreTrainedModel, recipe: Recipe) -> None:
    torch._dynamo.reset()
    cut = model.model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    try:
        with pytest.raises(OptionError, match=r"traced as one graph, got one in \d+; use allocate='paper'"):
            Propagation(model, recipe, IDS)
    finally:
        cut.remove()


def test_stacks_of_experts_drop_as_the_recipe_says_and_let_gradients_through() -> None:
    torch._dynamo.reset()
    experts = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1)
    ids = token_ids(2, 16)
    recipe = larosa_compile.calibrate(experts, [ids], 0.5, progress=False)
    made = Propagation(experts, recipe, ids)
    dense = made.logits(ids)
    with torch.no_grad():
        assert relative_error(dense, experts(ids).logits) < 1e-5
    _, found = made.marginals(ids, own(made), dense)
    assert found.keys() == made.sites.keys() and not any("experts" in name for name in found)


def test_what_has_no_derivative_is_an_error_that_says_what_to_do(
    propagation: Propagation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("derivative for aten::x is not implemented")

    monkeypatch.setattr(torch.autograd, "grad", fails)
    with pytest.raises(
        OptionError, match=r"cannot \(derivative for aten::x is not implemented\); use allocate='paper'"
    ):
        propagation.marginals(IDS, own(propagation), propagation.logits(IDS))
