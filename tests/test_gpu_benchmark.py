"""The benchmark for a real GPU: its logic on the CPU, and what it says where there is no GPU. Never how fast."""

import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from larosa_compile.kernels import ops, reference
from tests.support.models import tiny_model

CPU = torch.device("cpu")


def bench(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick"])
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main()


def exact(x: Tensor, weight_t: Tensor, k: int) -> Tensor:
    return (reference.sparsify(x, k).double() @ weight_t.double()).to(x.dtype)


def test_its_check_accepts_what_is_right_and_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(ops, "sparse_linear", exact)
    gpu.check(CPU)
    monkeypatch.setattr(ops, "sparse_linear", lambda x, weight_t, k: exact(x, weight_t, k + 1))
    with pytest.raises(AssertionError):
        gpu.check(CPU)


def test_records_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    with torch.no_grad():
        records = gpu.product_records((64, 96), CPU, bench, lambda run: run, weight_bytes=2 * 3 * 64 * 96)
    assert [record["sparsity"] for record in records] == list(gpu.SPARSITIES)
    for record in records:
        assert record["ratio"] == record["dense_us_median"] / record["us_median"]
        assert record["gb_per_s"] == pytest.approx(
            2 * round((1 - record["sparsity"]) * 64) * 96 / record["us_median"] / 1e3
        )
    assert len(gpu.product_table(records).rows) == len(records)


def test_records_of_decoding() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    assert list(gpu.variants_of(model, CPU, "reduce-overhead")) == [("inductor", 0.0), ("larosa", 0.4), ("larosa", 0.5)]
    with torch.no_grad():
        records = gpu.decode_records(model, {("inductor", 0.0): model, ("larosa", 0.5): model}, CPU, 2, 2)
    assert [(record["variant"], record["sparsity"]) for record in records] == [("inductor", 0.0), ("larosa", 0.5)]
    for record in records:
        low, high = record["spread"]
        assert 0 < low <= record["tokens_per_s"] <= high
