"""TEAL's greedy allocation: what a block is, what it spends, and that the output says where."""

import pytest
import torch

import larosa_compile
from larosa_compile.block_search import blocks_of
from larosa_compile.passes.pipeline import facts_of
from tests.support.graphs import capture_graph
from tests.support.models import tiny_model, token_ids

NAMES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_a_block_is_a_layer() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    captured = capture_graph(model, input_ids=token_ids(1, 5), use_cache=False)
    facts = facts_of(captured.graph, captured.fake_mode)
    blocks = blocks_of(facts, {linear.path for linear in facts.linears} - {"lm_head.weight"})
    assert [[linear.path for linear in block.linears] for block in blocks] == [
        [f"model.layers.{layer}.{name}.weight" for name in NAMES] for layer in range(3)
    ]
    assert [block.start for block in blocks[1:]] == [block.end for block in blocks[:-1]]


def test_a_block_spends_its_sparsity_where_its_output_changes_least() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        # what this linear reads is multiplied by nothing: to drop it costs nothing
        model.model.layers[0].mlp.down_proj.weight.zero_()
    ids = token_ids(2, 24)
    recipe = larosa_compile.calibrate(model, [ids], 0.4, method="teal", search=[ids], progress=False)
    torch._dynamo.reset()
    assert recipe.calibration["allocation"] == "greedy"
    size = {path: shape[0] * shape[1] for path, shape in recipe.parameters.items() if len(shape) == 2}
    for layer in range(2):
        sites = {path: site for path, site in recipe.sites.items() if f"layers.{layer}." in path}
        spent = sum(site.sparsity * size[path] for path, site in sites.items())
        assert spent / sum(size[path] for path in sites) == pytest.approx(0.4)
    first = {path.split(".", 3)[-1]: site.sparsity for path, site in recipe.sites.items() if "layers.0." in path}
    # gate and up lead to that linear alone
    free = [first[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
    assert sum(free) / 3 > 0.45 and first["self_attn.o_proj.weight"] < min(max(free), 0.4)
    assert len({site.quantiles for path, site in recipe.sites.items() if "layers.0." in path}) == 4
    half = recipe.with_sparsity(0.2).sites
    assert all(half[path].sparsity == pytest.approx(site.sparsity / 2) for path, site in recipe.sites.items())
