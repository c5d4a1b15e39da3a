"""`calibrate`: what it measures, refuses, remembers, and that it leaves the model alone."""

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import registry, search
from larosa_compile.allocation import Coefficients
from larosa_compile.calibration import token_batches
from larosa_compile.errors import InferenceOnlyError, OptionError, RecipeError
from larosa_compile.evaluation import next_token_losses
from larosa_compile.moments import Moments
from larosa_compile.recipe import Recipe
from tests.support.models import tiny_model, token_ids
from tests.support.simulation import simulated

BATCHES = [token_ids(4, 16, seed) for seed in range(2)]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


class Characters:
    """A tokenizer: one id a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 96 for character in text]}


class NoStream(nn.Module):
    """Called like a language model, without a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 16), nn.Linear(16, 96)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def moments_by_hooks(model: PreTrainedModel, batches: list[Tensor]) -> dict[int, Tensor]:
    """Layer -> Σ xᵀx of both norms' outputs before their scale, in float64 from the model's own forward pass."""
    sums = {
        layer: torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)
        for layer in range(model.config.num_hidden_layers)
    }
    handles = []
    for index, layer in enumerate(model.model.layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):

            def hook(norm: Any, inputs: tuple[Tensor], _: Tensor, index: int = index) -> None:
                x = inputs[0].double().flatten(0, -2)
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
                sums[index] += x.T @ x

            handles.append(norm.register_forward_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize(
    ("architecture", "rotation", "owners"), [("llama", "layer", [0, 1, 2]), ("qwen2", 2, [0, 0, 2])]
)
def test_rotations_diagonalise_what_hooks_see(
    architecture: str, rotation: Any, owners: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Moments] = []
    original = Moments.principal_components
    monkeypatch.setattr(Moments, "principal_components", lambda self: kept.append(self) or original(self))
    model = tiny_model(architecture)
    recipe = larosa_compile.calibrate(model, BATCHES, rotation=rotation)
    by_layer = moments_by_hooks(model, BATCHES)
    names = [f"model.layers.{owner}.self_attn.q_proj" for owner in owners]
    assert set(recipe.rotations) == set(names)
    eps = torch.finfo(torch.float32).eps
    for name in dict.fromkeys(names):
        expected = sum(by_layer[layer] for layer, basis in enumerate(names) if basis == name)
        # the model computes in float32, hooks see what its own order of operations gives
        bound = 64 * eps * float(torch.as_tensor(expected).norm())
        assert (kept[0].sums[name] - expected).norm() <= bound
        q = recipe.rotations[name].double()
        rotated = q.T @ expected @ q
        assert (rotated - rotated.diagonal().diag()).norm() <= bound
        assert (rotated.diagonal().diff() <= bound).all()


def test_texts_are_joined_and_cut_into_windows(model: PreTrainedModel) -> None:
    texts = ["the first text, ", "the second one and ", "a last"]
    joined = Characters()("\n\n".join(texts))["input_ids"]
    windows = list(token_batches(texts, Characters(), 12))
    assert [tuple(window.shape) for window in windows] == [(1, 12)] * (len(joined) // 12)
    assert torch.cat(windows, 1).flatten().tolist() == joined[: 12 * len(windows)]
    assert torch.equal(next(token_batches(texts, Characters(), 1000)), torch.tensor([joined]))
    assert not list(token_batches("", Characters(), 12))
    column = datasets.Dataset.from_dict({"text": texts})["text"]
    assert torch.equal(torch.cat(list(token_batches(column, Characters(), 12))), torch.cat(windows))

    from_text = larosa_compile.calibrate(model, texts, tokenizer=Characters(), context=12)
    assert from_text.digest == larosa_compile.calibrate(model, windows).digest
    assert from_text.calibration["tokens"] == 12 * len(windows)


def test_token_ids_may_come_in_any_number_of_rows() -> None:
    rows = token_ids(3, 5)
    assert [tuple(batch.shape) for batch in token_batches([rows, rows[0].int()], None, 7)] == [(3, 5), (1, 5)]
    # a tensor iterates over its rows
    assert torch.equal(torch.cat(list(token_batches(rows, None, 7))), rows)


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("a text", {}, OptionError, "pass tokenizer="),
    (["a text", "another"], {}, OptionError, "pass tokenizer="),
    ("a text", {"tokenizer": Characters(), "context": 0}, OptionError, "at least 1, got 0"),
    (["text", 3], {"tokenizer": Characters()}, OptionError, r"integer tensor \[batch, tokens\], got"),
    (["text", token_ids(1, 4)], {"tokenizer": Characters()}, OptionError, "got"),
    ([torch.rand(2, 4)], {}, OptionError, r"got torch\.float32 \(2, 4\)"),
    ([torch.ones(2, 4, dtype=torch.bool)], {}, OptionError, r"got torch\.bool \(2, 4\)"),
    ([token_ids(2, 4)[None]], {}, OptionError, r"got torch\.int64 \(1, 2, 4\)"),
    ([3], {}, OptionError, "got int"),
    ([], {}, RecipeError, "pass token ids or texts"),
    ([token_ids(1, 0)], {}, RecipeError, "pass token ids or texts"),
    ("", {"tokenizer": Characters()}, RecipeError, "pass token ids or texts"),
    (BATCHES, {"sparsity": 1.0}, OptionError, r"\[0, 1\), got 1\.0"),
    (BATCHES, {"sparsity": -0.1}, OptionError, r"\[0, 1\), got -0\.1"),
    (BATCHES, {"sparsity": float("nan")}, OptionError, r"\[0, 1\), got nan"),
    (BATCHES, {"rotation": "row"}, OptionError, "'layer', 'model', 'none' or a number of layers .* got 'row'"),
    (BATCHES, {"rotation": 0}, OptionError, "'layer', 'model', 'none' or a number of layers .* got 0"),
    (BATCHES, {"search": []}, OptionError, "search needs held-out token ids or texts"),
    (BATCHES, {"search": "a text"}, OptionError, "pass tokenizer="),
]


@pytest.mark.parametrize(("batches", "options", "error", "says"), REFUSED)
def test_wrong_arguments_are_refused(
    batches: Any, options: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    # before anything is measured
    monkeypatch.setattr(torch, "compile", None)
    with pytest.raises(error, match=says):
        larosa_compile.calibrate(model, batches, **options)
    assert registry.recipe_of(model.parameters()) is None


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InferenceOnlyError, match=r"call model\.eval\(\)"):
        larosa_compile.calibrate(tiny_model("llama", num_hidden_layers=1).train(), BATCHES)


def test_a_model_without_a_residual_stream_is_refused() -> None:
    with pytest.raises(RecipeError, match="feeds a residual stream"):
        larosa_compile.calibrate(NoStream().eval(), BATCHES)


def test_provenance(model: PreTrainedModel) -> None:
    recipe, again = (larosa_compile.calibrate(model, BATCHES, 0.3, rotation=2) for _ in range(2))
    other = larosa_compile.calibrate(model, [*BATCHES[:1], BATCHES[1] % 50 + 3])
    assert recipe.digest == again.digest
    found = recipe.calibration
    assert (found["tokens"], found["windows"], found["rotation"]) == (128, 8, 2)
    assert found["versions"] == {
        "larosa_compile": larosa_compile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert found["text_digest"] != other.calibration["text_digest"]
    assert recipe.sparsity == 0.3
    assert recipe.parameters == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def test_the_recipe_is_remembered_until_the_model_is_gone() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    first = larosa_compile.calibrate(model, BATCHES)
    assert registry.recipe_of(model.parameters()) is first
    second = larosa_compile.calibrate(model, BATCHES, 0.25)
    assert registry.recipe_of(model.parameters()) is second
    before = len(registry._recipes)
    torch._dynamo.reset()
    parameters = sum(1 for _ in model.parameters())
    del model
    gc.collect()
    assert len(registry._recipes) <= before - parameters


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    forward: Callable[..., Any] = model.forward
    larosa_compile.calibrate(model, BATCHES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert (hooks(model), model.forward, model.training) == (0, forward, False)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_many_models_may_be_calibrated_in_one_process() -> None:
    models = [tiny_model("llama", seed, num_hidden_layers=1) for seed in range(3)]
    with torch._dynamo.config.patch(recompile_limit=2):
        recipes = [larosa_compile.calibrate(model, BATCHES[:1]) for model in models]
    assert len({recipe.digest for recipe in recipes}) == len(models)


def test_search_takes_the_best_of_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    grid = (Coefficients(1.9, 0.1), Coefficients(0.1, 1.9))
    held_out = [token_ids(4, 24, seed) for seed in (7, 8)]
    plain = larosa_compile.calibrate(model, BATCHES)
    losses = []
    for coefficients in grid:
        with simulated(model, plain.with_coefficients(coefficients.by_kind)):
            losses.append(sum(next_token_losses(model, held_out)))
    best = grid[losses.index(min(losses))]
    assert abs(losses[0] - losses[1]) > 1e-3, "the two must differ for this to test"

    found = search.best_coefficients(model, plain, held_out, grid=grid[::-1])
    assert found.digest == plain.with_coefficients(best.by_kind).digest
    monkeypatch.setattr(search.best_coefficients, "__kwdefaults__", {"grid": grid, "progress": False})
    calibrated: Recipe = larosa_compile.calibrate(model, BATCHES, search=held_out)
    assert calibrated.digest == found.digest
    assert registry.recipe_of(model.parameters()) is calibrated
    # what was compiled to search is no graph of the user's
    assert not registry.reports_of(model.parameters())
