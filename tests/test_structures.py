"""What blocks are built like: each structure alone, through every pass, exact, and rotated where it can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.blocks import HEADS, HIDDEN, Attention, Block, D, Mixer, Mlp, Model, Norm, random_ids, rms
from tests.support.stages import Stages, check_graph
from tests.support.structures import check_decoder, online, rotated, sites


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Branches(Block):
    """`combine(self, x)` on a block's parts."""

    def __init__(self, combine: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.combine = combine
        self.gain_1, self.gain_2 = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.rand(D) + 0.5)
        self.post_1, self.post_2 = Norm(), Norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)


def multipliers(m: Any, x: Tensor) -> Tensor:
    x = 2 * x + 0.5 * m.attn(m.norm_1(x))
    return x - m.mlp(m.norm_2(x)) * 0.3


def centred_residual(m: Any, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm_1(x))
    x = x - x.mean(-1, keepdim=True) + 1
    return x + m.mlp(m.norm_2(x))


def token_shift(m: Any, x: Tensor) -> Tensor:
    y = m.norm_1(x)
    x = x + m.attn(torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1))
    return x + m.mlp(F.pad(m.norm_2(x), (0, 0, 1, -1)))


def row_gates(m: Any, x: Tensor) -> Tensor:
    x = x + torch.sigmoid(x.norm(dim=-1, keepdim=True)) * m.attn(m.norm_1(x))
    return torch.where(x.pow(2).sum(-1, keepdim=True) > D, x, x + m.mlp(m.norm_2(x)))


def some_tokens(m: Any, x: Tensor) -> Tensor:
    picked = torch.tensor([0, 2, 3])
    y = x[:, picked]
    x = x.index_copy(1, picked, y + m.attn(m.norm_1(y)))
    return x + m.mlp(m.norm_2(x))


def last_token(m: Any, x: Tensor) -> Tensor:
    x = x[:, -1:] + m.attn(m.norm_1(x))[:, -1:]
    return x + m.mlp(m.norm_2(x))


@pytest.mark.parametrize(
    "layout",
    [multipliers, centred_residual, token_shift, row_gates, some_tokens, last_token],
    ids=lambda layout: layout.__name__,
)
def test_layouts(layout: Callable[[Any, Tensor], Tensor]) -> None:
    check_decoder(Model(lambda: Branches(layout)))


def two_norms(m: Any, x: Tensor) -> Tensor:
    return m.mlp(m.norm_2(x)) + m.attn(m.norm_1(x)) + x


def test_layers_have_bases_of_their_own() -> None:
    check_decoder(Model(lambda: Branches(multipliers), layers=3))
    assert len(online(check_graph(Model(lambda: Branches(two_norms), layers=2), random_ids()))) == 3


def masked_entries(m: Any, x: Tensor) -> Tensor:
    """Entries of rotated rows are others than those of the model's: nothing here commutes with a rotation."""
    x = x + m.attn(m.norm_1(x))
    x = x.clone()
    x[x > 1] = 0
    return x + m.mlp(m.norm_2(x))


def mixed_features(m: Any, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm_1(x))
    halves = x.chunk(2, -1)
    x = torch.cat([halves[1], halves[0]], -1) + x.flip(-1) + F.gelu(x)
    return x + m.mlp(m.norm_2(x))


def square(m: Any, x: Tensor) -> Tensor:
    """As many tokens as features, and what would be wrong only then."""
    x = x.repeat(1, 8, 1)[:, :D]
    x = x + m.attn(m.norm_1(x)) + x.mT
    x = x @ (x.mT @ x).softmax(-1) / 4 + (x @ x) / 9
    return x + m.mlp(m.norm_2(x))


def squared_row_factor(m: Any, x: Tensor) -> Tensor:
    row = x[..., :1].expand(x.shape)
    x = x + row * row + m.attn(m.norm_1(x))
    return x + row / row + m.mlp(m.norm_2(x))


def whole_numbers(m: Any, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm_1(x))
    x = x * (1 + x.sum(-1, keepdim=True, dtype=torch.int64)) / (1 + (x * x).sum(-1, keepdim=True, dtype=torch.int64))
    return x + m.mlp(m.norm_2(x))


def eight_bits(m: Any, x: Tensor) -> Tensor:
    """Rounding to three bits of mantissa is no rounding error."""
    x = x + m.attn(m.norm_1(x).to(torch.float8_e4m3fn).to(x.dtype))
    return x + m.mlp(m.norm_2(x))


def computed_weight(m: Any, x: Tensor) -> Tensor:
    """A product of parameters is a weight, not a linear that reads a weight."""
    x = x + m.attn(m.norm_1(x))
    return x + m.norm_2(x) @ (m.mlp.gate.weight.T @ m.mlp.down.weight.T)


@pytest.mark.parametrize(
    "layout",
    [masked_entries, mixed_features, square, squared_row_factor, whole_numbers, eight_bits, computed_weight],
    ids=lambda layout: layout.__name__,
)
def test_what_commutes_with_no_rotation_is_left_alone(layout: Callable[[Any, Tensor], Tensor]) -> None:
    check_graph(Model(lambda: Branches(layout)), random_ids())


def sandwich(m: Any, x: Tensor) -> Tensor:
    x = x + m.post_1(m.attn(m.norm_1(x)))
    return x + m.post_2(m.mlp(m.norm_2(x)))


def layer_scale(m: Any, x: Tensor) -> Tensor:
    x = x + m.gain_1 * m.attn(m.norm_1(x))
    return x + m.gain_2 * m.mlp(m.norm_2(x))


def post_norm(m: Any, x: Tensor) -> Tensor:
    x = m.norm_1(x + m.attn(x))
    return m.norm_2(x + m.mlp(x))


def one_norm(m: Any, x: Tensor) -> Tensor:
    y = m.norm_1(x)
    return x + m.attn(y) + m.mlp(y)


@pytest.mark.parametrize(
    ("layout", "count"),
    [(sandwich, 2), (layer_scale, 2), (post_norm, 2), (one_norm, 1)],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("layers", [1, 2])
def test_where_it_costs_less_readers_rotate_what_they_read(
    layout: Callable[[Any, Tensor], Tensor], count: int, layers: int
) -> None:
    """A scale along features between writer and stream hides the writer: a rotated stream would have to rotate every
    scaled value. Where a layer reads the stream once, a rotated one would cost one more, on its way out.
    """
    stages = check_graph(Model(lambda: Branches(layout), layers), random_ids())
    assert rotated(stages) == {"q", "k", "v", "gate", "up"}
    assert len(online(stages)) == count * layers
    assert all(start is None for start, _ in online(stages))


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


def test_a_block_may_be_used_again() -> None:
    block = Block(Mixer, Mlp)
    stages: Stages = check_graph(Model(lambda: block, layers=3), random_ids())
    assert len(stages.plan.sites) == 3 * 4
    assert rotated(stages) == {"q", "k", "v", "gate", "up"}
