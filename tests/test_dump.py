"""Dumps: one folder a graph, a readable file a pass, and the report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import larosa_compile
from larosa_compile.dump import GraphDump
from larosa_compile.recipe import Recipe
from tests.support.models import tiny_model, token_ids

STAGES = ["0_input.txt", "1_analyse.txt", "2_rotate.txt", "3_fold.txt", "4_sparsify.txt", "5_decode.txt"]
FILES = [*STAGES, "plan.txt", "report.txt", "stream.svg", "timings.txt"]
SITES = 4
"""Groups of linears in a layer that read together: q/k/v, o, gate/up, down."""


@pytest.fixture(autouse=True)
def _reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LAROSA_DUMP", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_layer() -> Any:
    return tiny_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return larosa_compile.calibrate(one_layer(), [token_ids(4, 16)])


def run(recipe: Recipe, lengths: list[int], **options: Any) -> Any:
    fast = torch.compile(one_layer(), backend="larosa", options={"recipe": recipe, "lowering": "eager", **options})
    with torch.no_grad():
        for tokens in lengths:
            fast(input_ids=token_ids(1, tokens), use_cache=False)
    return fast


def operations(file: Path) -> list[str]:
    """Right-hand sides of `name: dtype[shape] = operation(operands)`; every line must read so."""
    *lines, last = file.read_text().splitlines()
    assert last.startswith("return ")
    assert all(" = " in line for line in lines)
    return [line.partition(" = ")[2] for line in lines]


def count(file: Path, operation: str) -> int:
    return sum(line.startswith(f"{operation}(") for line in operations(file))


@pytest.mark.parametrize("by", ["option", "variable"])
def test_every_pass_can_be_read(recipe: Recipe, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "dump"
    if by == "variable":
        monkeypatch.setenv("LAROSA_DUMP", str(folder))
    fast = run(recipe, [5], **({"dump": str(folder)} if by == "option" else {}))
    (graph,) = folder.iterdir()
    assert graph.name == "graph_0"
    assert sorted(file.name for file in graph.iterdir()) == FILES

    before, analysed, rotated, folded, sparse = (graph / name for name in STAGES[:5])
    sparse_linear = "larosa.sparse_linear.default"
    # the head has too few outputs to be rotated
    head, online, linears = 1, 2, 7
    assert count(before, "aten.mm.default") == count(analysed, "aten.mm.default") == linears + head
    assert count(rotated, "aten.mm.default") > count(before, "aten.mm.default")
    assert count(folded, "aten.mm.default") == SITES + online + head
    assert [count(file, sparse_linear) for file in (before, rotated, folded)] == [0, 0, 0]
    assert count(sparse, sparse_linear) == SITES + head + online
    assert count(sparse, "aten.mm.default") == 0
    assert "float32[64, 160]" in before.read_text()
    assert (graph / "report.txt").read_text() == f"{larosa_compile.explain(fast)}\n"


def test_the_plan_the_drawing_and_the_timings_can_be_read(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, [1], dump=tmp_path)
    folder = tmp_path / "graph_0"
    plan = (folder / "plan.txt").read_text()
    for path, site in recipe.sites.items():
        (line,) = [line for line in plan.splitlines() if f"{path}:" in line or f"{path} +" in line]
        assert (site.basis or "the model's own basis") in line
    # nodes of the plan are nodes of the graph that was analysed
    nodes = {line.partition(":")[0] for line in (folder / STAGES[1]).read_text().splitlines()}
    stream = plan.partition("stream of")[2].partition("\n\n")[0].splitlines()[1:]
    assert stream and {line.strip().partition(":")[0] for line in stream} <= nodes
    assert "online" in plan and "weight" in plan
    assert (folder / "stream.svg").read_text().startswith("<svg")
    names = [line.rpartition(" ")[0].rpartition(" ")[0] for line in (folder / "timings.txt").read_text().splitlines()]
    stages = [
        "capture",
        "analyse",
        "plan",
        "rotate",
        "fold",
        "sparsify",
        "decode",
        "rewrite again",
        "eager",
        "fold weights",
        "self-check",
    ]
    assert names == stages


def test_nodes_are_named_after_their_sites(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, [1], dump=tmp_path)
    lines = (tmp_path / "graph_0" / STAGES[4]).read_text().splitlines()
    names = [line.partition(":")[0] for line in lines if "= larosa.sparse_linear" in line]
    layer = "model_layers_0"
    assert set(names) == {
        f"adapter_{layer}_self_attn_q_proj",
        f"sparse_linear_{layer}_self_attn_q_proj",
        f"sparse_linear_{layer}_self_attn_o_proj",
        f"sparse_linear_{layer}_mlp_gate_proj",
        f"sparse_linear_{layer}_mlp_down_proj",
        f"adapter_out_of_{layer}_self_attn_q_proj",
        "sparse_linear_lm_head",
    }


def test_each_graph_has_its_folder(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, [5, 1], dump=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph_0", "graph_1"]
    assert [(tmp_path / f"graph_{n}" / "report.txt").read_text().split("\n")[0][:22] for n in (0, 1)] == [
        "graph over 5 token(s);",
        "graph over 1 token(s);",
    ]
    assert "[1, 5" in (tmp_path / "graph_0" / FILES[0]).read_text()


def test_dumps_count_up_from_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "graph_0").mkdir()
    (tmp_path / "graph_2").mkdir()
    for number in (1, 3):
        GraphDump.start(tmp_path).write("report.txt", "found")
        assert (tmp_path / f"graph_{number}" / "report.txt").read_text() == "found\n"


def test_no_folder_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dump = GraphDump.start(None)
    dump.write("report.txt", "text")
    assert not dump.wanted
    assert not list(tmp_path.iterdir())
