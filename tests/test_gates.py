"""Activated gates: what is one, however it is spelled, and what is not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from larosa_compile.passes.gates import find_gate
from larosa_compile.passes.pipeline import facts_of
from tests.support.blocks import HIDDEN, D, Function
from tests.support.graphs import capture_graph

Made = Callable[[Function, Tensor], Tensor]


def gated(made: Made) -> Function:
    """`x + down(made(x))` over linears with and without bias."""
    return Function(
        lambda self, x: (x + self.down(made(self, x)),),
        gate=torch.nn.Linear(D, HIDDEN),
        up=torch.nn.Linear(D, HIDDEN, bias=False),
        both=torch.nn.Linear(D, 2 * HIDDEN, bias=False),
        down=torch.nn.Linear(HIDDEN, D),
        other=torch.nn.Parameter(torch.rand(HIDDEN)),
    )


def _halves(model: Function, x: Tensor) -> Tensor:
    gate, up = model.both(x).chunk(2, -1)
    return F.silu(gate) * up


GATED: dict[str, Made] = {
    "silu": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "the other way round": lambda m, x: m.up(x) * F.gelu(m.gate(x), approximate="tanh"),
    "erf": lambda m, x: F.gelu(m.up(x)) * m.gate(x),
    "relu": lambda m, x: F.relu(m.gate(x)) * m.up(x),
    "clamped": lambda m, x: torch.sigmoid(m.gate(x).clamp(max=7) * 1.702) * m.up(x),
    "one product": _halves,
    "in float32": lambda m, x: F.silu(m.gate(x).float()) * m.up(x),
}

NOT_GATED: dict[str, Made] = {
    "no activation": lambda m, x: m.gate(x) * m.up(x),
    "two activations": lambda m, x: torch.tanh(m.gate(x)) * torch.sigmoid(m.up(x)),
    "no product": lambda m, x: F.silu(m.gate(x)) + m.up(x),
    "another activation": lambda m, x: F.silu(m.gate(x)) * m.up(x + 1),
    "along features": lambda m, x: m.gate(x).softmax(-1) * m.up(x),
    "a parameter": lambda m, x: F.silu(m.gate(x)) * m.other,
    "along tokens": lambda m, x: F.silu(m.gate(x)) * m.up(x).cumsum(1),
    "two linears": lambda m, x: F.silu(m.gate(x) + m.up(x)) * m.up(x),
}


@pytest.mark.parametrize("name", [*GATED, *NOT_GATED])
def test_a_gate_is_found_by_structure(name: str) -> None:
    torch.manual_seed(0)
    captured = capture_graph(gated((GATED | NOT_GATED)[name]), torch.randn(1, 3, D))
    facts = facts_of(captured.graph, captured.fake_mode)
    products = {linear.product: linear for linear in facts.linears}
    found = {group.name: find_gate(group, products) for group in facts.groups}
    gate = found.pop("down.weight")
    assert (gate is not None) == (name in GATED) and not any(found.values())
    if gate is not None:
        # what has no bias is the factor that is a linear and nothing else
        factors = [factor for factor in gate.product.args if factor is not gate.factor]
        assert len(factors) == 1 and gate.factor.meta["val"].shape == gate.product.meta["val"].shape
