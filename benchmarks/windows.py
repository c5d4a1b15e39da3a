"""Windows of text: some to learn from, others to evaluate on, and what differs between two runs on them."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import assets
from larosa_compile.calibration import token_batches


def windows_of(name: str, tokenizer: Any, context: int) -> list[Tensor]:
    """All whole windows `[1, context]` of one of our texts, or of a file, without overlap."""
    text = Path(name).read_text(encoding="utf-8") if Path(name).is_file() else assets.text(name)
    return list(token_batches(text, tokenizer, context))


def halves_of(names: Iterable[str], tokenizer: Any, context: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Of each text the windows to learn from and those to evaluate on, so that one text may serve both."""
    halves = {}
    for name in set(names):
        windows = windows_of(name, tokenizer, context)
        middle = len(windows) // 2
        halves[name] = windows[:middle], windows[middle:]
    return halves


def in_turn(texts: Sequence[list[Tensor]]) -> list[Tensor]:
    """A window of every text, then the next of every text, as long as all have one."""
    return [window for windows in zip(*texts, strict=False) for window in windows]


def paired(losses: list[float], base: list[float]) -> tuple[float, float]:
    """Mean difference of two methods' losses on the same windows, and its standard error."""
    differences = [loss - other for loss, other in zip(losses, base, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
