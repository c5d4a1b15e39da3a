"""Work splitting for the CPU templates: pure functions of static shapes."""

# A part is whole cache lines of the output (32 two-byte values), so that no two threads write one line.
COLUMN_MULTIPLE = 32
# float32 accumulators of one chunk fill at most 16 KiB: they stay in L1 while weight rows stream past.
MAX_CHUNK_COLUMNS = 4096
# Below this many weight bytes one core is done before a second one has been woken.
MIN_PARALLEL_BYTES = 128 * 1024
# Likewise for elementwise selection, counted in entries.
MIN_PARALLEL_ENTRIES = 8 * 1024


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b, for positive b."""
    return -(-a // b)


def gemv_threads(k: int, columns: int, itemsize: int, max_threads: int) -> int:
    """Threads for a GEMV that reads `k` weight rows of `columns` values: either one or all.

    Nothing in between: GNU OpenMP ends the threads that a smaller team leaves over and starts them anew later,
    while a team of one leaves the pool alone.
    """
    return max_threads if k * columns * itemsize >= MIN_PARALLEL_BYTES else 1


def gemv_split(columns: int, threads: int) -> tuple[int, int]:
    """How `threads` share `columns`: (columns per part, columns per chunk of a part)."""
    part = ceil_div(ceil_div(columns, threads), COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    chunks = ceil_div(part, MAX_CHUNK_COLUMNS)
    chunk = ceil_div(ceil_div(part, chunks), COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    return part, chunk
