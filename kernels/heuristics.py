"""Work splitting for the CPU templates: pure functions of static shapes."""

# Whole vectors of every dtype and whole cache lines of every result: no two threads write one line.
COLUMN_MULTIPLE = 64
# Columns whose float32 sums (64 KiB) stay in a second-level cache while weight rows stream past.
MAX_CHUNK_COLUMNS = 16384
# Columns of a result that are finished, and stored, at a time.
MAX_TILE_COLUMNS = 1024
# Rows that share one pass over the weight rows that any of them keeps. In a sketch (50 %, 2048 x 16384, Zen 4) six took
# 15 % less time so than as a product of many rows, eight 10 % more in bfloat16, as much in int8, 20 % less in int4.
MAX_GEMV_ROWS = 8
# Weight rows that are read side by side: each is a run of memory of its own, and one run alone does not keep enough
# misses in flight. Eight and more read as fast as a plain sum does with as many runs.
WEIGHT_ROWS_AT_A_TIME = 8
# Of a product of many rows: columns and features of a weight that are brought into another order at a time (256 KiB),
# rows that all meet them before the next ones come (256 KiB of sums), and rows of one call.
PANEL_COLUMNS, PANEL_FEATURES, CHUNK_ROWS, BLOCK_ROWS = 128, 1024, 512, 128
# Features whose part of a panel is prefetched while as many before them are brought: short runs, far from each other.
PREFETCHED_FEATURES = 32
# Below this many weight bytes one core is done before a second one has been woken.
MIN_PARALLEL_BYTES = 128 * 1024
# Likewise for elementwise selection, counted in entries.
MIN_PARALLEL_ENTRIES = 8 * 1024
# Bytes of keys and values from which attention gets a kernel of its own. The operations of a smaller one are fused with
# the rotary embedding before it. Measured at 0.2 MB (where a kernel costs more) and at 4 MB; between them an estimate.
MIN_ATTENTION_BYTES = 512 * 1024
# Keys of a cache that one thread goes through at a time: enough to sum over, few enough for all threads to get some.
ATTENTION_BLOCK = 64
# Heads whose sums stay in registers while the keys that they share stream past.
MAX_HEADS_TOGETHER = 8


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b, for positive b."""
    return -(-a // b)


def gemv_threads(weight_bytes: int, max_threads: int) -> int:
    """Threads for a GEMV that reads so many bytes of weights: either one or all.

    Nothing in between: GNU OpenMP ends the threads that a smaller team leaves over and starts them anew later,
    while a team of one leaves the pool alone.
    """
    return max_threads if weight_bytes >= MIN_PARALLEL_BYTES else 1


def round_up(count: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= `count`."""
    return ceil_div(count, multiple) * multiple


def gemv_chunk(columns: int, rows: int = 1, multiple: int = COLUMN_MULTIPLE) -> int:
    """Columns of every weight row that are read before the next row, for `rows` rows of sums; whole multiples."""
    chunks = ceil_div(columns * rows, MAX_CHUNK_COLUMNS)
    return round_up(ceil_div(columns, chunks), multiple)


def gemm_chunk(rows: int | None) -> int:
    """Rows that meet a panel of a weight before the next panel comes; rows is None where they are not known."""
    return CHUNK_ROWS if rows is None else min(rows, CHUNK_ROWS)


def heads_together(sharing: int) -> int:
    """How many of the heads that share keys go through them at once: the most that divides them."""
    return max(count for count in range(1, MAX_HEADS_TOGETHER + 1) if sharing % count == 0)


def gemv_tile(columns: int, threads: int) -> int:
    """Columns of the result that one thread finishes at a time, such that all threads get some."""
    return min(round_up(ceil_div(columns, threads), COLUMN_MULTIPLE), MAX_TILE_COLUMNS)
