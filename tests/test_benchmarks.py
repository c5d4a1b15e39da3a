"""The benchmarks' bookkeeping, on tiny models; their numbers are not the point here."""

import datetime
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import larosa_compile
from benchmarks import demo, measure, methods, online, windows
from benchmarks import perplexity as table
from larosa_compile import decoding, machine
from larosa_compile.decoding import Spread
from larosa_compile.evaluation import next_token_losses, perplexity
from tests.support.models import tiny_model, token_ids
from tests.support.simulation import simulated


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 2.0, 9.0, 3.0]])
def test_spread(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread == Spread(statistics.median(values), min(values), max(values), len(values))


def test_no_measurement_has_no_spread() -> None:
    with pytest.raises(statistics.StatisticsError):
        Spread.of([])


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    meta = measure.machine()
    assert set(meta) == {
        *("device", "cpu_capability", "cpu_flags", "threads", "torch", "triton", "transformers"),
        *("date", "commit", "bandwidth_gb_s"),
    }
    assert meta["threads"] == torch.get_num_threads()
    assert meta["torch"] == torch.__version__
    assert datetime.date.fromisoformat(meta["date"])
    assert meta["bandwidth_gb_s"] > 0
    assert all(isinstance(meta[name], str) and meta[name] for name in ("device", "cpu_capability", "commit"))


def test_bandwidth_is_that_of_memory_and_not_of_a_cache(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "491520K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n", encoding="ascii")
    assert machine.last_level_cache_bytes(tmp_path) == 480 * 2**20
    assert machine.last_level_cache_bytes(tmp_path / "none") == 0
    assert max(machine.last_level_cache_bytes() * 2, 2**28) == machine.READ_BYTES


def test_a_file_holds_meta_and_records(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.json"
    meta, records = {"device": "é", "threads": 2}, [{"ppl": 1.5, "spread": [1.0, 2.0]}]
    for _ in range(2):
        measure.write(path, meta, records)
        assert json.loads(path.read_text(encoding="utf-8")) == {"meta": meta, "records": records}


class Counting:
    """A variant that calls the model, and keeps what it was called with."""

    def __init__(self, model: Any, calls: list["Counting"]) -> None:
        self.model, self.calls, self.given = model, calls, list[tuple[int, int]]()

    def __call__(self, **inputs: Any) -> Any:
        self.calls.append(self)
        assert inputs["use_cache"]
        self.given.append((int(inputs["input_ids"]), int(inputs["position_ids"])))
        return self.model(**inputs)


def greedy(model: Any, prompt: torch.Tensor, tokens: int) -> list[int]:
    ids = prompt
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt.shape[1] :].tolist()


def test_decoding_is_greedy_one_token_at_a_time() -> None:
    model, prompt = tiny_model("llama", num_hidden_layers=1), token_ids(1, 6)
    forward = Counting(model, [])
    assert len(decoding.decode_seconds(model, forward, prompt, 5)) == 5
    assert [token for token, _ in forward.given] == greedy(model, prompt, 5)
    assert [position for _, position in forward.given] == [6, 7, 8, 9, 10]


def test_variants_take_turns_and_are_all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, done = tiny_model("llama", num_hidden_layers=1), list[Counting](), list[None]()
    # each call of the clock is one second later, so every token takes one
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=iter(range(10**6)).__next__))
    variants = {name: Counting(model, calls) for name in ("a", "b")}
    found = decoding.compare(model, variants, token_ids(1, 6), tokens=3, rounds=2, done=lambda: done.append(None))
    assert list(found) == ["a", "b"]
    for warm, spread in found.values():
        assert warm > 4
        assert spread == Spread(1, 1, 1, 2 * 3)
    a, b = variants.values()
    assert calls == [a] * 4 + [b] * 4 + ([a] * 4 + [b] * 4) * 2
    assert len(done) == 2 + 2 * 2


def test_demo_measures_dense_magnitude_and_larosa(monkeypatch: pytest.MonkeyPatch) -> None:
    # eager lowering: what is compiled is the business of other tests
    eager = torch.compile
    monkeypatch.setattr(demo, "SPARSITIES", (0.4,))
    monkeypatch.setattr(demo.torch, "compile", lambda model, **kw: eager(model, **_eager(kw)))
    model, held_out = tiny_model("llama", num_hidden_layers=1), [token_ids(1, 24, seed) for seed in (5, 6)]
    recipe = larosa_compile.calibrate(model, [token_ids(4, 16)], 0.5)
    records = demo.perplexities("tiny", model, recipe, held_out)
    torch._dynamo.reset()

    at = recipe.with_sparsity(0.4)
    variants = [recipe.with_sparsity(0).without_rotation(), at.without_rotation(), at]
    assert [(record["method"], record["sparsity"]) for record in records] == [
        ("dense", 0.0),
        ("magnitude", 0.4),
        ("larosa", 0.4),
    ]
    for record, variant in zip(records, variants, strict=True):
        with simulated(model, variant):
            expected = perplexity(next_token_losses(model, held_out))
        assert record["ppl"] == pytest.approx(expected, rel=1e-4)
        assert record["gap"] == record["ppl"] - records[0]["ppl"]
    assert records[0]["bytes_skipped_share"] == 0 < records[2]["bytes_skipped_share"] < 0.4
    assert json.loads(json.dumps(records)) == records


