"""Folded weights: shared, fresh, gone with the last graph; and never those of another model."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import registry, weights
from larosa_compile.errors import StaleWeightsError
from larosa_compile.generation import unguarded
from larosa_compile.recipe import Recipe
from larosa_compile.weights import FoldedWeight
from tests.support.models import relative_error, tiny_model, token_ids

DENSE = 1e-5
"""Relative error of float32 logits through folded layers, as in test_backend."""


@pytest.fixture(autouse=True)
def _nothing_folded(recipe: Recipe) -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    assert not held()
    yield
    torch._dynamo.reset()


def held() -> list[Tensor]:
    return [folded.tensor for folded in list(weights._folded.values())]


def small(seed: int = 0, **options: Any) -> PreTrainedModel:
    return tiny_model("llama", seed, num_hidden_layers=1, **options)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """At sparsity 0 it is as right for a second small model as for the one it was measured on."""
    return larosa_compile.calibrate(small(), [token_ids(4, 16)], 0.0)


def compiled(model: PreTrainedModel, recipe: Recipe | None = None, guarded: bool = True) -> Any:
    options: dict[str, Any] = {"recipe": recipe, "lowering": "eager"}
    return torch.compile(model, backend="larosa", options=options if guarded else unguarded(**options))


def logits(model: Any, tokens: int = 8) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(1, tokens), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_share_tensors_in_the_model_s_dtype(dtype: torch.dtype, recipe: Recipe) -> None:
    model = small(dtype=dtype)
    fast = compiled(model, recipe)
    logits(fast)
    first = held()
    assert {(tensor.dtype, tensor.device) for tensor in first} == {(dtype, model.device)}
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in first)
    logits(fast, 1)
    assert {id(tensor) for tensor in held()} == {id(tensor) for tensor in first}


def test_they_are_freed_with_the_last_graph(recipe: Recipe) -> None:
    model = small()
    logits(compiled(model, recipe))
    references = [weakref.ref(tensor) for tensor in held()]
    gc.collect()
    assert references and all(reference() is not None for reference in references)
    torch._dynamo.reset()
    gc.collect()
    assert not held()
    assert all(reference() is None for reference in references)


def test_the_model_is_not_kept_alive(recipe: Recipe) -> None:
    model = small()
    logits(compiled(model, recipe))
    reference = weakref.ref(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert reference() is None


def test_another_recipe_has_other_tensors(recipe: Recipe) -> None:
    model = small()
    logits(compiled(model, recipe))
    first = {id(tensor) for tensor in held()}
    logits(compiled(model, recipe.without_rotation()))
    assert len(held()) > len(first)
    assert first < {id(tensor) for tensor in held()}


@pytest.mark.parametrize("remembered", [True, False])
def test_another_model_of_the_same_shape_has_its_own(remembered: bool, recipe: Recipe) -> None:
    first, second = small(0), small(1)
    for model in (first, second):
        registry.remember_recipe(model, recipe)
    given = None if remembered else recipe
    # no reset: Dynamo knows the code of both
    for model in (first, second, first):
        assert relative_error(logits(compiled(model, given)), logits(model)) < DENSE


def test_without_guards_another_model_is_refused(recipe: Recipe) -> None:
    """Then Dynamo runs the graph of the first, and its folded weights, for the second."""
    first, second = small(0), small(1)
    fast, other = (compiled(model, recipe, guarded=False) for model in (first, second))
    assert relative_error(logits(fast), logits(first)) < DENSE
    with pytest.raises(StaleWeightsError, match="not the parameter that larosa folded"):
        logits(other)
    torch._dynamo.reset()
    assert relative_error(logits(other), logits(second)) < DENSE


def scale_in_place(linear: nn.Linear) -> None:
    linear.weight.mul_(1.5)


def copy_into(linear: nn.Linear) -> None:
    linear.load_state_dict({"weight": linear.weight * 1.5})


def new_parameter(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight * 1.5)


def assign(linear: nn.Linear) -> None:
    linear.load_state_dict({"weight": linear.weight * 1.5}, assign=True)


def new_data(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data * 1.5


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("change", [scale_in_place, copy_into, new_parameter, assign, new_data])
def test_no_change_of_a_weight_goes_unnoticed(change: Any, guarded: bool, recipe: Recipe) -> None:
    model = small()
    fast = compiled(model, recipe, guarded)
    before = logits(fast)
    with torch.no_grad():
        change(model.model.layers[0].mlp.up_proj)
    expected = logits(model)
    assert relative_error(before, expected) > 100 * DENSE
    try:
        found = logits(fast)
    except StaleWeightsError as error:
        assert "model.layers.0.mlp.up_proj.weight" in str(error)
        torch._dynamo.reset()
        found = logits(fast)
    assert relative_error(found, expected) < DENSE


def test_a_folded_weight_knows_what_it_is_made_of() -> None:
    source, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    folded = FoldedWeight(torch.ones(3), ((weakref.ref(source), weights._version(source)),))
    assert folded.is_made_of([source])
    assert not folded.is_made_of([other])
    assert not folded.is_made_of([])
    assert not folded.is_made_of([source, source])
    with torch.no_grad():
        source.mul_(2)
    assert not folded.is_made_of([source])
