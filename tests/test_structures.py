"""What blocks are built like: each structure alone, through every pass, exact, and rotated where it can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.blocks import Block, D, Mixer, Mlp, Model, Norm, random_ids
from tests.support.stages import Stages, check_graph
from tests.support.structures import check_decoder, online, rotated


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


def test_a_block_may_be_used_again() -> None:
    block = Block(Mixer, Mlp)
    stages: Stages = check_graph(Model(lambda: block, layers=3), random_ids())
    assert len(stages.plan.sites) == 3 * 4
    assert rotated(stages) == {"q", "k", "v", "gate", "up"}
