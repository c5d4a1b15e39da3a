"""`release_originals`: the folded weights are the only ones, and a released one says so when it is used."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import larosa_compile
from larosa_compile.errors import OptionError, ReleasedWeightsError
from larosa_compile.memory import return_mapped
from larosa_compile.recipe import Recipe
from larosa_compile.released import ReleasedParameter, is_released, release
from tests.support.models import relative_error, tiny_model, token_ids


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return larosa_compile.calibrate(tiny_model("llama"), [token_ids(4, 16)], 0.5)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def compiled(model: nn.Module, recipe: Recipe, **options: Any) -> Any:
    options = {"recipe": recipe, "release_originals": True, "lowering": "eager"} | options
    return torch.compile(model, backend="larosa", options=options)


@pytest.mark.parametrize("checked", [False, True])
def test_released_models_compute_the_same(recipe: Recipe, checked: bool) -> None:
    model = tiny_model("llama")
    several = [token_ids(1, 7), token_ids(1, 1), token_ids(2, 5)]
    expected = [logits(compiled(model, recipe, release_originals=False), ids) for ids in several]
    torch._dynamo.reset()
    gc.collect()
    fast = compiled(model, recipe, self_check=checked)
    # the second and third are compiled when the weights are gone
    found = [logits(fast, ids) for ids in several]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    released = {path for path, parameter in model.named_parameters() if is_released(parameter)}
    assert released == set(recipe.sites)
    with torch._C.DisableTorchFunctionSubclass():
        assert all(model.get_parameter(path).untyped_storage().nbytes() == 0 for path in released)


def test_no_two_copies_of_a_model_are_held_while_it_is_folded(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = tiny_model("llama"), []

    def watch(parameter: Tensor) -> bool:
        given_back = release(parameter)
        held.append(sum(not is_released(p) for path, p in model.named_parameters() if path in recipe.sites))
        return given_back

    monkeypatch.setattr("larosa_compile.weights.release", watch)
    logits(compiled(model, recipe), token_ids(1, 7))
    assert sorted(set(held), reverse=True) == list(range(len(recipe.sites) - 1, -1, -1)), "one by one"


@pytest.mark.parametrize(
    "use",
    [
        lambda model: logits(model, token_ids(1, 3)),
        lambda model: model.model.layers[0].mlp.up_proj.weight.data.sum(),
        lambda model: model.model.layers[0].mlp.up_proj.weight.detach(),
        lambda model: model.model.layers[0].mlp.up_proj.weight[0, 0],
        lambda model: model.model.layers[0].mlp.up_proj.weight.data_ptr(),
        lambda model: nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight),
        lambda model: model.state_dict(),
        lambda model: model.to(torch.float64),
        lambda model: logits(torch.compile(model, backend="aot_eager"), token_ids(1, 3)),
        lambda model: larosa_compile.calibrate(model, [token_ids(1, 8)], 0.5),
    ],
)
def test_using_a_released_weight_says_so(recipe: Recipe, use: Callable[[Any], Any]) -> None:
    model = tiny_model("llama")
    logits(compiled(model, recipe), token_ids(1, 7))
    with pytest.raises(Exception, match="release_originals"):
        use(model)


def test_what_can_be_asked_of_a_released_weight() -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    assert release(parameter) and not release(parameter)
    assert isinstance(parameter, ReleasedParameter) and parameter.shape == (3, 4) and parameter.numel() == 12
    assert "[3, 4]" in repr(parameter) and parameter.dtype == torch.float32
    with pytest.raises(ReleasedWeightsError):
        parameter.sum()


def test_the_graphs_gone_the_weights_are_gone(recipe: Recipe) -> None:
    model = tiny_model("llama")
    logits(compiled(model, recipe), token_ids(1, 7))
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(Exception, match="release_originals"):
        logits(compiled(model, recipe), token_ids(1, 7))


def test_memory_that_others_use_is_left_alone() -> None:
    base = torch.randn(4, 4)
    view = nn.Parameter(base[:2])
    assert not release(view) and not is_released(view)
    kept = nn.Parameter(torch.randn(4, 4))
    alias = kept.detach()
    assert not release(kept) and alias.sum() == kept.sum()
    foreign = nn.Parameter(torch.from_numpy(torch.randn(4).numpy()))
    assert not release(foreign)
    assert not release(torch.randn(3))
    reference = weakref.ref(base)
    del base, view
    gc.collect()
    assert reference() is None


def test_the_option_is_checked(recipe: Recipe) -> None:
    with pytest.raises(Exception, match="'release_originals' must be True or False") as raised:
        logits(compiled(tiny_model("llama"), recipe, release_originals="yes"), token_ids(1, 7))
    assert isinstance(raised.value, OptionError) or "OptionError" in str(raised.value)


def test_a_model_in_a_mapped_file_leaves_the_process_and_can_be_used(recipe: Recipe, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert not weight.untyped_storage().resizable()
    ids = token_ids(1, 7)
    dense = logits(model, ids)
    with torch.no_grad():
        weight[0, 0] += 1  # a page that is not the file's any more
    expected = logits(model, ids)
    assert not torch.equal(dense, expected)
    fast = compiled(model, recipe.with_sparsity(0))
    assert relative_error(logits(fast, ids), expected) < 1e-5
    assert torch.equal(logits(model, ids), expected)


def test_an_embedding_that_a_packed_head_was_made_of_leaves_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fewer bits the head is no table to look rows up in: the graph reads the parameter, but a few rows of it."""
    tied = tiny_model("llama", tie_word_embeddings=True)
    recipe = larosa_compile.calibrate(tied, [token_ids(4, 16)], 0.5).with_weights("int8")
    tied.save_pretrained(tmp_path)
    model, returned = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), list[Tensor]()

    def watch(tensors: Iterable[Tensor], written: bool = False) -> None:
        returned.extend(tensors) if written else return_mapped(tensors)

    monkeypatch.setattr("larosa_compile.weights.return_mapped", watch)
    expected = logits(compiled(tied, recipe, release_originals=False), token_ids(1, 7))
    assert torch.equal(logits(compiled(model, recipe), token_ids(1, 7)), expected)
    assert any(tensor is model.get_input_embeddings().weight for tensor in returned)
