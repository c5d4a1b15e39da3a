"""A model that learns its recipe from what it is called with."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from larosa_compile import registry
from tests.support.models import tiny_model

DENSE = 1e-5
"""Relative error of float32 logits; measured at 5e-7."""

WANTED = 48


def small(**sizes: Any) -> PreTrainedModel:
    return tiny_model("llama", **({"num_hidden_layers": 1} | sizes))


def learning(model: nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="larosa", options={"lowering": "eager", "calibration_tokens": WANTED, **options}
    )


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


def seen(model: nn.Module) -> int:
    (collection,) = registry.collections_of(model.parameters())
    return collection.tokens


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The model computes in float32, in another order in each graph."""
    assert found.keys() == expected.keys()
    for basis, total in expected.items():
        assert (found[basis] - total).norm() <= 64 * torch.finfo(torch.float32).eps * total.norm()
