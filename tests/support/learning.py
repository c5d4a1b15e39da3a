"""A model that learns its recipe from what it is called with."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from larosa_compile import registry
from larosa_compile.recipe import Recipe
from tests.support.decoder import FEATURES, Decoder, simulate

DENSE = 1e-5
"""Relative error of float32 logits; measured at 5e-7."""

WANTED = 48


class Causal(Decoder):
    """Called like a language model, and traced in a moment."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids)[0])


def small(seed: int = 0, **options: Any) -> Causal:
    """One layer, random weights, a head that is worth a rotation."""
    torch.manual_seed(seed)
    return Causal(layers=1, vocab=4 * FEATURES, **options).eval()


def token_ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    """Random ids [rows, tokens] that `small` has embeddings of."""
    return torch.randint(0, 4 * FEATURES, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def sparse_logits(model: Causal, recipe: Recipe, ids: Tensor) -> Tensor:
    """What the method makes of `small`, in float64 and without this package.

    ids: two tokens or more, as Inductor takes products of one row and 16 features apart: they are no linears then.
    """
    tied = model.head.weight is model.embedding.weight
    plain = Decoder(layers=1, vocab=4 * FEATURES, tied=tied)
    plain.load_state_dict(model.state_dict())
    rotations = {basis: rotation.double() for basis, rotation in recipe.rotations.items()}
    (logits,) = simulate(plain, recipe.sites, rotations, ids)
    return logits


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
