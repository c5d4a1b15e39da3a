"""`explain` and the reports: what was done, how many bytes it saves, what stays dense and why."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile.errors import OptionError, RecipeMismatchError
from larosa_compile.recipe import Recipe
from larosa_compile.report import GraphReport
from tests.support.decoder import Decoder, ids
from tests.support.models import tiny_model, token_ids

LAYERS = 2
READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def small(architecture: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny_model(architecture, num_hidden_layers=LAYERS, **options)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model that nobody calibrates or compiles."""
    return small()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return larosa_compile.calibrate(small(), [token_ids(4, 16)], 0.5)


def run(model: Any, tokens: int) -> None:
    with torch.no_grad():
        model(input_ids=token_ids(1, tokens), use_cache=False)


def site_paths() -> set[str]:
    return {"lm_head.weight"} | {
        f"model.layers.{layer}.{'self_attn' if name in 'q_proj k_proj v_proj o_proj' else 'mlp'}.{name}.weight"
        for layer in range(LAYERS)
        for names in READ_TOGETHER
        for name in names
    }


def check_sites(report: GraphReport, model: PreTrainedModel, recipe: Recipe) -> None:
    """Sites and byte counts of a report against an independent count from the parameters' shapes."""
    shapes = dict(model.named_parameters())
    size = model.dtype.itemsize
    assert {path for site in report.sites for path in site.paths} == site_paths()
    assert {tuple(path.split(".")[-2] for path in site.paths) for site in report.sites} == {
        *READ_TOGETHER,
        ("lm_head",),
    }
    skipped = 0
    for site in report.sites:
        weights = [shapes[path] for path in site.paths]
        (features,) = {weight.shape[1] for weight in weights}
        (sparsity,) = {recipe.sites[path].sparsity for path in site.paths}
        (basis,) = {recipe.sites[path].basis for path in site.paths}
        assert (site.features, site.outputs) == (features, sum(weight.shape[0] for weight in weights))
        assert site.kept == max(1, round((1 - sparsity) * features))
        assert site.read == basis
        assert site.dense_bytes == sum(weight.numel() for weight in weights) * size
        assert site.sparse_bytes == site.outputs * site.kept * size
        skipped += site.dense_bytes - site.sparse_bytes
    assert report.other_bytes == 0
    online = sum(item.bytes for item in report.online)
    assert report.dense_bytes == sum(site.dense_bytes for site in report.sites) + report.other_bytes
    assert report.sparse_bytes == report.dense_bytes - skipped + online
    assert report.bytes_skipped_share == pytest.approx((skipped - online) / report.dense_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_parameters(dtype: torch.dtype) -> None:
    model = small(dtype=dtype)
    recipe = larosa_compile.calibrate(small(), [token_ids(4, 16)], 0.5, rotation="layer")
    (report,) = larosa_compile.explain(model, recipe=recipe).graphs
    check_sites(report, model, recipe)
    # after the embedding, one change of basis a layer boundary, before the head; each a [d, d] matrix
    d = model.config.hidden_size
    assert [item.bytes for item in report.online] == [d * d * dtype.itemsize] * (LAYERS + 1)
    assert (report.online[0].start, report.online[-1].end) == (None, None)
    assert [item.end for item in report.online[:-1]] == [item.start for item in report.online[1:]]


@pytest.mark.parametrize("sparsity", [0.0, 0.25])
def test_other_sparsities_and_no_rotation(model: PreTrainedModel, recipe: Recipe, sparsity: float) -> None:
    plain = recipe.with_sparsity(sparsity).without_rotation()
    (report,) = larosa_compile.explain(model, recipe=plain).graphs
    check_sites(report, model, plain)
    assert not report.online
    assert (report.bytes_skipped_share == 0) == (sparsity == 0)


def test_an_uncalibrated_model_is_explained_by_what_calibrate_would_do(model: PreTrainedModel, recipe: Recipe) -> None:
    before, after = larosa_compile.explain(model, sparsity=0.5), larosa_compile.explain(model, recipe=recipe)
    assert before.graphs[0].recipe == "not calibrated: the plan at nominal sparsity 0.5"
    assert recipe.digest[:12] in after.graphs[0].recipe
    assert before.graphs[0].sites == after.graphs[0].sites
    assert before.graphs[0].online == after.graphs[0].online
    (quarter,) = larosa_compile.explain(model, sparsity=0.25).graphs
    assert 0 < quarter.bytes_skipped_share < before.graphs[0].bytes_skipped_share


def test_explain_may_be_called_more_often_than_dynamo_recompiles(model: PreTrainedModel) -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        assert [len(larosa_compile.explain(model).graphs) for _ in range(3)] == [1, 1, 1]


def test_a_calibrated_then_compiled_model() -> None:
    model = small()
    recipe = larosa_compile.calibrate(model, [token_ids(4, 16)], 0.4)
    (planned,) = larosa_compile.explain(model).graphs
    assert recipe.digest[:12] in planned.recipe
    fast = torch.compile(model, backend="larosa", options={"recipe": recipe, "lowering": "eager"})
    run(fast, 7)
    run(fast, 1)
    for asked in (fast, model):
        reports = larosa_compile.explain(asked).graphs
        assert [report.rows == "1" for report in reports] == [False, True]
        for report in reports:
            check_sites(report, model, recipe)
    # another calibration drops the graphs, hence what was said of them
    again = larosa_compile.calibrate(model, [token_ids(4, 16)], 0.2)
    (planned,) = larosa_compile.explain(model).graphs
    assert again.digest[:12] in planned.recipe


def test_the_text_names_everything(model: PreTrainedModel, recipe: Recipe) -> None:
    report = larosa_compile.explain(model, recipe=recipe)
    text = str(report)
    assert repr(report) == text
    (graph,) = report.graphs
    lines = text.splitlines()
    for site in graph.sites:
        first, *others = (path.removesuffix(".weight") for path in site.paths)
        name = " + ".join([first, *(other.rpartition(".")[2] for other in others)])
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert f"{site.features} x {site.outputs}" in line
        assert line.split()[-2:] == [f"{site.dense_bytes:,}", f"{site.sparse_bytes:,}"]
    for basis in recipe.rotations:
        assert any(line.endswith(f" is the basis of {basis}") for line in lines)
    assert f"{graph.dense_bytes:,} dense, {graph.sparse_bytes:,} sparse" in text
    # two readers and two writers a layer; the head reads as well
    readers, writers = 2 * LAYERS + 1, 2 * LAYERS
    (stream,) = graph.streams
    assert (stream.features, stream.readers, stream.writers) == (64, readers, writers)
    assert stream.bases == tuple(basis for basis in recipe.rotations if basis != "lm_head")
    assert str(stream) in text
    assert "…" not in text


def test_what_stays_dense_is_named_with_its_reason(model: PreTrainedModel, recipe: Recipe) -> None:
    left_out = "model.layers.1.mlp.down_proj.weight"
    fewer = Recipe(
        recipe.sparsity,
        {path: site for path, site in recipe.sites.items() if path not in (left_out, "lm_head.weight")},
        recipe.rotations,
        recipe.parameters,
        {},
    )
    report = larosa_compile.explain(model, recipe=fewer)
    reasons = {refusal.site: refusal.reason for refusal in report.graphs[0].refusals}
    assert reasons[left_out] == "the recipe has no such site"
    assert "feeds no residual stream" in reasons["lm_head.weight"]
    assert len(reasons) == 2
    assert all(site in str(report) and reason in str(report) for site, reason in reasons.items())
    shapes = dict(model.named_parameters())
    assert report.graphs[0].other_bytes == 4 * (shapes[left_out].numel() + shapes["lm_head.weight"].numel())


def test_the_recipe_of_another_model_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeMismatchError, match="measured on another model"):
        larosa_compile.explain(small(intermediate_size=192), recipe=recipe)


def test_a_model_without_dummy_inputs_needs_example_inputs() -> None:
    torch.manual_seed(0)
    decoder = Decoder(layers=1)
    with pytest.raises(OptionError, match=r"no dummy_inputs .* pass example_inputs="):
        larosa_compile.explain(decoder)
    (report,) = larosa_compile.explain(decoder, example_inputs={"ids": ids(1, 4)}).graphs
    assert report.rows == "4"
    assert report.sites[-1].paths == ("head.weight",)
