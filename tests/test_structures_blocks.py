"""What blocks are made of: fused weights, attention in its variants, blocks that are none; exact and rotated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.blocks import HEADS, HIDDEN, Attention, Block, D, Model, Norm, random_ids, rms
from tests.support.stages import check_graph
from tests.support.structures import adapters, check_decoder, online, rotated, sites


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Fused(nn.Module):
    """q, k and v, or gate and up, from one weight, taken apart by `parts`."""

    def __init__(self, parts: Callable[[Tensor], Any], inner: int) -> None:
        super().__init__()
        self.parts = parts
        self.fused, self.out = nn.Linear(D, inner), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.parts(self.fused(x))
        for other in others:
            first = torch.tanh(first) * other
        return self.out(first)


def grouped(fused: Tensor) -> Any:
    """Interleaved by head, as where several queries share a key."""
    heads = fused.unflatten(-1, (HEADS, 3, D // HEADS))
    return (heads[..., part, :].flatten(-2) for part in range(3))


TAKEN_APART: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "chunk": (lambda fused: fused.chunk(3, -1), 3),
    "split": (lambda fused: fused.split(D, dim=-1), 3),
    "uneven split": (lambda fused: (y := fused.split([D, 2 * D], -1))[:1] + y[1].split(D, -1), 3),
    "slices": (lambda fused: (fused[..., :D], fused[..., D : 2 * D], fused[..., -D:]), 3),
    "view and unbind": (lambda fused: fused.view(*fused.shape[:-1], 3, D).unbind(-2), 3),
    "groups": (grouped, 3),
    "every other": (lambda fused: (fused[..., ::2], fused[..., 1::2]), 2),
}


@pytest.mark.parametrize("name", TAKEN_APART)
def test_fused_weights(name: str) -> None:
    parts, count = TAKEN_APART[name]
    stages = check_decoder(Model(lambda: Block(lambda: Fused(parts, count * D))))
    assert "fused" in rotated(stages)


class InputMajor(nn.Module):
    """A linear whose weight is stored [in, out]."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(features, out) / 4), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class InputMajorMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = InputMajor(D, HIDDEN), InputMajor(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


def test_weights_stored_input_major() -> None:
    stages = check_decoder(Model(lambda: Block(mlp=InputMajorMlp)))
    assert sites(stages)["layers.0.mlp.fc.weight"]
    assert not sites(stages)["layers.0.mlp.proj.weight"]


class Gated(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.o(mixed * torch.sigmoid(self.gate(x)))


class Rotary(Attention):
    def project(self, x: Tensor) -> list[Tensor]:
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2 * HEADS)
        q, k, v = super().project(x)

        def turned(y: Tensor) -> Tensor:
            first, second = y.unflatten(-1, (HEADS, 2, -1)).unbind(-2)
            return y * angles.cos() + torch.stack([-second, first], -2).flatten(2) * angles.sin()

        return [turned(q), turned(k), v]


class OneHead(Attention):
    """Its values are as wide as the stream, and a share of them is handed from layer to layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.share = nn.Linear(D, D), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        v = v * self.share + (1 - self.share) * self.mine(x)
        return self.o((q @ k.mT / D**0.5).softmax(-1) @ v)


def alibi(scores: Tensor) -> Tensor:
    positions = torch.arange(scores.shape[-1])
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return scores - slopes * (positions[:, None] - positions)


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "plain": Attention,
    "q and k normed": lambda: Attention(queries=lambda: Norm(features=D // HEADS)),
    "soft cap": lambda: Attention(lambda scores: 3 * torch.tanh(scores / 3)),
    "linear biases": lambda: Attention(alibi),
    "output gate": Gated,
    "rotary": Rotary,
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    stages = check_decoder(Model(lambda: Block(ATTENTION[name])))
    assert rotated(stages) >= {"q", "k", "v"}


def test_values_of_one_head_are_a_stream_of_their_own() -> None:
    """They are added, mixed along tokens, and read by the projection out: in its basis, at no cost."""
    stages = check_graph(Model(lambda: Block(OneHead)), random_ids())
    assert [stream.features for stream in stages.facts.streams] == [D, D]
    assert rotated(stages) == {"q", "k", "v", "mine", "o", "gate", "up"}
    assert online(stages) == adapters()


class Convolution(nn.Module):
    """Gated short convolution along tokens, between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.along = nn.Conv1d(D, D, 3, padding=2, groups=D)

    def forward(self, x: Tensor) -> Tensor:
        b, c, y = self.enter(x).chunk(3, -1)
        mixed = self.along((b * y).mT)[..., : x.shape[1]].mT
        return self.leave(c * mixed)


class Recurrence(nn.Module):
    """A state that decays by what the token says, as a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.decay, self.leave = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.skip = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        decay = -F.softplus(self.decay(x)).cumsum(1)
        state = decay.exp() * ((-decay).exp() * self.enter(x)).cumsum(1)
        return self.leave(rms(state) + self.skip * x)


class Static(nn.Module):
    """Tokens are mixed by a learnt matrix; features by a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.leave = nn.Parameter(torch.randn(5, 5)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.tokens @ x))


@pytest.mark.parametrize("block", [Convolution, Recurrence, Static], ids=lambda block: block.__name__)
def test_blocks_that_are_no_attention(block: Callable[[], nn.Module]) -> None:
    stages = check_graph(Model(lambda: Block(block)), random_ids())
    names = {path.removesuffix(".weight").rpartition(".")[2]: basis for path, basis in sites(stages).items()}
    assert names.items() >= {"leave": False, "gate": True, "up": True, "down": False}.items()
    assert names.get("enter", True)
