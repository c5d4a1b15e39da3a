"""The benchmark of prompts: what it records and refuses, on a tiny model; never how fast."""

import pytest
from rich.console import Console

from benchmarks import prefill, shapes
from benchmarks.decoding import Subject, Variant


def test_reading_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Shape("llama", 64, 160, 2, 4, 2, 96, True))
    monkeypatch.setattr(shapes, "DRAWN", 10_007)
    arguments = prefill.parsed(["--shape", "tiny", "--layers", "1", "--tokens", "5", "--rounds", "2"])
    assert (arguments.tokens, arguments.sparsities) == ([5], [0.5])
    assert (prefill.parsed(["--quick"]).tokens, prefill.parsed(["--quick"]).layers) == ([128], 4)
    with pytest.raises(SystemExit):
        prefill.parsed(["--layers", "99"])
    subject, passes = Subject.prepared("tiny", 1, [5], calibrated=True), list[None]()
    variants = [Variant("eager"), Variant("larosa", 0.5)]
    records = prefill.measured(subject, 5, variants, 2, lambda: passes.append(None))
    assert len(passes) == 2 * 3
    assert [(record["variant"], record["tokens"]) for record in records] == [("eager", 5), ("larosa", 5)]
    assert records[0]["vs_first"] == 1
    assert all(low <= record["ms"] <= high for record in records for low, high in [record["spread"]])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(prefill.table(records))
    assert "larosa 50%" in capture.get()
