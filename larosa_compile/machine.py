"""The machine that a measurement was taken on: its name, and how fast it reads memory."""

import platform
import time
from pathlib import Path

import torch

from larosa_compile.decoding import Spread
from larosa_compile.memory import use_huge_pages


def last_level_cache_bytes(listed: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Of the largest cache that Linux lists for the first processor; 0 where none is."""
    sizes = [file.read_text(encoding="ascii").strip() for file in listed.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 2**10 for size in sizes), default=0)


READ_BYTES = max(256 * 2**20, 2 * last_level_cache_bytes())
"""Of a buffer that no cache holds: shared ones of server processors have grown to hundreds of megabytes."""


class Bandwidth:
    """Read bandwidth, sampled between other measurements: on a shared machine it moves while they run.

    A sample also leaves nothing of what ran before it in the caches.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._buffer = torch.ones(READ_BYTES // 4, device=device)
        use_huge_pages([self._buffer])  # as folded weights are
        self._samples: list[float] = []
        self._pass()  # the first pass over new memory is a slow one

    def sample(self) -> None:
        """Sums the buffer once."""
        self._samples.append(READ_BYTES / self._pass() / 1e9)

    def taken(self) -> Spread:
        """10⁹ bytes per second over the samples since this was last asked for."""
        samples, self._samples = self._samples, []
        return Spread.of(samples)

    def _pass(self) -> float:
        start = time.perf_counter()
        self._buffer.sum()
        if self._buffer.device.type != "cpu":
            torch.accelerator.synchronize(self._buffer.device)
        return time.perf_counter() - start


def cpuinfo() -> list[str]:
    """The lines of `/proc/cpuinfo`; none where there is no such file."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def device_name(device: torch.device | None = None) -> str:
    """What the maker calls a device; by default the processor."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
