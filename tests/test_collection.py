"""What is learnt from a model's traffic: which rows count, which graphs belong together, and what is kept."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import larosa_compile
from larosa_compile import registry
from larosa_compile.collection import _tokens_of
from larosa_compile.errors import MissingRecipeError, RecipeError
from larosa_compile.moments import Moments
from larosa_compile.recipe import Recipe
from tests.support.learning import DENSE, WANTED, check_equal, learning, logits, seen, small, sparse_logits, token_ids
from tests.support.models import relative_error, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The moments that rotations were made of, oldest first."""
    sums: list[dict[str, Tensor]] = []
    original = Moments.principal_components
    monkeypatch.setattr(Moments, "principal_components", lambda self: sums.append(dict(self.sums)) or original(self))
    return sums


def test_it_learns_what_calibrate_measures(kept: list[dict[str, Tensor]]) -> None:
    model = small()
    batches = [token_ids(rows, tokens, seed) for seed, (rows, tokens) in enumerate([(2, 12), (1, 2), (1, 29)])]
    fast = learning(model, calibration_tokens=sum(batch.numel() for batch in batches))
    for ids in (*batches, batches[0]):
        logits(fast, ids)
    learnt = larosa_compile.recipe_of(model)
    explicit = larosa_compile.calibrate(model, batches)
    check_equal(kept[0], kept[1])
    assert learnt.sites == explicit.sites and learnt.parameters == explicit.parameters
    assert learnt.calibration["tokens"] == explicit.calibration["tokens"] == 55
    assert learnt.calibration["versions"] == explicit.calibration["versions"]


def test_padding_is_not_learnt_from(kept: list[dict[str, Tensor]]) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    prompts = [token_ids(1, length, length) for length in (12, 7, 5)]
    width = 12
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        ids[row, width - length :], mask[row, width - length :] = prompt[0], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    fast = learning(model, calibration_tokens=24)
    for _ in range(2):
        logits(fast, ids, attention_mask=mask, position_ids=positions)
    assert larosa_compile.recipe_of(model).calibration["tokens"] == 24
    larosa_compile.calibrate(model, prompts)
    check_equal(kept[0], kept[1])


ROWS = torch.arange(12.0).reshape(6, 2) + 1
"""Two sequences of three tokens."""

LEFT = torch.tensor([[0, 1, 1], [1, 1, 1]])
SEEN = LEFT.bool()[:, None, :, None] & torch.ones(3, 3, dtype=torch.bool).tril() & LEFT.bool()[:, None, None]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (LEFT, [1, 2, 3, 4, 5]),
        (LEFT.bool(), [1, 2, 3, 4, 5]),
        (torch.cat([torch.ones(2, 4), LEFT], 1), [1, 2, 3, 4, 5]),
        # it reaches beyond the tokens; fewer columns than tokens; sequences that do not fit; a mask shared by all
        (torch.cat([LEFT, torch.zeros(2, 4)], 1), [0, 1, 2, 3, 4, 5]),
        (LEFT[:, :2], [0, 1, 2, 3, 4, 5]),
        (torch.ones(4, 3), [0, 1, 2, 3, 4, 5]),
        (torch.ones(1, 1, 3, 3).tril().bool(), [0, 1, 2, 3, 4, 5]),
        (SEEN, [1, 2, 3, 4, 5]),
        (SEEN[:, 0], [1, 2, 3, 4, 5]),
        (torch.where(SEEN, 0.0, torch.finfo(torch.float32).min), [1, 2, 3, 4, 5]),
        (torch.where(SEEN, 0.0, -torch.inf).expand(2, 4, 3, 3), [1, 2, 3, 4, 5]),
    ],
)
def test_rows_that_count(mask: Tensor | None, expected: list[int]) -> None:
    for rows in (ROWS, ROWS.reshape(2, 3, 2)):
        assert torch.equal(_tokens_of(rows, mask), ROWS[expected])


def test_rows_that_count_are_finite() -> None:
    broken = ROWS.clone()
    broken[1, 0], broken[4, 1] = torch.nan, torch.inf
    assert torch.equal(_tokens_of(broken, None), ROWS[[0, 2, 3, 5]])
    # a head may read the last token of every sequence only
    assert torch.equal(_tokens_of(ROWS[:2], LEFT), ROWS[:2])


