"""`benchmarks.ideas` and `benchmarks.likeness`: each correction against what it is by definition."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import ideas, likeness
from benchmarks.edited import Edited, Product
from benchmarks.ideas import Dropped, refreshed
from benchmarks.methods import Recipes
from larosa_compile import registry
from larosa_compile.passes.plan import HEAD
from larosa_compile.recipe import Recipe
from tests.support.models import relative_error, tiny_model, token_ids
from tests.support.simulation import simulated

LEARNT = [token_ids(2, 48, seed) for seed in range(3)]
IDS = token_ids(2, 20, seed=7)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def layered(model: PreTrainedModel) -> Recipe:
    return larosa_compile.calibrate(model, LEARNT, 0.5, rotation="layer", progress=False)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    registry.drop_graphs()
    yield
    registry.drop_graphs()


def alone(path: str, x: torch.Tensor, kept: int | None) -> Product:
    """A product whose output is what its site reads."""
    return Product(path, True, x, torch.eye(x.shape[1]), kept)


def test_without_a_rule_of_its_own_it_is_the_recipe(model: PreTrainedModel, layered: Recipe) -> None:
    found = Edited(model, layered)(input_ids=IDS, use_cache=False).logits
    with simulated(model, layered), torch.no_grad():
        assert relative_error(found, model(IDS).logits) < 1e-5


def test_the_mean_of_what_is_dropped_is_given_back(model: PreTrainedModel, layered: Recipe) -> None:
    dropped = Dropped(model, layered, LEARNT)
    (path, *_) = layered.sites
    product = alone(path, torch.randn(6, model.config.hidden_size), 5)
    mean = dropped.with_mean(product) - product.largest
    assert torch.allclose(mean, mean[:1].expand_as(mean), atol=1e-6)
    # summed over the rows that were watched, what is left has no mean
    seen: list[torch.Tensor] = []

    def watch(product: Product) -> torch.Tensor:
        if product.path == path:
            seen.append(product.x - dropped.with_mean(alone(path, product.x, product.kept)))
        return product.as_it_is()

    watching = Edited(model, layered, watch)
    for ids in LEARNT:
        watching(input_ids=ids, use_cache=False)
    assert float(torch.cat(seen).mean(0).abs().max()) < 1e-5 < float(mean.abs().max())


def test_all_leading_directions_are_everything(model: PreTrainedModel, layered: Recipe) -> None:
    dropped = Dropped(model, layered, LEARNT)
    writer = next(path for path, site in layered.sites.items() if site.kind == "writer")
    features = layered.parameters[writer][1]
    product = alone(writer, torch.randn(3, features), 4)
    x, errors = product.x, []
    for rank in (1, features // 2, features):
        dropped.keep_leading(rank)
        errors.append(float((dropped.with_leading(product) - x).norm()))
    assert float((product.largest - x).norm()) >= errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    reader = next(path for path, site in layered.sites.items() if site.kind == "reader")
    other = alone(reader, torch.randn(2, layered.parameters[reader][1]), 4)
    assert torch.equal(dropped.with_leading(other), other.largest)


def test_bases_refreshed_where_nothing_is_dropped_are_the_same(model: PreTrainedModel, layered: Recipe) -> None:
    again = refreshed(model, layered.with_sparsity(0), LEARNT)
    for basis, q in layered.rotations.items():
        # of directions with more than a little energy; a sign is free
        told = layered.spectra[basis] > 1e-3
        overlap = (again.rotations[basis].T @ q).diagonal()[told].abs()
        assert bool(told.any()) and float(overlap.min()) > 0.99


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_energy_dropped_is_what_normal_entries_lose(kept: float) -> None:
    generator = torch.Generator().manual_seed(0)
    variances = torch.logspace(-2, 1, 400, dtype=torch.float64)
    rows = torch.randn(2000, 400, generator=generator, dtype=torch.float64) * variances.sqrt()
    sorted_squares = rows.square().sort(-1).values
    lost = sorted_squares[:, : round((1 - kept) * 400)].sum() / sorted_squares.sum()
    assert likeness.energy_dropped(variances, kept) == pytest.approx(float(lost), rel=0.05)


def test_layers_that_are_alike_are_put_together() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -3, 12, dtype=torch.float64)
    bases = [torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0] for _ in range(3)]
    moments = [
        q * (spectrum / spectrum.sum()) @ q.T for q, count in zip(bases, (1, 3, 2), strict=True) for _ in range(count)
    ]
    assert likeness.joined(moments, 3, 0.5) == [[0], [1, 2, 3], [4, 5]]
    assert likeness.joined(moments, 1, 0.5) == [list(range(6))]


def test_shared_has_as_many_bases_as_what_it_is_like(model: PreTrainedModel, layered: Recipe) -> None:
    pairs = larosa_compile.calibrate(model, LEARNT, 0.5, rotation=2, progress=False)
    made = likeness.shared(layered, pairs)
    assert len(made.rotations) == len(pairs.rotations)
    assert {path: site.sparsity for path, site in made.sites.items()} == {
        path: site.sparsity for path, site in pairs.sites.items()
    }
    readers = [str(site.basis) for site in made.sites.values() if site.kind not in (HEAD, "writer")]
    assert readers == sorted(readers), "layers of a basis are neighbours"
    # where every layer has its own, it is the layered recipe, up to signs
    own = likeness.shared(layered, layered)
    for basis, q in layered.rotations.items():
        told = layered.spectra[basis] > 1e-3
        assert float((own.rotations[basis].T @ q).diagonal()[told].abs().min()) > 0.99


def test_every_idea_is_measured_at_the_same_bytes(model: PreTrainedModel) -> None:
    held_out = {"ids": [token_ids(1, 16, seed) for seed in (5, 6)]}
    records = list(ideas.measured(model, Recipes(model, LEARNT), held_out, 0.4))
    assert [record["idea"] for record in records] == ["none", "bias", "low-rank", "refreshed", "alike"]
    assert len({record["bytes_skipped_share"] for record in records}) == 1
    assert records[0]["loss_over_start"] == 0 and all(math.isfinite(record["ppl"]) for record in records)
    assert len({record["ppl"] for record in records}) == len(records)
    described = {"model": "tiny"}
    assert ideas.table([described | record for record in records]).row_count == len(records)
    assert json.loads(json.dumps(records)) == records
