"""What the system is asked for about memory: to take back what is not needed, and for larger pages (Linux)."""

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
    if not _MAPS.exists():
        return
    ranges = sorted((int(found[1], 16), int(found[2], 16)) for found in map(_FILE.match, _lines()) if found)
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        place = bisect_right(ranges, (start, sys.maxsize)) - 1
        if place >= 0 and end <= ranges[place][1]:
            _advise_whole(start, end, mmap.PAGESIZE, _PAGEOUT if written else mmap.MADV_DONTNEED)


_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1; older kernels refuse it, and give who asks for huge pages some in their own time."""

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Moves CPU tensors into huge pages, as far as neighbouring ones fill whole pages together; others stay.

    A product reads rows from all over a weight, so with small pages it looks up an address for every row or two, which
    in a virtual machine goes through two tables. Nothing happens where the system has none, or is set to give none.
    """
    size = _huge_page_size()
    if not size:
        return
    for first, last in _joined(_pages(tensor) for tensor in tensors if tensor.device.type == "cpu"):
        _advise_whole(first, last, size, mmap.MADV_HUGEPAGE)
        _advise_whole(first, last, size, _COLLAPSE)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses in as few ranges as there can be."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined


def _huge_page_size() -> int:
    """In bytes; 0 where none may be had."""
    try:
        if "[never]" in (_HUGE_PAGES / "enabled").read_text(encoding="ascii"):
            return 0
        return int((_HUGE_PAGES / "hpage_pmd_size").read_text(encoding="ascii"))
    except OSError:
        return 0


def _pages(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first page that holds values of a contiguous tensor, and behind the last."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return start // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def _advise_whole(start: int, end: int, page: int, advice: int) -> None:
    """Advises on the pages of so many bytes that lie between two addresses as a whole."""
    advise, first, last = _libc("madvise"), -(-start // page) * page, end // page * page
    if advise is not None and first < last:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _lines() -> list[str]:
    return _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()


def _libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
