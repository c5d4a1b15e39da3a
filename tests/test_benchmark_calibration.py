"""benchmarks.calibration: what it draws, records and shows, on a tiny model; never how good a recipe is."""

from typing import Any

import pytest
from rich.console import Console

from benchmarks import calibration
from benchmarks.calibration import by_setting, drawing, drawn, measured, parsed, table
from tests.support.models import tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_a_smaller_draw_begins_a_larger_one() -> None:
    windows = [token_ids(1, 16, seed) for seed in range(8)]
    few, many = drawn(windows, 32, seed=3), drawn(windows, 64, seed=3)
    assert [id(window) for window in few] == [id(window) for window in many[:2]] and len(many) == 4
    assert {id(window) for window in drawn(windows, 64, seed=4)} != {id(window) for window in many}
    assert len(drawn(windows, 1, seed=0)) == 1
    with pytest.raises(ValueError, match="128 tokens, and 200 were asked for"):
        drawn(windows, 200, seed=0)


def test_records_table_and_figure() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    texts = {name: [token_ids(1, 16, seed) for seed in range(first, first + 4)] for name, first in (("a", 0), ("b", 9))}
    held_out = {"c": [token_ids(1, 16, seed) for seed in (20, 21)]}
    draws = [("a", 16, 0), ("a", 16, 1), ("a", 32, 0), ("b", 16, 0)]
    records: list[dict[str, Any]] = [{"model": "tiny"} | r for r in measured(model, texts, held_out, draws, 0.5)]
    assert [(r["calibration_text"], r["calibration_tokens"], r["seed"]) for r in records] == draws
    gaps = by_setting(records)
    assert {key[1:]: len(found) for key, found in gaps.items()} == {("a", 16): 2, ("a", 32): 1, ("b", 16): 1}
    assert len({record["ppl"] for record in records}) == 4  # other text, another recipe
    for record in records:
        assert record["gap"] == pytest.approx(record["ppl"] - record["dense_ppl"]) and record["tokens"] == 32
    console = Console(width=150)
    with console.capture() as capture:
        console.print(table(records))
    for text in ("16 tokens", "32 tokens", f"{gaps['c', 'a', 16][0]:.2f}"):
        assert text in capture.get()
    svg = drawing(records)
    for text in ("calibration tokens", "perplexity over dense, on c", "calibrated on a", "calibrated on b"):
        assert text in svg


def test_arguments() -> None:
    full, quick = parsed([]), parsed(["--quick"])
    assert (full.texts, full.tokens, full.seeds) == (
        list(calibration.TEXTS),
        list(calibration.TOKENS),
        list(calibration.SEEDS),
    )
    assert (quick.texts, quick.tokens, quick.windows) == (["wiki"], [1024, 4096], 2)
    with pytest.raises(SystemExit):
        parsed(["--windows", "1"])
