"""How the tests run: cores shared between processes, the longest files first; and what many of them need."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache


def pytest_configure() -> None:
    """Processes that run side by side share the cores, where each would take all of them and wait for the others."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


LONGEST = ("test_smollm2.py", "test_backend.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: with several processes, whatever starts last is what the others wait for."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that another test compiled or counted, and nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No kernel that another test compiled, the same random numbers every time, and no gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with fresh_cache(), torch.no_grad():
        yield
