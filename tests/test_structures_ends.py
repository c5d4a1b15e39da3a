"""What enters and leaves a residual stream, and models that have none. All through every pass, and exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from larosa_compile.passes.graph import aten, is_call
from tests.support.blocks import (
    HIDDEN,
    VOCAB,
    Attention,
    Block,
    D,
    Function,
    Mlp,
    Model,
    Norm,
    random_ids,
    small_block,
)
from tests.support.stages import check_graph
from tests.support.structures import adapters, check_decoder, online, rotated, sites


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Embedded(nn.Module):
    """Ids through `function` of the rows of tables."""

    def __init__(self, function: Callable[["Embedded", Tensor], Tensor], width: int = D) -> None:
        super().__init__()
        self.function = function
        self.words, self.kinds = nn.Embedding(VOCAB, width), nn.Embedding(2, width)
        self.places = nn.Parameter(torch.randn(1, 9, width))
        self.norm = Norm(lambda x, g, b: F.layer_norm(x, x.shape[-1:], g, b))
        self.enter = nn.Identity() if width == D else nn.Linear(width, D, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(self, ids)


EMBEDDINGS: dict[str, tuple[Callable[[Embedded, Tensor], Tensor], int]] = {
    "normed": (lambda m, ids: m.norm(m.words(ids)), D),
    "times a number": (lambda m, ids: m.words(ids) * D**0.5, D),
    "plus positions": (lambda m, ids: m.words(ids) + m.places[:, : ids.shape[1]], D),
    "three tables, normed": (lambda m, ids: m.norm(m.words(ids) + m.kinds(ids % 2) + m.places[:, : ids.shape[1]]), D),
    "projected": (lambda m, ids: m.enter(m.words(ids)), 8),
    "masked": (lambda m, ids: m.words(ids).masked_fill((ids == 3)[..., None], 0), D),
    "tokens before": (lambda m, ids: torch.cat([m.places[:, :2].expand(ids.shape[0], -1, -1), m.words(ids)], 1), D),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name: str) -> None:
    function, width = EMBEDDINGS[name]
    check_decoder(Model(small_block, embed=lambda: Embedded(function, width)), enters=width == D)


class Heads(nn.Module):
    def __init__(self, function: Callable[["Heads", Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.words, self.other, self.value = nn.Linear(D, VOCAB), nn.Linear(D, 7, bias=False), nn.Linear(D, 1)
        self.leave, self.narrow = nn.Linear(D, 8), nn.Linear(8, VOCAB)
        self.post = Norm()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


HEADED: dict[str, Callable[[Heads, Tensor], Any]] = {
    "biased": lambda m, x: m.words(x),
    "two": lambda m, x: (m.words(x), m.value(x).squeeze(-1)),
    "three, of rows": lambda m, x: (m.words(x[:, -1]), m.other(x[:, :2]), m.value(x.mean(1))),
    "projected out": lambda m, x: m.narrow(m.leave(x)),
    "dense, activation, norm": lambda m, x: m.narrow(F.gelu(m.leave(x))),
    "capped": lambda m, x: 30 * torch.tanh(m.words(x) / 30),
    "scaled": lambda m, x: m.words(x / 4) * 0.5,
    "normed again": lambda m, x: m.words(m.post(x)),
    "and the hidden state": lambda m, x: (m.words(x), x),
}


@pytest.mark.parametrize("name", HEADED)
def test_heads(name: str) -> None:
    """They read the stream in the model's own basis."""
    names = ("words", "other", "value", "leave", "narrow")
    check_decoder(Model(small_block, head=lambda: Heads(HEADED[name])), heads=tuple(f"head.{name}" for name in names))


@pytest.mark.parametrize("vocab", [VOCAB, 8])
def test_a_tied_head(vocab: int) -> None:
    """A table smaller than a rotation is folded where the embedding reads it, never where the head does."""
    model = Model(small_block, embed=lambda: nn.Embedding(vocab, D), head=lambda: nn.Linear(D, vocab, bias=False))
    model.head.weight = model.embed.weight
    ids = torch.randint(0, vocab, (2, 5))
    stages = check_graph(model, ids)
    assert online(stages) == (adapters() if vocab > D else [("s0l0", None)])
    assert [refusal.site for refusal in stages.plan.refusals] == ["embed.weight"]