def _eager(arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments.get("backend") == "larosa":
        arguments["options"] = {**arguments["options"], "lowering": "eager"}
    return arguments


def test_online_compares_recipes_of_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "CONTEXT", 16)
    monkeypatch.setattr(online, "LENGTHS", (7, 16))
    text = token_ids(1, 40)
    assert torch.equal(torch.cat(list(online.prompts_of(text)), 1), text)
    assert [prompt.shape[1] for prompt in online.prompts_of(text)] == [7, 16, 7, 10]
    model, held_out = tiny_model("llama", num_hidden_layers=1), [token_ids(1, 16, seed) for seed in (5, 6)]
    records = online.compared("tiny", model, text, held_out, 0.5, {"lowering": "eager"})
    torch._dynamo.reset()
    assert [record["method"] for record in records] == ["dense", "calibrate", "online"]
    dense, explicit, learnt = records
    assert explicit["calibration_tokens"] == learnt["calibration_tokens"] == 40
    assert (explicit["prompts"], learnt["prompts"]) == (3, 4)
    assert dense["ppl"] == perplexity(next_token_losses(model, held_out))
    assert learnt["over_explicit"] == learnt["ppl"] / explicit["ppl"] - 1
    with simulated(model, larosa_compile.recipe_of(model)):
        assert explicit["ppl"] == pytest.approx(perplexity(next_token_losses(model, held_out)), rel=1e-4)


def test_methods_are_compared_at_equal_bytes_and_under_each_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = torch.compile
    monkeypatch.setattr(table.torch, "compile", lambda model, **kw: eager(model, **_eager(kw)))
    model, ids = tiny_model("llama", num_hidden_layers=1), [token_ids(2, 64, seed) for seed in range(2)]
    recipes, held_out = (
        methods.Recipes(model, ids, folder=tmp_path / "kept"),
        table.Tokens([token_ids(1, 24, seed) for seed in (5, 6)]),
    )
    arguments = table.parsed(["--methods", "teal", "larosa", "--sparsities", "0.4", "--equal-bytes"])
    runs = table.planned(arguments, recipes)
    assert recipes.equal_bytes("teal", 0.96) is None
    assert [(run.method, run.place) for run in runs] == [("larosa", None), ("teal", None), ("teal", 0.4)]
    assert runs[1].sparsity == 0.4
    more = methods.Run("larosa", "model", 0.4, "decode")
    found = table.measured(model, recipes.of, [runs[0], runs[2], more], {"ids": held_out})
    dense, dense_decode, larosa, teal, decode = found
    torch._dynamo.reset()
    assert {path.name.partition("-")[0] for path in (tmp_path / "kept").iterdir()} == {"larosa", "teal"}
    assert abs(teal["bytes_skipped_share"] - larosa["bytes_skipped_share"]) < 0.03
    assert teal["sparsity"] < larosa["sparsity"] and "loss_over_dense_error" in teal and "loss_over_larosa" in teal
    assert dense["losses"] == next_token_losses(model, held_out.windows)
    # of a sparse model's losses the second half alone, behind a cache that is dense
    assert dense_decode["losses"] == pytest.approx(
        next_token_losses(model, held_out.windows, counted_from=12), rel=1e-5
    )
    assert decode["losses"] != dense_decode["losses"] != dense["losses"]
    assert [record["protocol"] for record in (dense, dense_decode, larosa, teal, decode)] == [
        *("all", "decode", "all", "all", "decode")
    ]
    described = {"model": "tiny", "calibration": "ids"}
    made = table.table([described | record for record in (dense, larosa, teal)])
    assert (dense["tokens"], dense["text"], teal["as"]) == (48, "ids", 0.4)
    assert made.row_count == 3 and [column.header for column in made.columns][-1] == "over larosa"
    assert "protocol all" in str(made.title) and "bits/byte" not in {column.header for column in made.columns}


def test_bits_per_byte() -> None:
    """Of the tokens whose prediction counts: here two bytes each, and the first half of four is not predicted."""
    tokenizer = SimpleNamespace(decode=lambda tokens: "é" * len(tokens))
    tokens = table.Tokens([token_ids(1, 8), token_ids(1, 8)], tokenizer)
    nats = 2 * 0.6931471805599453
    assert tokens.bits_per_byte([nats, nats], "all") == pytest.approx(1)
    assert tokens.bits_per_byte([nats, 3 * nats], "decode") == pytest.approx(2)
    assert table.Tokens([token_ids(1, 8)]).bits_per_byte([nats], "all") is None


def test_several_texts_are_calibrated_on_in_turn() -> None:
    """As many windows of each, up to the end of the shortest; one text as it is."""
    first, second = [[token_ids(1, 8, seed=10 * text + index) for index in range(3)] for text in (1, 2)]
    assert list(map(id, windows.in_turn([first, second[:2]]))) == list(
        map(id, [first[0], second[0], first[1], second[1]])
    )
    assert list(map(id, windows.in_turn([first]))) == list(map(id, first))
    assert table.parsed(["--calibration", "wiki", "c4"]).calibration == ["wiki", "c4"]
    assert table.parsed([]).calibration == ["wiki"]
