"""Next-token losses and perplexity, against a direct computation."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from larosa_compile import evaluation
from larosa_compile.evaluation import next_token_losses, perplexity
from tests.support.models import tiny_model, token_ids


def direct(logits: Tensor, ids: Tensor) -> float:
    """Mean of −log p(next token), one by one in float64."""
    losses = [
        -math.log(torch.softmax(logits[row, position].double(), -1)[ids[row, position + 1]])
        for row in range(ids.shape[0])
        for position in range(ids.shape[1] - 1)
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_a_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SLICE", 96 * 3)  # of three tokens of this vocabulary
    model = tiny_model("llama", num_hidden_layers=1, dtype=dtype)
    batches = [token_ids(1, 9), token_ids(3, 5, 2)]
    found = next_token_losses(model, batches)
    with torch.no_grad():
        expected = [direct(model(input_ids=ids).logits, ids) for ids in batches]
    assert found == pytest.approx(expected, rel=64 * torch.finfo(torch.float32).eps)
    assert perplexity(found) == pytest.approx(math.exp(sum(expected) / 2), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    def uniform(input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not torch.is_grad_enabled()
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 96))

    assert perplexity(next_token_losses(uniform, [token_ids(2, 8), token_ids(1, 8)])) == pytest.approx(96)


def test_a_model_that_knows_the_text_has_perplexity_one() -> None:
    def clairvoyant(input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=1e4 * torch.nn.functional.one_hot(input_ids.roll(-1, 1), 96))

    assert perplexity(next_token_losses(clairvoyant, [token_ids(2, 8)])) == 1
