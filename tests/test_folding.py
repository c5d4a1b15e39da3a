"""`benchmarks.folding`: what rotations multiplied in both halves are worth."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import larosa_compile
from benchmarks import assets, folding
from larosa_compile import registry
from larosa_compile.passes import products
from tests.support.models import tiny_model, token_ids


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    registry.drop_graphs()
    yield
    registry.drop_graphs()


def test_the_more_halves_the_nearer_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, dtype: torch.dtype) -> tuple[Any, None]:
        return tiny_model(name, hidden_size=256, intermediate_size=256).to(dtype), None

    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(assets, "load_model", load)
    exact, _ = load("llama", torch.float32)
    windows = [token_ids(1, 256, seed) for seed in range(4)]
    recipe = larosa_compile.calibrate(exact, windows, sparsity=0.0)
    shipped, wanted = products.ONE_IN, [folding.logits(exact, ids) for ids in windows]
    records = list(folding.measured("llama", recipe, windows, wanted))
    assert [record["folded"] for record in records] == ["not", "all", "as the package", "none"]
    both, package, none = (record["divergence"] for record in records[1:])
    assert 0 < both < none and both < package < 1.05 * none
    assert [record["over_all"] for record in records[1:]] == pytest.approx([0.0, package - both, none - both])
    assert products.ONE_IN == shipped
    json.dumps(records)
    assert folding.table([{"model": "m"} | record for record in records]).row_count == 4


def test_arguments() -> None:
    assert folding.parsed(["--quick", "--json", "found.json"]).json == Path("found.json")
