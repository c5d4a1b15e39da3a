"""The coverage benchmark: what it records of a family, how it counts, and that its workers survive any family."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import larosa_compile
from benchmarks import coverage, coverage_table, families, measure
from benchmarks.coverage_linears import LinearWeights
from benchmarks.coverage_record import TOLERANCE, Record, described, measure_family
from benchmarks.coverage_table import Totals
from benchmarks.coverage_workers import measured
from larosa_compile.errors import RecipeError

META: dict[str, Any] = {
    **{"device": "a processor", "cpu_capability": "AVX", "threads": 1, "torch": "2", "transformers": "5"},
    **{"date": "2026-01-01", "commit": "abc", "bandwidth_gb_s": 1.0, "command": "python -m x", "lowering": "eager"},
}


def test_a_family_is_exact_at_sparsity_0_and_changes_when_sparse() -> None:
    family = "llama"
    sent: list[str] = []
    record = measure_family(family, emit=lambda record: sent.append(record.step))
    assert (record.family, record.model_type, record.error, record.step) == (family, family, None, "")
    assert record.built and record.compiled and record.exact and record.decode_exact
    assert record.sparse_changes_logits
    assert record.error_rel is not None and 0 <= record.error_rel <= TOLERANCE
    assert record.decode_error_rel is not None and 0 <= record.decode_error_rel <= TOLERANCE
    assert record.sparse_bytes_share is not None and 0 < record.sparse_bytes_share <= 1
    assert record.decode_sparse_bytes_share == record.sparse_bytes_share
    assert record.self_check_faults == 0
    assert 0 < record.sites <= record.linears["weights"]
    assert len(record.missing) == min(record.linears["weights"] - record.sites, 10)
    assert 0 <= record.streams_rotated <= record.streams
    assert record.graphs >= 1
    assert sent == list(record.seconds)
    assert sum(record.seconds.values()) <= record.seconds_total + 0.1
    assert Record(**json.loads(json.dumps(dataclasses.asdict(record)))) == record


def test_a_family_without_a_site_must_still_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_to_do(*given: object, **more: object) -> None:
        raise RecipeError("no site")

    monkeypatch.setattr(larosa_compile, "calibrate", nothing_to_do)
    record = measure_family("gpt2")
    assert record.compiled and record.exact and record.decode_exact and record.error is None
    assert (record.sites, record.streams_rotated, record.sparse_bytes_share) == (0, 0, 0)
    assert record.sparse_changes_logits is None
    assert len(record.missing) == min(record.linears["weights"], 10)
    assert record.dense_reason


def test_a_family_that_cannot_be_built_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(family: str) -> None:
        raise ImportError("needs a package\nand more")

    monkeypatch.setattr(families, "tiny_model", broken)
    record = measure_family("llama")
    assert not record.built and not record.compiled
    assert record.error is not None and record.error.startswith("build: ImportError: needs a package (test_coverage.py")
    assert Totals.of([record]).built == 0


def test_a_failure_to_compile_is_one_in_decoding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*given: object, **more: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(larosa_compile, "calibrate", defect)
    record = measure_family("llama")
    assert record.built and not record.compiled and not record.exact
    assert record.decode_exact is False
    assert record.errors.keys() == {"calibrate"}


class Odd(nn.Module):
    """A head tied to a table, experts, a parameter for a linear, a part that is not read, and what is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.mix = nn.Parameter(torch.ones(1, 1, 4))
        self.conv = nn.Conv1d(4, 4, 1)
        self.down = Conv1D(4, 4)  # transformers' linear, its weight the other way round
        self.router = nn.Parameter(torch.randn(4, 4))
        self.offset = nn.Parameter(torch.randn(2, 4))
        self.decay = nn.Parameter(torch.randn(2, 4, 4))
        self.chooser = nn.Linear(4, 4)
        self.tower = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Any:
        mixed = (self.table(input_ids) * self.mix) @ self.experts.sum(0) * self.decay[0].exp().sum()
        choice = self.chooser(mixed[0]).argmax(-1)  # no gradient comes this way
        routed = torch.addmm(self.offset, mixed[0][choice % 2], self.router.T)
        return SimpleNamespace(logits=self.head(self.down(self.conv(routed.mT[None]).mT)))


def test_linear_weights_are_counted_once_and_without_what_is_not_read() -> None:
    model: Any = Odd()
    weights = LinearWeights.of(model, {"input_ids": torch.tensor([[1, 2]])})
    assert set(weights.read) == {"experts", "head.weight", "down.weight", "router", "chooser.weight"}
    assert set(weights.unread) == {"tower.weight"}
    assert weights.counts() == {"weights": 5, "bytes": 4 * (8 * 4 + 2 * 4 * 4 + 3 * 4 * 4), "unread": 1}
    assert weights.among(["table.weight", "conv.weight", "tower.weight"]) == {"head.weight"}
    assert weights.bytes_share({"head.weight"}) == 32 / 112


def test_the_first_cause_is_described() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("outer") from error
    except RuntimeError as error:
        assert described(error).startswith("KeyError: 'inner' (test_coverage.py:")


