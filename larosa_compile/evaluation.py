"""How well a model predicts text: the one number behind perplexity tables and the coefficient search."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def next_token_losses(model: Callable[..., Any], batches: Iterable[Tensor]) -> list[float]:
    """Mean cross-entropy in nats of all next tokens, one number per batch of token ids [batch, tokens].

    Every token is processed in one forward call, so a sparse model is sparse at every token.
    """
    losses = []
    with torch.no_grad():
        for ids in batches:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
    return losses


def perplexity(losses: list[float]) -> float:
    """`exp` of the mean loss; losses of windows of one length."""
    return math.exp(sum(losses) / len(losses))
