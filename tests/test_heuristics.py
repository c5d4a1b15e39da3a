"""How the CPU templates split their work."""

import pytest

from larosa_compile.kernels import heuristics


@pytest.mark.parametrize("columns", [1, 31, 576, 4096, 9001, 128_256])
def test_splits_cover_the_columns(columns: int) -> None:
    chunk = heuristics.gemv_chunk(columns)
    chunks = heuristics.ceil_div(columns, chunk)
    assert chunk % heuristics.COLUMN_MULTIPLE == 0 and chunk * chunks >= columns
    assert chunk <= heuristics.round_up(heuristics.MAX_CHUNK_COLUMNS, heuristics.COLUMN_MULTIPLE)
    for threads in (1, 2, 3, 64):
        tile = heuristics.gemv_tile(columns, threads)
        assert tile % heuristics.COLUMN_MULTIPLE == 0 and 0 < tile <= heuristics.MAX_TILE_COLUMNS
        assert tile * threads >= columns or tile == heuristics.MAX_TILE_COLUMNS


def test_small_work_stays_on_one_thread() -> None:
    assert heuristics.gemv_threads(weight_bytes=2048, max_threads=8) == 1
    assert heuristics.gemv_threads(weight_bytes=2**24, max_threads=8) == 8


def test_rows_that_share_a_panel_have_room_for_their_sums() -> None:
    assert [heuristics.gemm_chunk(rows) for rows in (9, 512, 513, None)] == [9, 512, 512, 512]
