"""Histograms of magnitudes, against sorted values."""

import pytest
import torch

from larosa_compile.site import QUANTILES
from larosa_compile.thresholds import Magnitudes

SHARES = [index / QUANTILES for index in range(QUANTILES)]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_quantiles_are_those_of_the_values(scale: float) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).abs() * scale
    found = Magnitudes()
    for part in values.split(700):
        found.add(part)
    expected = torch.quantile(values.double(), torch.tensor(SHARES, dtype=torch.float64))
    # a bin is 2⁻⁸ of its numbers wide
    torch.testing.assert_close(torch.tensor(found.quantiles(SHARES)).double()[1:], expected[1:], rtol=2**-7, atol=0)
    assert found.quantile(0.0) == 0 and found.quantile(0.5) == found.quantiles(SHARES)[50]


def test_zeros_infinities_and_nothing() -> None:
    found = Magnitudes()
    assert found.quantiles([0.0, 0.5]) == (0.0, 0.0)
    found.add(torch.tensor([0.0, 0.0, 0.0, 1.0, float("inf"), float("nan")]))
    low, half, high = found.quantiles([0.3, 0.5, 0.99])
    assert low <= half < 1e-30 and 1e38 < high < float("inf")
