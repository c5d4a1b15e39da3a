"""Memory handed back: what stays in the process, and that no value is lost with it."""

import os
import sys
from pathlib import Path

import pytest
import torch

from larosa_compile.memory import return_mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")

ENTRIES = 4 * 1024 * 1024


def resident_bytes_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def test_a_mapped_tensor_leaves_the_process_and_comes_back(tmp_path: Path) -> None:
    kept = torch.randn(ENTRIES)
    path = tmp_path / "mapped"
    kept.numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=ENTRIES, dtype=torch.float32)
    assert torch.equal(mapped, kept)
    before = resident_bytes_of_files()
    # from within a page to within another, as tensors lie in a file of several
    return_mapped([mapped[100:-100]])
    assert before - resident_bytes_of_files() > 0.9 * mapped.nbytes
    assert torch.equal(mapped, kept)


def test_memory_without_a_file_is_left_alone() -> None:
    values = torch.randn(ENTRIES)
    expected = values.sum()
    return_mapped([values, torch.empty(0), torch.ones(3)])
    assert values.sum() == expected


def test_what_was_written_to_a_mapped_tensor_stays(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    with path.open("wb") as file:
        torch.randn(ENTRIES).numpy().tofile(file)
        file.flush()
        os.fsync(file)  # what is not on the disk yet cannot be dropped
    mapped = torch.from_file(str(path), shared=False, size=ENTRIES, dtype=torch.float32)
    mapped[5000], expected = 7.0, mapped.clone()
    expected[5000] = 7.0
    before = resident_bytes_of_files()
    return_mapped([mapped], written=True)
    # the system may keep what it holds in one piece with the page that was written
    assert before - resident_bytes_of_files() > 0.5 * mapped.nbytes
    assert torch.equal(mapped, expected)
