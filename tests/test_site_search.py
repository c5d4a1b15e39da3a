"""`allocate="search"`: the bytes are the paper's, the loss on its check text is never higher, and it can be resumed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import registry, site_search
from larosa_compile.errors import OptionError
from larosa_compile.recipe import Recipe
from larosa_compile.site_search import search_sites
from tests.support.models import tiny_model, token_ids
from tests.support.simulation import divergence

HELD_OUT = [token_ids(4, 32, seed, vocabulary=512) for seed in range(10, 16)]
CHECKED = HELD_OUT[1::3]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2, vocab_size=512)


@pytest.fixture(scope="module")
def paper(model: PreTrainedModel) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 32, seed, 512) for seed in range(2)], 0.5, progress=False)


@pytest.fixture(scope="module")
def found(model: PreTrainedModel, paper: Recipe) -> Recipe:
    torch._dynamo.reset()
    return search_sites(model, paper, HELD_OUT, progress=False)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_it_reads_the_bytes_of_the_paper_but_for_less_than_a_feature(
    model: PreTrainedModel, paper: Recipe, found: Recipe
) -> None:
    (before,), (after,) = (larosa_compile.explain(model, recipe=recipe).graphs for recipe in (paper, found))
    feature = max(site.dense_bytes // site.features for site in before.sites)
    assert before.sparse_bytes - feature < after.sparse_bytes <= before.sparse_bytes
    assert [site.kept for site in before.sites] != [site.kept for site in after.sites]
    assert [item.bytes for item in before.online] == [item.bytes for item in after.online]


def test_the_loss_on_its_check_text_is_what_it_says_and_lower(
    model: PreTrainedModel, paper: Recipe, found: Recipe
) -> None:
    said = found.calibration["allocation"]
    assert said["before"] == pytest.approx(divergence(model, paper, CHECKED), rel=1e-3)
    assert said["after"] == pytest.approx(divergence(model, found, CHECKED), rel=1e-3)
    assert said["after"] < said["before"]
    assert said["tokens"] == sum(ids.numel() for ids in HELD_OUT)


def test_the_recipe_keeps_it_at_any_sparsity_and_in_its_file(paper: Recipe, found: Recipe, tmp_path: Path) -> None:
    assert {path: site.sparsity for path, site in found.with_sparsity(0.5).sites.items()} == {
        path: site.sparsity for path, site in found.sites.items()
    }
    for path, site in found.with_sparsity(0.25).sites.items():
        assert site.sparsity == pytest.approx(found.sites[path].sparsity / 2)
        assert (site.basis, site.kind) == (paper.sites[path].basis, paper.sites[path].kind)
    found.save(tmp_path / "r")
    assert Recipe.load(tmp_path / "r").digest == found.digest != paper.digest


def test_what_does_not_help_is_not_kept(model: PreTrainedModel, paper: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(offers: dict[str, site_search.Offer], budget: int) -> dict[str, int]:
        return {name: offer.least for name, offer in offers.items()}

    monkeypatch.setattr(site_search, "spend", worst)
    monkeypatch.setattr(site_search, "ROUNDS", 2)
    kept = search_sites(model, paper, HELD_OUT, progress=False)
    assert kept.sites == paper.sites
    said = kept.calibration["allocation"]
    assert said["after"] == said["before"]


def test_a_search_goes_on_where_it_was_stopped(
    model: PreTrainedModel, paper: Recipe, found: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, rounds = tmp_path / "state.json", site_search.ROUNDS
    monkeypatch.setattr(site_search, "ROUNDS", 2)
    search_sites(model, paper, HELD_OUT, progress=False, resume=state)
    assert json.loads(state.read_text())["round"] == 2
    monkeypatch.setattr(site_search, "ROUNDS", rounds)
    assert search_sites(model, paper, HELD_OUT, progress=False, resume=state).digest == found.digest
    with pytest.raises(OptionError, match="is of a search of another recipe or text, where one of this is allowed"):
        search_sites(model, paper, HELD_OUT[:3], progress=False, resume=state)
    with pytest.raises(OptionError, match="names a file in a folder that exists; give another"):
        search_sites(model, paper, HELD_OUT, progress=False, resume=tmp_path / "no" / "state.json")
    state.write_text("{}")
    with pytest.raises(OptionError, match="holds no state of a search"):
        search_sites(model, paper, HELD_OUT, progress=False, resume=state)


def test_calibrate_searches_and_remembers(
    model: PreTrainedModel, paper: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_search, "ROUNDS", 1)
    batches = [token_ids(4, 32, seed, 512) for seed in range(2)]
    made = larosa_compile.calibrate(model, batches, 0.5, allocate="search", search=HELD_OUT, progress=False)
    assert made.sites.keys() == paper.sites.keys() and made.rotations_digest == paper.rotations_digest
    assert registry.recipe_of(model.parameters()) is made
    # what was compiled to search is no graph of the user's
    assert not registry.reports_of(model.parameters())


def test_one_batch_is_too_few(model: PreTrainedModel, paper: Recipe) -> None:
    with pytest.raises(OptionError, match=r"at least two pieces of 512 tokens of held-out text.*got 1; pass more text"):
        search_sites(model, paper, HELD_OUT[:1], progress=False)


def test_where_nothing_is_dropped_there_is_nothing_to_search(model: PreTrainedModel, paper: Recipe) -> None:
    nothing = paper.with_sparsity(0)
    assert search_sites(model, nothing, HELD_OUT[:2], progress=False).sites == nothing.sites
