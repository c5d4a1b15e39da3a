"""Small decoders, and what the method makes of them in float64, computed from the dense module by hooks."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, HIDDEN = 16, 24


@dataclass(frozen=True)
class Choice:
    sparsity: float = 0.0
    basis: str | None = None
    kind: str = "other"
    selection: str = "top-k"
    threshold: float = 0.0


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(FEATURES) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LayerNorm(nn.LayerNorm):
    """Scale away from one, shift away from zero."""

    def __init__(self) -> None:
        super().__init__(FEATURES)
        nn.init.uniform_(self.weight, 0.5, 1.5)
        nn.init.normal_(self.bias)


class Layer(nn.Module):
    """Pre-norm: gated mixing along tokens in the place of attention, then a gated MLP; or both at once."""

    def __init__(self, parallel: bool = False, norm: Callable[[], nn.Module] = RMSNorm) -> None:
        super().__init__()
        self.parallel = parallel
        self.norm_1, self.norm_2 = norm(), norm()
        self.q, self.k = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES, bias=False)
        self.v, self.o = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.gate, self.up = nn.Linear(FEATURES, HIDDEN, bias=False), nn.Linear(FEATURES, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, FEATURES, bias=False)

    def mix(self, y: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(y) * self.k(y)).cumsum(-2) * self.v(y))

    def mlp(self, y: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(y)) * self.up(y))

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            y = self.norm_1(x)
            return x + self.mix(y) + self.mlp(y)
        x = x + self.mix(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """Ids [batch, tokens] -> (logits, hidden state when asked for)."""

    def __init__(
        self,
        layers: int = 2,
        vocab: int = 40,
        positions: int = 0,
        tied: bool = False,
        returns_hidden: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, FEATURES)
        self.positions = nn.Embedding(positions, FEATURES) if positions else None
        self.layers = nn.ModuleList(Layer(**options) for _ in range(layers))
        self.norm, self.head = RMSNorm(), nn.Linear(FEATURES, vocab, bias=False)
        self.returns_hidden = returns_hidden
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[-1]))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return (logits, x) if self.returns_hidden else (logits,)


READERS = ("q", "k", "v", "gate", "up")
LAYER = (*READERS, "o", "down")


def choices_for(
    layers: int,
    sparsity: float = 0.0,
    basis: Callable[[int], str | None] = lambda layer: f"l{layer}",
    rotated: tuple[str, ...] = READERS,
) -> dict[str, Choice]:
    """Every linear of every layer; `rotated` names those that read in the layer's basis."""
    return {
        f"layers.{layer}.{name}.weight": Choice(sparsity, basis(layer) if name in rotated else None)
        for layer in range(layers)
        for name in LAYER
    }


def simulate(
    module: nn.Module, choices: Mapping[str, Choice], rotations: Mapping[str, Tensor], *inputs: Tensor
) -> list[Tensor]:
    """The method in float64 on the dense model: `(x−β)/γ → @Q → Top-K → @Qᵀ → ·γ+β` before every chosen linear."""
    model = copy.deepcopy(module).double()
    for path, choice in choices.items():
        owner, _, name = path.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(owner)
        first = name in ("q", "k", "v") or getattr(parent, "parallel", False)
        norm = getattr(parent, "norm_1" if first else "norm_2", None)
        scale, shift = (getattr(norm, part, None) if choice.basis else None for part in ("weight", "bias"))
        linear = parent.get_submodule(name)
        if isinstance(linear, nn.Embedding):  # a tied head goes by the first name of its weight
            linear = model.get_submodule("head")

        def sparse(
            linear: nn.Module, args: tuple[Tensor], choice: Any = choice, scale: Any = scale, shift: Any = shift
        ) -> Tensor:
            gain = torch.ones((), dtype=torch.float64) if scale is None else scale
            offset = torch.zeros((), dtype=torch.float64) if shift is None else shift
            features = args[0].shape[-1]
            basis = rotations[choice.basis] if choice.basis else torch.eye(features, dtype=torch.float64)
            x = (args[0] - offset) / gain @ basis
            dropped = x.abs().argsort(-1)[..., : features - max(1, round((1 - choice.sparsity) * features))]
            return x.scatter(-1, dropped, 0) @ basis.T * gain + offset

        linear.register_forward_pre_hook(sparse)
    with torch.no_grad():
        return list(model(*(x.double() if x.is_floating_point() else x for x in inputs)))


def error(actual: list[Any], exact: list[Any]) -> float:
    """Largest relative error of any output; what is no floating tensor must be the same."""
    largest = 0.0
    for found, expected in zip(actual, exact, strict=True):
        if isinstance(expected, Tensor) and expected.is_floating_point():
            assert found.shape == expected.shape
            largest = max(largest, float((found.double() - expected).norm() / expected.norm()))
        else:
            assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected
    return largest


def rounding(module: nn.Module, *inputs: Tensor) -> float:
    """What the module's own precision costs it, plus one rounding, four times: reordered sums and one more matrix."""
    with torch.no_grad():
        own = error(list(module(*inputs)), simulate(module, {}, {}, *inputs))
    dtype = next(module.parameters()).dtype
    return 4 * (own + torch.finfo(dtype).eps)


def ids(*shape: int) -> Tensor:
    """Token ids that any table of these decoders holds."""
    return torch.randint(0, 8, shape)