def records() -> list[Record]:
    good = Record("good", built=True, compiled=True, exact=True, error_rel=1e-7, decode_exact=True)
    good.linears, good.sites, good.sparse_bytes_share = {"weights": 4, "bytes": 64, "unread": 0}, 4, 1.0
    good.streams = good.streams_rotated = 1
    inexact = dataclasses.replace(good, family="inexact", exact=False, error_rel=0.5, decode_exact=None, streams=0)
    inexact.self_check_faults, inexact.decode_sparse_bytes_share = 1, 0.125
    inexact.streams_rotated, inexact.sparse_bytes_share, inexact.sites = 0, 0.25, 1
    failed = Record("failed", built=True, decode_exact=False, linears=good.linears, error="prefill: ValueError: a | b")
    return [good, inexact, failed, Record("absent", error="build: ImportError: no")]


def test_totals_and_failures() -> None:
    totals = Totals.of(records())
    assert dataclasses.asdict(totals) == {
        **{"names": 4, "built": 3, "compiled": 2, "exact": 1, "decodes": 2, "decode_exact": 1, "rotated": 1},
        **{"unfaulted": 1, "median_share": 0.25},  # 1, 0.25, and nothing of what did not compile
    }
    assert coverage_table.failing(records()) == {
        "not compiled": ["failed"],
        "compiled, not exact": ["inexact"],
        "decode not exact": ["failed"],
        "cannot decode eagerly": ["inexact"],
        "sites taken out by the self-check": ["inexact"],
        "fewer bytes in sites when decoding": ["inexact"],
        "no rotated stream": ["inexact"],
        "less than half of the bytes in sites": ["inexact"],
    }


def test_nothing_measured_has_totals_too() -> None:
    assert Totals.of([]).median_share is None
    Console(quiet=True).print(coverage_table.summary([]))


def test_the_table_has_a_row_for_every_family() -> None:
    text = coverage_table.markdown(META, records())
    counted, _, out = text.partition("## Not counted")
    assert "| exact at sparsity 0 | 1 of 3 |" in counted
    for family in ("good", "inexact", "failed"):
        (row,) = [line for line in counted.splitlines() if line.startswith(f"| {family} |")]
        assert row.replace("\\|", "").count("|") == len(coverage_table.COLUMNS) + 1
    assert "| absent | build: ImportError: no |" in out
    console = Console(width=160, record=True, quiet=True)
    console.print(coverage_table.summary(records()))
    assert [coverage_table.line(record).partition(":")[0] for record in records()] == [
        *("good", "inexact", "failed", "absent")
    ]


STAND_IN = """
import json, os, sys, time
for line in sys.stdin:
    family = line.strip()
    print(json.dumps({"family": family, "step": "prefill", "built": True}), flush=True)
    if family == "hang":
        time.sleep(600)
    if family == "crash":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    print(json.dumps({"family": family, "built": True, "model_type": str(os.getpid())}), flush=True)
"""


def test_workers_outlive_families_and_are_replaced_after_a_loss() -> None:
    names = ["a", "b", "crash", "c", "hang", "d"]
    found = {record.family: record for record in measured(names, 1, [sys.executable, "-c", STAND_IN], timeout=2)}
    assert list(found) == names
    assert all(record.built and not record.step for record in found.values())
    assert found["crash"].error == "prefill: worker exited with 3: last words"
    assert found["hang"].error == "prefill: timed out after 2 s"
    assert [found[name].error for name in "abcd"] == [None] * 4
    process = {name: found[name].model_type for name in "abcd"}
    assert process["a"] == process["b"]
    assert len({process[name] for name in "bcd"}) == 3


def test_leaving_early_ends_the_workers() -> None:
    found = measured(["a", "hang", "b"], 2, [sys.executable, "-c", STAND_IN], timeout=600)
    assert next(found).family in "ab"
    found.close()  # type: ignore[attr-defined]  # would wait for the hanging one otherwise


@pytest.mark.parametrize("interrupted", [False, True])
def test_files_hold_what_was_measured(
    interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(names: Sequence[str], *more: object) -> Iterator[Record]:
        yield Record(names[1], built=True)
        if interrupted:
            raise KeyboardInterrupt
        yield Record(names[0], error="build: no")

    path, table = tmp_path / "new" / "x.json", tmp_path / "new" / "x.md"
    monkeypatch.setattr(coverage, "measured", some)
    monkeypatch.setattr(measure, "machine", lambda: META)
    argv = ["coverage", "--families", "llama,gpt2", "--json", str(path), "--table", str(table)]
    monkeypatch.setattr(sys, "argv", argv)
    if interrupted:
        with pytest.raises(SystemExit, match="130"):
            coverage.main()
    else:
        coverage.main()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [record["family"] for record in found["records"]] == (["gpt2"] if interrupted else ["llama", "gpt2"])
    assert found["meta"]["lowering"] == "inductor"
    assert "--families llama,gpt2" in found["meta"]["command"]
    assert table.exists() is not interrupted
    assert sorted(path.parent.iterdir()) == ([path] if interrupted else [path, table])


def test_arguments() -> None:
    full, quick = coverage.parsed([]), coverage.parsed(["--quick"])
    assert full.families == families.family_names()
    assert (full.lowering, full.table) == ("inductor", coverage.TABLE)
    assert quick.families == list(coverage.QUICK)
    assert (quick.lowering, quick.table) == ("eager", None)
    for wrong in (["--families", "lama"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            coverage.parsed(wrong)
