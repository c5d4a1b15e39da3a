"""What every benchmark shares: the machine, its bandwidth, medians with spread, and the JSON file."""

import argparse
import contextlib
import datetime
import importlib.util
import json
import re
import resource
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from larosa_compile.machine import Bandwidth, cpuinfo, device_name

_VECTOR_FLAG = re.compile(r"avx2|avx512\w*|amx\w*|asimd|neon|sve\w*")


def bandwidth_gb_s(repeats: int = 7) -> float:
    """Read bandwidth: the median of summing a buffer larger than the cache, in 10⁹ bytes per second."""
    bandwidth = Bandwidth()
    for _ in range(repeats):
        bandwidth.sample()
    return bandwidth.taken().median


def peak_rss_mb() -> float:
    """The most memory that this process has had since it began, or since `forget_peak`, in 10⁶ bytes."""
    peak = _status_mb("VmHWM")
    # ru_maxrss second: on Linux a process begins with that of the one that started it
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 if peak is None else peak


def forget_peak() -> None:
    """Lets `peak_rss_mb` start from the memory that the process has now, where Linux does that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def rss_mb() -> float | None:
    """The memory that this process has now, in 10⁶ bytes; None where the system does not say."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float | None:
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name)), None)


@dataclass(frozen=True)
class Line:
    """`y = slope · x + intercept` by least squares; `r2` is the share of y's variance that it explains."""

    slope: float
    intercept: float
    r2: float

    @classmethod
    def through(cls, x: list[float], y: list[float]) -> "Line | None":
        """The line through points; None where there are fewer than three, or all x are equal."""
        if len(x) < 3 or min(x) == max(x):
            return None
        slope, intercept = statistics.linear_regression(x, y)
        return cls(slope, intercept, statistics.correlation(x, y) ** 2 if min(y) < max(y) else 1.0)


def machine() -> dict[str, Any]:
    """The `meta` of a benchmark file: device, its vector flags, threads, versions (triton's or None), date, commit,
    measured bandwidth."""
    return {
        "device": device_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": vector_flags(cpuinfo()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "bandwidth_gb_s": round(bandwidth_gb_s(), 1),
    }


def in_a_line(meta: dict[str, Any]) -> str:
    """What a reader of a table has to know of `machine()`."""
    return f"{meta['device']}, {meta['threads']} threads; torch {meta['torch']}, transformers {meta['transformers']}"


def write(path: Path, meta: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Writes `{"meta": …, "records": […]}`; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n", encoding="utf-8")


def write_so_far(path: Path | None, meta: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """`write` for a run that goes on: whoever reads or interrupts meanwhile finds a whole file."""
    if path is not None:
        beside = path.with_name(path.name + ".tmp")
        write(beside, meta, records)
        beside.replace(path)


def recorded(
    path: Path | None, meta: dict[str, Any], described: dict[str, Any], found: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What a run finds, each with what all have in common, written to a file as it comes."""
    records: list[dict[str, Any]] = []
    for record in found:
        records.append(described | record)
        write_so_far(path, meta, records)
    return records


def sparsity(text: str) -> float:
    """An argument in [0, 1), for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a sparsity lies in [0, 1), got {text!r}")
    return value


def positive(text: str) -> int:
    """An argument that is a whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def vector_flags(cpuinfo: list[str]) -> list[str]:
    """The flags of vector units in the lines of /proc/cpuinfo (x86: flags; ARM: Features)."""
    lines = [line.partition(":")[2] for line in cpuinfo if line.startswith(("flags", "Features"))]
    return sorted(flag for flag in set(lines[0].split() if lines else []) if _VECTOR_FLAG.fullmatch(flag))


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"
