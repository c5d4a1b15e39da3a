"""The plot of perplexity against speed: what is in it, and what it refuses."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib; `pip install larosa-compile[report]` has it")

from benchmarks import plot


def record(peer: str, weights: str, sparsity: float, speed: float | None, ppl: float | None) -> dict[str, Any]:
    spread = [0.9 * speed, 1.1 * speed] if speed else None
    found = {"peer": peer, "weights": weights, "sparsity": sparsity, "tokens_per_s": speed, "spread": spread}
    return found | {"ppl": ppl, "model": "tiny"}


RECORDS = [
    record("larosa", "int8", 0.5, 70.0, 15.3),
    record("larosa", "int8", 0.0, 45.0, 13.9),
    record("larosa", "int4", 0.5, 86.0, 15.9),
    record("larosa search", "int8", 0.5, 71.0, 14.9),
    record("torch.compile", "bf16", 0.0, 12.0, 13.876),
    record("llama.cpp", "q8_0", 0.0, 60.0, 14.3),
    record("llama.cpp", "q4_0", 0.0, 85.0, 15.8),
    record("openvino", "q8_0", 0.0, 50.0, None),
    record("torchao", "int8", 0.0, None, None),
]


def test_lines_are_formats_of_larosa_and_other_peers() -> None:
    lines = plot.lines_of(RECORDS)
    names = {line: [point.name for point in points] for line, points in lines.items()}
    assert names == {
        "larosa, int8": ["0", "50"],
        "larosa, int4": ["50"],
        "larosa search, int8": ["50"],
        "torch.compile": ["bf16"],
        "llama.cpp": ["q8_0", "q4_0"],
    }


def test_names_of_close_points_go_to_either_side() -> None:
    """Two of 45 and 46 tokens per second once had their names above one another's points."""
    speeds = (45.0, 46.0, 67.0)
    points = [plot.Point(str(speed), speed, (speed, speed), 1.0) for speed in speeds]
    assert plot.close_to_next(points, 9.0) == [True, False, False]


def test_a_file_is_drawn_with_names_and_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "peers.json", tmp_path / "curve.svg"
    source.write_text(json.dumps({"meta": {}, "records": RECORDS}))
    monkeypatch.setattr(sys, "argv", ["plot", str(source), "-o", str(target)])
    plot.main()
    assert "7 points in 5 series" in capsys.readouterr().out
    root = ElementTree.parse(target).getroot()
    said = [
        re.sub(r"\s+", " ", "".join(element.itertext())).strip() for element in root.iter() if "text" in element.tag
    ]
    for text in ("llama.cpp", "q4_0", "larosa, int8: 0, 50 %", "perplexity", "dense, 13.88"):
        assert text in said
    assert any(text.startswith("tokens per second") for text in said)


def test_points_of_one_name_stay_in_order() -> None:
    points = [
        plot.Point(name, speed, (speed, speed), 1.0) for name, speed in (("q4", 28.0), ("q8", 30.0), ("q4", 60.0))
    ]
    assert plot.once_each(points) == [points[1], points[2]]


def test_several_runs_have_one_line_for_the_dense_model_and_name_points_once() -> None:
    svg = plot.drawn(plot.lines_of([*RECORDS, *RECORDS]), "tiny")
    drawn = re.sub(r"<!--.*?-->", "", svg)
    assert (drawn.count("dense, 13.88"), drawn.count(">q4_0<")) == (1, 1)


@pytest.mark.parametrize("records", [[], [RECORDS[0], RECORDS[1] | {"model": "other"}]])
def test_nothing_and_several_models_are_refused(records: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"of one model, got (no measurement|other, tiny)"):
        plot.lines_of(records)
