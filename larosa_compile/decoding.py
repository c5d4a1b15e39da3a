"""Greedy decoding of one sequence through a static cache, timed token by token; forwards take turns."""

import copy
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from larosa_compile.caches import CACHE

Forward = Callable[..., Any]

ROOM = 128
"""Tokens that a cache has room for behind the prompt."""


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


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the most likely tokens `[...]` of logits `[..., vocabulary]`.

    argmax would say the same, but takes four times as long in bfloat16: 0.46 ms for 128,256 tokens, 1 % of a step.
    """
    return logits.max(-1).indices


@dataclass(frozen=True)
class Prompt:
    """A prompt that the eager model has read: its length, the cache, and the token `[1, 1]` that comes next."""

    length: int
    cache: StaticCache
    token: torch.Tensor

    @classmethod
    def read_by(cls, model: PreTrainedModel, ids: torch.Tensor) -> "Prompt":
        """ids: [1, length]."""
        length = ids.shape[1]
        cache = StaticCache(config=model.config, max_cache_len=length + ROOM)
        # all logits of a long prompt would be the largest tensor of the process
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            output = model(input_ids=ids, **{CACHE: cache}, use_cache=True, **last)
        return cls(length, cache, likeliest(output.logits[:, -1:]))

    def decode_seconds(self, forward: Forward, tokens: int) -> list[float]:
        """Seconds of each decoded token; every call starts behind the prompt, with a copy of its cache."""
        if tokens > ROOM:
            raise ValueError(f"the cache has room for {ROOM} tokens behind the prompt, got {tokens}")
        cache, step = copy.deepcopy(self.cache), self.token
        seconds = []
        with torch.no_grad():
            for index in range(tokens):
                position = torch.tensor([[self.length + index]], device=step.device)
                start = time.perf_counter()
                output = forward(input_ids=step, **{CACHE: cache}, use_cache=True, position_ids=position)
                step = likeliest(output.logits[:, -1:])
                if step.device.type != "cpu":
                    torch.accelerator.synchronize(step.device)
                seconds.append(time.perf_counter() - start)
        return seconds


def decode_seconds(model: PreTrainedModel, forward: Forward, prompt: torch.Tensor, tokens: int) -> list[float]:
    """Seconds of each decoded token; the prompt `[1, length]` is processed by the eager model and not timed."""
    return Prompt.read_by(model, prompt).decode_seconds(forward, tokens)


def compare(
    model: PreTrainedModel,
    variants: dict[str, Forward],
    prompt: torch.Tensor,
    tokens: int,
    rounds: int,
    done: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, Spread]]:
    """Variant -> (seconds to its first tokens, compile included; spread of the seconds per token over all rounds).

    The variants take turns, so that a machine that slows down slows all of them down. `done` is called after every
    turn, `between` after those that are timed.
    """
    read = Prompt.read_by(model, prompt)
    warm = {}
    for name, forward in variants.items():
        start = time.perf_counter()
        read.decode_seconds(forward, 4)
        warm[name] = time.perf_counter() - start
        done()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, forward in variants.items():
            # the first token of a turn finds the caches full of the other variant's weights
            seconds[name] += read.decode_seconds(forward, tokens + 1)[1:]
            between()
            done()
    return {name: (warm[name], Spread.of(values)) for name, values in seconds.items()}
