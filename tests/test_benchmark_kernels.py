"""benchmarks.kernels: what it times and records, on tiny shapes; never how fast."""

import itertools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks import kernels
from larosa_compile.kernels import reference
from larosa_compile.kernels.formats import FORMATS, WeightFormat

KERNEL_FIELDS = {
    *("shape", "dtype", "sparsity", "rows", "us_median", "us_min", "us_max", "gb_per_s", "bandwidth_share"),
    *("dense_us_median", "dense_gb_per_s", "ratio", "selection_us", "selection_share", "bandwidth_gb_s"),
}


def test_a_record_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_PRODUCTS", "SELECTION_PRODUCTS"):
        monkeypatch.setattr(kernels, name, 2)
    with torch.no_grad():
        records = kernels.measured((48, 40), "bf16", [0.5, 0.0], rows=1, rounds=2, weight_bytes=100_000)
    for record, sparsity in zip(records, (0.5, 0.0), strict=True):
        assert record.keys() == KERNEL_FIELDS
        assert (record["shape"], record["dtype"], record["sparsity"], record["rows"]) == ([48, 40], "bf16", sparsity, 1)
        assert all(record[name] > 0 for name in KERNEL_FIELDS - {"shape", "dtype", "sparsity", "rows"})
        assert record["us_min"] <= record["us_median"] <= record["us_max"]
        assert record["gb_per_s"] * record["us_median"] * 1e3 == pytest.approx(48 * 40 * 2 * (1 - sparsity))
        assert record["ratio"] * record["us_median"] == pytest.approx(record["dense_us_median"])
    assert json.loads(json.dumps(records)) == records
    console = Console(width=200)
    with console.capture() as shown:
        console.print(kernels.table("bf16", 1, records))
    assert "48x40" in shown.get()


@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_timed_are_the_products(rows: int) -> None:
    weights = kernels.copies((40, 24), torch.float32, 3 * 40 * 24 * 4)
    x = [torch.randn(rows, 40) for _ in weights]
    with torch.no_grad():
        sparse: Any = kernels._sparse(x, [weights], kernels.Product(10, 24, None))()
        dense: Any = kernels._dense(x, [weights])()
    assert len(sparse[0]) == len(dense) == len(weights)
    for found, product, row, weight in zip(sparse[0], dense, x, weights, strict=True):
        torch.testing.assert_close(found, reference.sparse_linear(row, weight, 10))
        assert torch.equal(product, F.linear(row, weight.view(24, 40)))


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_products_with_packed_weights(form: WeightFormat) -> None:
    weights = kernels.packed_copies((40, 24), form, 3 * 4096)
    assert len(weights) >= 3 and len({weight.data_ptr() for weight in weights}) == len(weights)
    x = [torch.randn(1, 40).bfloat16() for _ in weights]
    product = kernels.Product(10, 24, form)
    calls = kernels.in_calls(weights)
    with torch.no_grad():
        found: Any = kernels._sparse(x, calls, product)()
    for row, weight, y in zip(x, calls[0], found[0], strict=False):
        expected = reference.sparse_linear_packed(row, weight, 10, 24, form.name)
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))


@pytest.mark.parametrize(("size", "count"), [((577, 3), 9), ((16, 16), 2), ((5, 5), 37)])
def test_copies_are_distinct_aligned_and_whole_calls(size: kernels.Size, count: int) -> None:
    found = kernels.copies(size, torch.bfloat16, count * size[0] * size[1] * 2)
    assert len(found) >= count and (len(found) <= kernels.MAX_PRODUCTS or len(found) % kernels.MAX_PRODUCTS == 0)
    assert all(weight.shape == size and weight.is_contiguous() and weight.isfinite().all() for weight in found)
    places = sorted(weight.data_ptr() for weight in found)
    assert all(place % kernels.ALIGNMENT == 0 for place in places)
    assert all(after - before >= found[0].nbytes for before, after in itertools.pairwise(places))
