"""The progress bar: quiet where nobody looks, and not silenced with others where somebody does."""

import contextlib
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from larosa_compile.progress import RateColumn, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, wanted: bool) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(wanted) as bar:
        task = bar.add_task("folding", total=3)
        with contextlib.redirect_stderr(io.StringIO()):
            bar.advance(task, 2)
            bar.refresh()
    return stream.getvalue()


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), True) == shown(monkeypatch, Terminal(), False) == ""
    seen = shown(monkeypatch, Terminal(), True)
    assert "folding" in seen and "2/3" in seen and "left" in seen


@pytest.mark.parametrize(("speed", "expected"), [(None, ""), (2.55, "2.5/s"), (1.0, "1.0/s"), (0.25, "4.0 s each")])
def test_rates_are_numbers_above_one(speed: float | None, expected: str) -> None:
    task: Any = SimpleNamespace(finished_speed=None, speed=speed)
    assert RateColumn().render(task).plain == expected
