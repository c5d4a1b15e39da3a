"""What the system is asked for: what stays in the process, in which pages, and that no value is lost with it."""

import gc
import mmap
import os
import platform
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import larosa_compile
from larosa_compile import memory
from larosa_compile.memory import return_mapped, use_huge_pages

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


PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def fresh(entries: int) -> torch.Tensor:
    """Memory that nobody had before: what malloc gives may be in huge pages already."""
    memory = mmap.mmap(-1, 4 * entries, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32).copy_(torch.randn(entries))


@pytest.fixture
def page() -> int:
    """The bytes of a huge page, where the system gives those that are asked for, at once, and no others."""
    version = tuple(int(number) for number in platform.release().split(".")[:2])
    if version < (6, 1) or "[madvise]" not in (PAGES / "enabled").read_text():
        pytest.skip("huge pages are given to all, to none, or later")
    return int((PAGES / "hpage_pmd_size").read_text())


def test_a_tensor_moves_into_huge_pages(page: int) -> None:
    values = fresh(page)  # four pages of them
    expected, before = values.sum(), huge_bytes()
    use_huge_pages([values, torch.empty(0), torch.ones(3), torch.empty(2**30, device="meta")])
    assert huge_bytes() - before >= 3 * page
    assert values.sum() == expected


def test_neighbours_share_huge_pages(page: int) -> None:
    values = fresh(page)
    parts, before = list(values.split(page // 40)), huge_bytes()
    use_huge_pages(parts[::2])
    assert huge_bytes() == before
    use_huge_pages(reversed(parts))
    assert huge_bytes() - before >= 3 * page


def test_who_wants_no_huge_pages_gets_none(page: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text(f"{page}\n")
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path)
    values, before = fresh(page), huge_bytes()
    use_huge_pages([values])
    (tmp_path / "enabled").unlink()  # a system without them
    use_huge_pages([values])
    assert huge_bytes() == before


def test_folded_weights_are_in_huge_pages(page: int) -> None:
    torch._dynamo.reset()
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64 * page // 1024
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(100, (1, 32))
    recipe = larosa_compile.calibrate(model, [ids], sparsity=0.5, progress=False)
    gc.collect()
    before = huge_bytes()
    fast = torch.compile(model, backend="larosa", options={"recipe": recipe, "lowering": "eager"})
    with torch.no_grad():
        fast(input_ids=ids)
    assert huge_bytes() - before >= 14 * page  # of the head's 16, which malloc never has left over
