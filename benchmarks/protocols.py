"""Which tokens of a sequence are sparse: all, all but the first, or those behind a dense half."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from larosa_compile.caches import CACHE

ALL = "all"
PROTOCOLS = (ALL, "first-dense", "decode")
"""Every token is sparse; the first goes through the dense model, the others go on from its cache; so does the first
half."""


def dense_tokens(protocol: str, tokens: int) -> int:
    """How many of so many tokens a protocol leaves to the dense model."""
    return {ALL: 0, "first-dense": 1, "decode": tokens // 2}[protocol]


def begun_dense(model: Callable[..., Any], dense: Callable[..., Any], protocol: str) -> Callable[..., Any]:
    """A model of token ids `[batch, tokens]` that leaves its first tokens to `dense`, as many as the protocol says, and
    goes on from its cache. It gives logits `[batch, tokens, vocabulary]` and no cache.
    """

    def begun(input_ids: Tensor, **_: Any) -> CausalLMOutput:
        first = max(1, dense_tokens(protocol, input_ids.shape[1]))  # one token has no half
        before = dense(input_ids=input_ids[:, :first], use_cache=True)
        if first == input_ids.shape[1]:
            return CausalLMOutput(logits=before.logits)
        after = model(input_ids=input_ids[:, first:], **{CACHE: before[CACHE]}, use_cache=True)
        return CausalLMOutput(logits=torch.cat([before.logits, after.logits], 1))

    return model if protocol == ALL else begun