def test_the_recipe_can_be_kept(tmp_path: Path) -> None:
    model, ids = small(tied=True), token_ids(4, 12)
    with pytest.raises(
        MissingRecipeError, match=r"has no recipe: call the compiled model .* larosa_compile\.calibrate"
    ):
        larosa_compile.recipe_of(model)
    fast = learning(model, calibration_tokens=WANTED + 1, sparsity=0.25)
    logits(fast, ids)
    with pytest.raises(MissingRecipeError, match="has seen 48 of the 49 tokens"):
        larosa_compile.recipe_of(fast)
    logits(fast, ids)
    found = logits(fast, ids)
    recipe = larosa_compile.recipe_of(fast)
    assert recipe.sparsity == 0.25 and recipe.calibration["source"] == "traffic"
    recipe.save(tmp_path / "learnt.safetensors")
    other = copy.deepcopy(model)  # other parameters: nothing in this process knows them
    loaded = torch.compile(
        other, backend="larosa", options={"recipe": str(tmp_path / "learnt.safetensors"), "lowering": "eager"}
    )
    assert relative_error(logits(loaded, ids), found) < DENSE
    Recipe.load(tmp_path / "learnt.safetensors").attach(other)
    assert larosa_compile.recipe_of(other).digest == recipe.digest


def test_what_was_seen_outlives_the_graphs() -> None:
    model = small()
    for expected in (12, 24):
        torch._dynamo.reset()
        logits(learning(model), token_ids(1, 12))
        assert seen(model) == expected


def test_threads_lose_no_token_and_switch_once(kept: list[dict[str, Tensor]]) -> None:
    model, ids = small(), token_ids(1, 12)
    fast = learning(model, calibration_tokens=12 * 21)
    dense = logits(fast, ids)
    results: list[Tensor] = []

    def call() -> None:
        results.extend(logits(fast, ids) for _ in range(10))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recipe = larosa_compile.recipe_of(model)
    sparse = sparse_logits(model, recipe, ids)
    assert len(kept) == 1 and len(registry.reports_of(model.parameters())) == 1
    assert recipe.calibration["tokens"] in range(12 * 21, 12 * 25)
    errors = [min(relative_error(result, expected) for expected in (dense, sparse)) for result in results]
    assert len(errors) == 40 and max(errors) < DENSE


class InParts(nn.Module):
    """Two models in a row, with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = small(), small(seed=1)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        middle = self.first(input_ids=input_ids, use_cache=use_cache).logits.argmax(-1)
        torch._dynamo.graph_break()
        return self.second(input_ids=middle, use_cache=use_cache)


def test_parts_learn_for_themselves() -> None:
    model, ids = InParts().eval(), token_ids(4, 12)
    fast = learning(model)
    assert relative_error(logits(fast, ids), logits(model, ids)) < DENSE
    found = logits(fast, ids)
    with pytest.raises(RecipeError, match="compiled in 2 parts"):
        larosa_compile.recipe_of(model)
    middle = sparse_logits(model.first, larosa_compile.recipe_of(model.first), ids).argmax(-1)
    expected = sparse_logits(model.second, larosa_compile.recipe_of(model.second), middle)
    assert relative_error(found, expected) < DENSE


def test_a_part_is_no_whole() -> None:
    """What was learnt of a layer is not enough for its model, which learns anew."""
    model, ids = small(), token_ids(4, 12)
    layer = model.layers[0]
    layer.compile(backend="larosa", options={"lowering": "eager", "calibration_tokens": WANTED})
    for _ in range(2):
        logits(model, ids)
    assert registry.recipe_of(layer.parameters()) is not None
    layer._compiled_call_impl = None
    fast = learning(model)
    assert relative_error(logits(fast, ids), logits(model, ids)) < DENSE
    found = logits(fast, ids)
    expected = sparse_logits(model, larosa_compile.recipe_of(model), ids)
    assert relative_error(found, expected) < DENSE
