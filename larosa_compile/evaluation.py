"""How well a model predicts text: the one number behind perplexity tables and the coefficient search."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SLICE = 2**22
"""Logits that are widened at a time: fresh memory for all of them would cost more than the arithmetic on them."""


def next_token_losses(model: Callable[..., Any], batches: Iterable[Tensor], *, counted_from: int = 0) -> list[float]:
    """Mean cross-entropy in nats of next tokens, one number per batch of token ids [batch, tokens].

    Every token is processed in one forward call, so a sparse model is sparse at every token.

    Args:
        counted_from: the first position whose prediction counts.
    """
    losses = []
    with torch.no_grad():
        for ids in batches:
            logits = model(input_ids=ids, use_cache=False).logits
            logits, wanted = logits[:, counted_from:-1].flatten(0, 1), ids[:, counted_from + 1 :].flatten()
            rows = max(1, SLICE // logits.shape[-1])
            parts = zip(logits.split(rows), wanted.split(rows), strict=True)
            sums = [torch.nn.functional.cross_entropy(part.float(), ids, reduction="sum") for part, ids in parts]
            losses.append(torch.stack(sums).double().sum().item() / len(wanted))
    return losses


def perplexity(losses: list[float]) -> float:
    """`exp` of the mean loss; losses of windows of one length."""
    return math.exp(sum(losses) / len(losses))
