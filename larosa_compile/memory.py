"""Memory handed back to the system: what was freed, and what can be read from its file again (Linux)."""

import ctypes
import mmap
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_FILE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +/")
"""A line of it about memory that a file backs: first address, end."""


def return_freed() -> None:
    """Has the allocator hand freed memory to the system, where it can be asked to (glibc).

    Left to itself it keeps what was freed from between memory in use, which here is a second copy of the model.
    """
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


_PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4, which Python 3.11 has no name for; older kernels refuse it, and nothing happens."""


def return_mapped(tensors: Iterable[Tensor], written: bool = False) -> None:
    """Takes what was read of tensors in mapped files out of the process; whoever reads it again finds it in the file.

    written: whether somebody may have written to them since. What was written is kept then, and the file's pages leave
    the system's cache as well. Tensors in other memory are left alone, and so are pages that they share with others.
    """
    advise = _libc("madvise")
    if advise is None or not _MAPS.exists():
        return
    ranges = sorted((int(found[1], 16), int(found[2], 16)) for found in map(_FILE.match, _lines()) if found)
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        place = bisect_right(ranges, (start, sys.maxsize)) - 1
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if place >= 0 and end <= ranges[place][1] and first < last:
            advice = _PAGEOUT if written else mmap.MADV_DONTNEED
            advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _lines() -> list[str]:
    return _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()


def _libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
