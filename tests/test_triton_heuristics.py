"""How the Triton template splits its work."""

import pytest
import torch

from larosa_compile.kernels import reference, triton_threshold
from larosa_compile.kernels import triton_heuristics as heuristics
from larosa_compile.kernels.formats import KNOWN, WeightFormat
from larosa_compile.kernels.heuristics import ceil_div

SHAPES = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (11008, 4096), (101, 33), (28672, 8192)]


@pytest.mark.parametrize("processors", [108, 132, 148, 304])
@pytest.mark.parametrize(("features", "columns"), SHAPES)
def test_parts_cover_the_features(features: int, columns: int, processors: int) -> None:
    for rows in (1, 2):
        configs = heuristics.gemv_configs(features, columns, rows, 2, processors)
        assert len({config.parts for config in configs}) == 1, "autotuning compares results of one shape"
        for config in configs:
            assert config.parts * config.chunk >= features and config.chunk % config.block_k == 0
            assert config.parts == 1 or features >= config.parts * heuristics.MIN_CHUNK


@pytest.mark.parametrize("form", KNOWN.values(), ids=lambda form: form.name)
@pytest.mark.parametrize(("features", "columns"), SHAPES)
def test_packed_parts_are_whole_groups(features: int, columns: int, form: WeightFormat) -> None:
    lines = features + min(features, form.fine)
    configs = heuristics.packed_configs(lines, columns, 1, form, 132)
    assert len({config.parts for config in configs}) == 1
    for config in configs:
        assert config.block_k == form.group and config.chunk % form.group == 0
        assert config.parts * config.chunk >= lines
        assert config.block_n * form.bits // 8 in (64, 128, 256), "half a line of memory, one, or two"


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_row_of_a_tile_is_a_line(itemsize: int) -> None:
    config = heuristics.gemv_configs(4096, 4096, 1, itemsize, 132)[0]
    assert config.block_n * itemsize == heuristics.LINE_BYTES


@pytest.mark.parametrize(("features", "columns"), SHAPES[:5])
def test_wide_products_give_every_processor_work(features: int, columns: int) -> None:
    config = heuristics.gemv_configs(features, columns, 1, 2, 132)[0]
    programs = ceil_div(columns, config.block_n) * config.parts
    assert programs >= heuristics.MIN_PROGRAMS * 132
    half = config.parts // 2
    assert config.parts == 1 or ceil_div(columns, config.block_n) * half < heuristics.MIN_PROGRAMS * 132


@pytest.mark.parametrize(
    ("features", "k", "rows"), [(4096, 4096, 1), (4096, 2048, 2), (4096, 2049, 1), (4096, 1, 4096)]
)
def test_rows_up_to_which_skipping_reads_less(features: int, k: int, rows: int) -> None:
    assert heuristics.max_gemv_rows(features, k) == rows
    assert rows * k <= features < (rows + 1) * k


def test_no_more_rows_than_a_grid_has() -> None:
    assert heuristics.max_gemv_rows(2**20, 1) * heuristics.MAX_PARTS <= 65_535


@pytest.mark.parametrize("dtype", reference.MAGNITUDE_VIEWS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_autotuning_selects_of_normal_rows(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bits = reference.magnitude_bits(torch.randn(10_000).to(dtype))
    threshold = triton_threshold.normal_threshold(10_000, round(share * 10_000), dtype)
    kept = int((bits >= threshold).sum())
    # four standard deviations of a count, and bfloat16's steps of 1/256
    assert abs(kept - share * 10_000) <= 4 * (10_000 * share * (1 - share)) ** 0.5 + 100
