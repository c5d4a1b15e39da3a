"""Parts of small models. A structure under test is one of them with a piece exchanged."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HIDDEN, HEADS, VOCAB = 16, 24, 2, 40

Normed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What a norm makes of x, a scale and a shift along its features."""


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    """Scale away from one, shift away from zero."""

    def __init__(self, normed: Normed = lambda x, scale, shift: rms(x) * scale, features: int = D) -> None:
        super().__init__()
        self.normed = normed
        self.scale, self.shift = nn.Parameter(torch.rand(features) + 0.5), nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x, self.scale, self.shift)


class Attention(nn.Module):
    """Causal attention. `scores` may change the scores [batch, heads, tokens, tokens], `queries` q and k."""

    def __init__(
        self, scores: Callable[[Tensor], Tensor] = lambda s: s, queries: Callable[[], nn.Module] = nn.Identity
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=name in "qo") for name in "qkvo")
        self.q_norm, self.k_norm = queries(), queries()
        self.scores = scores

    def project(self, x: Tensor) -> Iterable[Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        heads = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.project(x)]
        q, k, v = self.q_norm(heads[0]), self.k_norm(heads[1]), heads[2]
        scores = self.scores(q @ k.mT / (D // HEADS) ** 0.5)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).tril().logical_not()
        mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2), x)

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.o(mixed)


class Mixer(nn.Module):
    """What stands in for attention where that is not the subject: gated running sums along tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=name in "qvo") for name in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) * self.k(x)).cumsum(1) * self.v(x))


class Mlp(nn.Module):
    """Gated."""

    def __init__(self, inner: int = HIDDEN) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Branch(nn.Module):
    """The least that reads a stream and writes to it."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, inner), nn.Linear(inner, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    """Pre-norm. `attn` and `mlp` map [batch, tokens, features] to itself."""

    def __init__(
        self,
        attn: Callable[[], nn.Module] = Mixer,
        mlp: Callable[[], nn.Module] = Mlp,
        norm: Callable[[], nn.Module] = Norm,
    ) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm_1, self.norm_2 = attn(), mlp(), norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Function(nn.Module):
    """`function(self, *inputs)` over the modules and parameters that it is given by name."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


class Model(nn.Module):
    """Ids [batch, tokens] -> logits, through blocks between an embedding and a head."""

    def __init__(
        self,
        block: Callable[[], nn.Module] = Block,
        layers: int = 1,
        embed: Callable[[], nn.Module] = lambda: nn.Embedding(VOCAB, D),
        norm: Callable[[], nn.Module] = Norm,
        head: Callable[[], nn.Module] = lambda: nn.Linear(D, VOCAB, bias=False),
    ) -> None:
        super().__init__()
        self.embed, self.layers, self.norm, self.head = embed(), nn.ModuleList(), norm(), head()
        self.layers.extend(block() for _ in range(layers))

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        found = self.head(self.norm(x))
        return found if isinstance(found, tuple) else (found,)


def random_ids(batch: int = 2, tokens: int = 5) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens))


def small_block(norm: Callable[[], nn.Module] = Norm) -> Block:
    """Two branches that make up one layer, for their shapes differ."""
    return Block(lambda: Branch(HIDDEN), lambda: Branch(HIDDEN - 4), norm)
