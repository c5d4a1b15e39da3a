"""Fixtures that more than one test module uses."""

from pathlib import Path

import pytest

from benchmarks import assets


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; an error that says `make install` when it is missing."""
    return assets.smollm2_path()
