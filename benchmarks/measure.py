"""What every benchmark shares: the machine, its bandwidth, medians with spread, and the JSON file."""

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

READ_BYTES = 256 * 2**20
"""Larger than any last-level cache this is run on."""


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated measurements of one quantity."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))


def bandwidth_gb_s(repeats: int = 7) -> float:
    """Read bandwidth: the median of summing a buffer larger than the cache, in 10⁹ bytes per second."""
    buffer = torch.ones(READ_BYTES // 4)
    seconds = [_seconds(buffer.sum) for _ in range(repeats + 1)][1:]
    return READ_BYTES / statistics.median(seconds) / 1e9


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """The `meta` of a benchmark file: device, threads, versions, date, commit, measured bandwidth."""
    return {
        "device": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "bandwidth_gb_s": round(bandwidth_gb_s(), 1),
    }


def write(path: Path, meta: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Writes `{"meta": …, "records": […]}`; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"