class Observed(nn.Module):
    """Every hidden state leaves the graph, and `x` may be given in place of ids."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(small_block() for _ in range(layers)), Norm()

    def forward(self, x: Tensor) -> Any:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return (*states[1:], self.norm(states[-1]), states[1].mean(-1), states[1].mean((1, 2)), states[1].norm(dim=-1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_hidden_states_leave_in_the_model_s_own_basis(dynamic: bool) -> None:
    """So they are compared above, with the mean of their features, which sums in whatever basis they have."""
    stages = check_graph(Observed(), torch.randn(2, 4, D), dynamic=dynamic)
    assert rotated(stages) == {"up"}
    assert len(online(stages)) == 4


def test_states_may_come_from_elsewhere() -> None:
    """Encoder states that a decoder reads are a stream only where something is added to them."""

    def crossed(m: Any, x: Tensor, memory: Tensor) -> tuple[Tensor]:
        x = x + m.own(m.norm(x))
        scores = m.q(m.other(x)) @ m.k(memory).mT
        x = x + m.o(scores.softmax(-1) @ m.v(memory))
        return (x + m.mlp(m.last(x)),)

    parts: dict[str, nn.Module] = {name: nn.Linear(D, D) for name in "qkvo"}
    parts |= {name: Norm() for name in ("norm", "other", "last")} | {"own": Mlp(), "mlp": Mlp(HIDDEN - 4)}
    stages = check_graph(Function(crossed, **parts), torch.randn(2, 4, D), torch.randn(2, 3, D))
    assert rotated(stages) == {"q", "gate", "up"}
    assert {name: sites(stages)[f"{name}.weight"] for name in "kvo"} == dict.fromkeys("kvo", False)


class Masked(nn.Module):
    """A decoder that takes which tokens there are, and where they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCAB, D), nn.Embedding(12, D)
        self.block, self.norm, self.head = Block(Attention), Norm(), nn.Linear(D, VOCAB, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor]:
        x = self.words(ids) + self.places((mask.cumsum(-1) - 1).clamp(min=0))
        allowed = mask[:, None, None, :].bool()
        self.block.attn.scores = lambda scores: scores.masked_fill(~allowed, -1e9)
        x = self.block(x * mask[..., None])
        return (self.head(self.norm(torch.where(mask[..., None].bool(), x, 0))),)


def test_left_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    stages = check_graph(Masked(), random_ids(3), mask)
    assert rotated(stages) == {"q", "k", "v", "gate", "up"}
    assert len(online(stages)) == 2


class Cached(nn.Module):
    """One step of decoding: keys and values are written into a cache that the graph is given and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.norm = nn.Embedding(VOCAB, D), small_block(), Norm()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in "qkvo")
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor, place: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor]:
        x = self.words(ids)
        y = self.norm(x)
        keys.index_copy_(1, place, self.k(y))
        values.index_copy_(1, place, self.v(y))
        seen = torch.arange(keys.shape[1]) <= place
        scores = (self.q(y) @ keys.mT / D**0.5).masked_fill(~seen, float("-inf"))
        return (self.head(self.norm(self.block(x + self.o(scores.softmax(-1) @ values)))),)


def test_a_cache_that_the_graph_writes_to() -> None:
    """It holds what it would hold without rotations."""
    caches = torch.randn(2, 2, 6, D)
    stages = check_graph(Cached(), random_ids(2, 1), torch.tensor([3]), *caches)
    assert rotated(stages) >= {"q", "k", "v", "up"}
    written = [node for node in stages.editor.graph.nodes if is_call(node, aten.copy_.default)]
    assert len(written) == 2


class Pooled(nn.Module):
    """An encoder: post-norm, its first token read through tanh, and the mean and the largest of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.enter = nn.Embedding(VOCAB, D), Norm(layer_norm)
        self.layers = nn.ModuleList(PostNorm() for _ in range(2))
        self.pooler, self.classes = nn.Linear(D, D), nn.Linear(3 * D, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.enter(self.words(ids))
        for layer in self.layers:
            x = layer(x)
        pooled = torch.cat([torch.tanh(self.pooler(x[:, 0])), x.mean(1), x.amax(1)], -1)
        return self.classes(pooled), x


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], scale, shift)


class PostNorm(Block):
    def __init__(self) -> None:
        super().__init__(norm=lambda: Norm(layer_norm))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + self.attn(x))
        return self.norm_2(x + self.mlp(x))


class Vision(nn.Module):
    """Patches by a convolution, a token for the class, pre-norm blocks, a head on that token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, D, 4, 4), nn.Parameter(torch.randn(1, 1, D))
        self.places = nn.Parameter(torch.randn(1, 5, D))
        self.block = Block(norm=lambda: Norm(layer_norm))
        self.norm, self.head = Norm(layer_norm), nn.Linear(D, 4)

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        x = self.patches(pixels).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return (self.head(self.norm(self.block(x))[:, 0]),)


class Grid(nn.Module):
    """Residual convolutions with batch norm: features are no last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.classes = nn.BatchNorm2d(8).eval(), nn.Linear(8, 4)

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        x = torch.relu(self.conv_1(pixels))
        x = x + torch.relu(self.norm(self.conv_2(x)))
        return (self.classes(x.mean((2, 3))),)


def test_an_encoder_with_pooling() -> None:
    stages = check_graph(Pooled(), random_ids())
    assert rotated(stages) == {"q", "k", "v", "gate", "up"}


def test_a_vision_model() -> None:
    stages = check_graph(Vision(), torch.randn(2, 3, 8, 8))
    assert rotated(stages) == {"q", "k", "v", "gate", "up"}
    assert len(online(stages)) == 2


def test_models_without_a_stream() -> None:
    """Nothing is chosen, nothing is changed."""
    mlp = Function(lambda m, x: (m.b(torch.relu(m.a(x))),), a=nn.Linear(D, HIDDEN), b=nn.Linear(HIDDEN, D))
    for module, x in ((mlp, torch.randn(3, D)), (Grid().eval(), torch.randn(2, 3, 8, 8))):
        stages = check_graph(module, x)
        assert not stages.facts.streams
        assert not stages.plan.sites
        assert not stages.editor.folded
