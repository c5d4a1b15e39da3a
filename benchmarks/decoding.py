"""Greedy decoding of one sequence through a static cache, timed token by token."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from benchmarks.measure import Spread

Forward = Callable[..., Any]


def decode_seconds(model: PreTrainedModel, forward: Forward, prompt: torch.Tensor, tokens: int) -> list[float]:
    """Seconds of each decoded token; the prompt `[1, length]` is processed by the eager model and not timed."""
    length = prompt.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + 128)
    assert tokens <= 128
    seconds = []
    with torch.no_grad():
        step = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        for index in range(tokens):
            position = torch.tensor([[length + index]])
            start = time.perf_counter()
            output = forward(input_ids=step, past_key_values=cache, use_cache=True, position_ids=position)
            step = output.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
    return seconds


def compare(
    model: PreTrainedModel,
    variants: dict[str, Forward],
    prompt: torch.Tensor,
    tokens: int,
    rounds: int,
    done: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, Spread]]:
    """Variant -> (seconds to its first tokens, compile included; spread of the seconds per token over all rounds).

    The variants take turns, so that a machine that slows down slows all of them down.
    """
    warm = {}
    for name, forward in variants.items():
        start = time.perf_counter()
        decode_seconds(model, forward, prompt, 4)
        warm[name] = time.perf_counter() - start
        done()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, forward in variants.items():
            # the first token of a turn finds the caches full of the other variant's weights
            seconds[name] += decode_seconds(model, forward, prompt, tokens + 1)[1:]
            done()
    return {name: (warm[name], Spread.of(values)) for name, values in seconds.items()}
