"""A model that reaches the backend in parts: each part is exact, and knows which part of the model it is."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import registry
from larosa_compile.recipe import Recipe
from tests.support.models import relative_error, tiny_model, token_ids

OPTIONS: Any = {"lowering": "eager"}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def calibrated(model: nn.Module, sparsity: float = 0.0) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 16)], sparsity, progress=False)


def break_graph_before(layer: nn.Module) -> None:
    def hook(module: nn.Module, args: Any) -> None:
        torch._dynamo.graph_break()

    layer.register_forward_pre_hook(hook)


@pytest.mark.parametrize("calibrated_whole", [False, True])
def test_graph_breaks_between_layers(model: PreTrainedModel, calibrated_whole: bool) -> None:
    """With the recipe of the model as it is, and with that of the whole."""
    ids = token_ids(2, 9)
    dense = logits(model, ids)
    if calibrated_whole:
        recipe = calibrated(model)
    for layer in model.model.layers:
        break_graph_before(layer)
    if not calibrated_whole:
        recipe = calibrated(model)
    registry.drop_graphs()
    fast = torch.compile(model, backend="larosa", options={"recipe": recipe, **OPTIONS})
    assert relative_error(logits(fast, ids), dense) < 1e-5
    reports = larosa_compile.explain(fast).graphs
    assert len(reports) > 1
    paths = [path for report in reports for site in report.sites for path in site.paths]
    assert sorted(paths) == sorted(recipe.sites)
    # in parts, no graph has both a stream and the head
    assert len(recipe.sites) == 14 + calibrated_whole
    assert any(site.read for report in reports for site in report.sites), "nothing is rotated"


@pytest.mark.parametrize("part", ["model", "model.layers.1", "model.layers.1.mlp"])
def test_a_part_of_a_model(model: PreTrainedModel, part: str, tmp_path: Path) -> None:
    ids = token_ids(2, 9)
    dense = logits(model, ids)
    calibrated(model).save(tmp_path / "recipe")
    registry.drop_graphs()
    model.get_submodule(part).compile(backend="larosa", options={"recipe": tmp_path / "recipe", **OPTIONS})
    assert relative_error(logits(model, ids), dense) < 1e-5
    reports = registry.reports_of(model.parameters())
    prefix = f"{part}."
    assert reports
    assert all(path.startswith(prefix) for report in reports for site in report.sites for path in site.paths)


def test_a_part_known_by_the_file_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    """In a process that did not calibrate: paths are found by what follows them, or the recipe is attached."""
    ids = token_ids(2, 9)
    dense = logits(model, ids)
    recipe = calibrated(model)
    recipe.save(tmp_path / "recipe")
    options = {"recipe": tmp_path / "recipe", **OPTIONS}
    other = copy.deepcopy(model)
    registry.drop_graphs()
    other.model.compile(backend="larosa", options=options)
    assert relative_error(logits(other, ids), dense) < 1e-5

    other = copy.deepcopy(model)
    registry.drop_graphs()
    other.model.layers[1].compile(backend="larosa", options=options)
    # Dynamo wraps what a backend raises
    with pytest.raises(Exception, match=r"fits 2 places .*'model.layers.0'.*recipe.attach\(model\)") as caught:
        logits(other, ids)
    assert "RecipeMismatchError" in str(caught.value)
    registry.drop_graphs()
    recipe.attach(other)
    assert relative_error(logits(other, ids), dense) < 1e-5


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Any:
        return self.inner(input_ids=ids, use_cache=False).logits


def test_a_model_in_a_wrapper(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = token_ids(2, 9)
    calibrated(model).save(tmp_path / "recipe")
    wrapper = Wrapper(copy.deepcopy(model))
    options = {"recipe": tmp_path / "recipe", **OPTIONS}
    with torch.no_grad():
        found = torch.compile(wrapper, backend="larosa", options=options)(ids)
    assert relative_error(found, logits(model, ids)) < 1e-5


def test_hidden_states_and_embeddings(model: PreTrainedModel) -> None:
    """What leaves the graph is in the model's own basis; what enters it may be no ids."""
    fast = torch.compile(model, backend="larosa", options={"recipe": calibrated(model), **OPTIONS})
    embeddings = torch.randn(2, 9, 64)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0  # left padding
    arguments = {"inputs_embeds": embeddings, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        expected, found = model(**arguments), fast(**arguments)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(a, b) < 1e-5
    assert relative_error(found.logits, expected.logits) < 1e-5
