"""TORCH_LOGS and TORCH_TRACE show a compile; timings are of its stages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from larosa_compile.report import GraphReport
from larosa_compile.trace import Trace

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import torch, larosa_compile
from tests.support.models import tiny_model, token_ids

model = tiny_model("llama", num_hidden_layers=1)
recipe = larosa_compile.calibrate(model, [token_ids(4, 16)], progress=False)
fast = torch.compile(model, backend="larosa", options={"recipe": recipe, "lowering": "eager"})
with torch.no_grad():
    fast(input_ids=token_ids(1, 1), use_cache=False)
print(larosa_compile.explain(fast))
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, str]]:
    """Standard output and error of a program, and the artifacts in its trace, by name."""
    folder = tmp_path_factory.mktemp("trace")
    environment = os.environ | {"TORCH_TRACE": str(folder), "TORCH_LOGS": "+larosa_compile"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (file,) = folder.iterdir()
    artifacts: dict[str, str] = {}
    name = ""
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            if name:
                artifacts[name] = artifacts.get(name, "") + line.removeprefix("\t") + "\n"
            continue
        record = json.loads(line[line.index("{") :])
        name = record.get("artifact", {}).get("name", "")
        name = name if name.startswith("larosa_") else ""
    return run.stdout, run.stderr, artifacts


def test_the_trace_holds_plan_graphs_report_and_drawing(shown: tuple[str, str, dict[str, str]]) -> None:
    report, _, artifacts = shown
    graphs = [f"{n}_{stage}" for n, stage in enumerate("input analyse rotate fold sparsify decode".split())]
    assert artifacts.keys() == {
        f"larosa_{name}"
        for name in [*(f"{graph}.txt" for graph in graphs), "plan.txt", "report.txt", "stream.svg", "timings.txt"]
    }
    assert artifacts["larosa_report.txt"] == report
    assert "larosa.sparse_linear.default" in artifacts["larosa_4_sparsify.txt"]
    assert artifacts["larosa_stream.svg"].startswith("<svg")
    assert "self-check" in artifacts["larosa_timings.txt"]


def test_the_log_has_one_line_a_graph_and_stages_at_debug_level(shown: tuple[str, str, dict[str, str]]) -> None:
    lines = [line for line in shown[1].splitlines() if "larosa_compile/trace.py" in line]
    (said,) = [line for line in lines if line.startswith("I")]
    for part in ("graph over 1 token(s): 5 sparse sites", "2 rotations at run time", "0 left dense", "eager"):
        assert part in said
    debug = [line for line in lines if line.startswith("V")]
    assert len(debug) == len(lines) - 1
    assert any("capture took" in line for line in debug)


def test_stages_are_timed_and_repeated_ones_add_up(tmp_path: Path) -> None:
    trace = Trace(tmp_path, time.perf_counter() - 1)
    assert 1 <= trace.seconds["capture"] < 2
    for _ in range(2):
        with trace.stage("fold weights"):
            time.sleep(0.02)
    assert 0.04 <= trace.seconds["fold weights"] < 1
    trace.graph("input", torch.fx.Graph())
    trace.graph("plan", torch.fx.Graph())
    trace.graph("fold", torch.fx.Graph())
    assert {"plan", "fold"} <= trace.seconds.keys() and "input" not in trace.seconds
    trace.done(GraphReport("1", "no recipe", (), (), (), 0, ()))
    assert sorted(path.name for path in (tmp_path / "graph_0").iterdir()) == [
        "0_input.txt",
        "1_fold.txt",
        "timings.txt",
    ]


def test_generated_code_is_written_where_there_is_some(tmp_path: Path) -> None:
    trace = Trace(tmp_path, time.perf_counter())
    trace.generated(lambda inputs: inputs)
    assert not list((tmp_path / "graph_0").iterdir())
    trace.generated(SimpleNamespace(source_code="async_compile"))
    assert (tmp_path / "graph_0" / "generated_code.py").read_text() == "async_compile\n"
