"""Work splitting for the Triton template: pure functions of the device, static shapes and k."""

from dataclasses import dataclass

from larosa_compile.kernels.formats import WeightFormat
from larosa_compile.kernels.heuristics import ceil_div, round_up

LINE_BYTES = 128
"""What one row of a tile reads at once: a whole line of memory, by loads of 16 bytes."""

BLOCK_K = 128
"""Weight rows in a tile. Where half of them are read, a program has 8 KiB in flight."""

WARPS = 8
MIN_PROGRAMS = 1.5
"""Programs per processor below which the features are split: 12 KiB in flight where half of each tile is read."""

MAX_PARTS = 4
"""Partial sums that whoever reads the result adds up: Inductor unrolls a reduction of fewer than 8 into that kernel."""

MIN_CHUNK = 256
"""Features in a part; fewer would write more partial sums than they read weights."""

MAX_GRID = 65_535
"""CUDA's limit on programs along the dimension that rows and parts share."""


@dataclass(frozen=True)
class GemvConfig:
    """block_n columns by block_k features make a tile; chunk features make one of `parts` parts of the sum."""

    block_n: int
    block_k: int
    warps: int
    parts: int
    chunk: int


def max_gemv_rows(features: int, k: int) -> int:
    """Rows up to which reading each row's own `k` weight rows reads no more than reading all weights once."""
    return min(max(1, features // k), MAX_GRID // MAX_PARTS)


def gemv_configs(features: int, columns: int, rows: int, itemsize: int, processors: int) -> list[GemvConfig]:
    """For a product [rows, features] x [features, columns]: the one to take, then what autotuning may try besides.

    All have the same number of parts, hence results of one shape. processors: of the device.
    """
    block_n = LINE_BYTES // itemsize
    parts = _parts(features, ceil_div(columns, block_n) * rows, processors)
    tiles = [(1, 1, 1), (1, 2, 2), (2, 1, 2), (1, 2, 1), (2, 1, 1)]
    configs = []
    for wider, taller, warps in tiles:
        block_k = BLOCK_K * taller
        chunk = round_up(ceil_div(features, parts), block_k)
        configs.append(GemvConfig(block_n * wider, block_k, WARPS * warps, parts, chunk))
    return configs


def packed_configs(lines: int, columns: int, rows: int, form: WeightFormat, processors: int) -> list[GemvConfig]:
    """The same for a packed weight of so many lines of codes. A tile is as many as share their scales.

    Codes of 4 bits make twice the columns of a line, each with a sum: they take twice the warps.
    """
    block_n, warps = LINE_BYTES * 8 // form.bits, WARPS * 4 // form.bits
    parts = _parts(lines, ceil_div(columns, block_n) * rows, processors)
    if ceil_div(columns, block_n) * rows * parts < MIN_PROGRAMS * processors:
        # even in all parts too few programs: half a line of memory each
        block_n, warps = block_n // 2, max(WARPS // 2, warps // 2)
    chunk = round_up(ceil_div(lines, parts), form.group)
    shapes = [(block_n, warps), (block_n, 2 * warps), (2 * block_n, 2 * warps)]
    return [GemvConfig(width, form.group, count, parts, chunk) for width, count in shapes]


def _parts(features: int, programs: int, processors: int) -> int:
    """In how many parts the features of a product are summed that takes so many programs in one."""
    parts = 1
    while 2 * parts <= MAX_PARTS and parts * programs < MIN_PROGRAMS * processors and features >= 2 * parts * MIN_CHUNK:
        parts *= 2
    return parts
