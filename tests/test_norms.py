"""What stands between a stream and its readers: every scale and shift is found, and evaluates to what it does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg

from larosa_compile.capture import Captured
from larosa_compile.passes.norms import FeatureAffine, feature_affine, feature_step
from larosa_compile.passes.pipeline import facts_of
from tests.support.blocks import rms
from tests.support.graphs import capture_graph
from tests.support.stages import placeholder_values

D = 8


class Function(nn.Module):
    """`linear(function(x, g, h, b, c))`, in float64: g and h are scales, b and c shifts."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.g, self.h = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.rand(D) + 0.5)
        self.b, self.c = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.number, self.table = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(3, D))
        self.linear = nn.Linear(D, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.function(self, x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def found_in(function: Callable[..., Tensor]) -> tuple[Function, Captured, Node, FeatureAffine | None]:
    """The module, its graph, the linear's activation, and what is found between it and the stream."""
    module = Function(function)
    captured = capture_graph(module, torch.randn(2, 3, D, dtype=torch.float64))
    (group,) = facts_of(captured.graph, captured.fake_mode).groups
    return module, captured, group.activation, feature_affine(group.activation, captured.graph)


class Recorder(Interpreter):
    def run_node(self, node: Node) -> object:
        self.values: dict[Node, Tensor] = getattr(self, "values", {})
        result = super().run_node(node)
        self.values[node] = result
        return result


def check_affine(module: Function, captured: Captured, activation: Node, affine: FeatureAffine) -> None:
    """`activation = path(source) * scale + shift`, on numbers: the path is run on the source alone."""
    recorder = Recorder(captured.graph.module, graph=captured.graph.graph)
    with torch.no_grad():
        recorder.run(*placeholder_values(captured, ()))
    steps = [step.node for step in affine.steps]
    carried, x = {affine.source, *affine.path, *steps}, recorder.values[affine.source]
    for node in affine.path:
        # steps are left out, so what a node of the path reads may be a scaled value
        values = {operand: x if operand in carried else recorder.values[operand] for operand in node.all_input_nodes}
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        x = node.target(*args, **kwargs)  # type: ignore[operator]
    scale, shift = affine.evaluate(dict(module.named_parameters()))
    assert scale.dtype == torch.float64
    assert (shift is not None) == affine.shifts
    precision = min(torch.finfo(recorder.values[node].dtype).bits for node in carried)
    found = x * scale + (0 if shift is None else shift)
    assert torch.allclose(found, recorder.values[activation], rtol={64: 1e-12, 32: 1e-5}[precision])


AFFINE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "scale": (lambda m, x: x * m.g, "* g"),
    "scale first": (lambda m, x: m.g * rms(x), "* g"),
    "one plus": (lambda m, x: rms(x) * (1 + m.g), "* g"),
    "twice": (lambda m, x: x * m.g * m.h, "* g * h"),
    "shift": (lambda m, x: rms(x) * m.g + m.b, "* g + b"),
    "shift first": (lambda m, x: m.b + x * m.g, "* g + b"),
    "alternately": (lambda m, x: (x * m.g + m.b) * m.h + m.c, "* g + b * h + c"),
    "shift below a scale": (lambda m, x: (x + m.b) * m.g, "* g"),
    "all in single precision": (lambda m, x: (x.float() * m.g.float() + m.b.float()).double(), "* g + b"),
    "last row": (lambda m, x: (x * m.g + m.b)[:, -1:], "* g + b"),
    "rows chosen": (lambda m, x: (x * m.g + m.b)[torch.tensor([1, 0, 1])], "* g + b"),
    "views": (lambda m, x: (x.flatten(0, 1) * m.g).unsqueeze(0) + m.b, "* g + b"),
    "rows repeated": (lambda m, x: (x * m.g + m.b).repeat(2, 1, 1), "* g + b"),
    "rows scaled": (lambda m, x: x * m.g * x.abs().amax(-1, keepdim=True), "* g"),
    "norm after the scale": (lambda m, x: rms(x * m.g), "* g"),
    "rows summed": (lambda m, x: (x * m.g).cumsum(1), "* g"),
    "rows padded": (lambda m, x: nn.functional.pad(x * m.g, (0, 0, 1, 0)), "* g"),
    "rows put before": (lambda m, x: torch.cat([torch.zeros_like(x[:, :1]), x * m.g], 1), "* g"),
    "rows masked": (lambda m, x: (x * m.g).masked_fill(x[..., :1] > 0, 0), "* g"),
    "with leading ones": (lambda m, x: x * m.g[None, None] + m.b[None], "* g + b"),
    "scale after a shift of rows": (lambda m, x: (x + x.sum(-1, keepdim=True)) * m.g, "* g"),
}

SHIFTED_TOO_EARLY: dict[str, Callable[..., Tensor]] = {
    "rows scaled": lambda m, x: (x * m.g + m.b) * x.abs().amax(-1, keepdim=True),
    "rows summed": lambda m, x: (x * m.g + m.b).cumsum(1),
    "rows padded": lambda m, x: nn.functional.pad(x * m.g + m.b, (0, 0, 1, 0)),
    "rows put before": lambda m, x: torch.cat([torch.zeros_like(x[:, :1]), x * m.g + m.b], 1),
    "rows masked": lambda m, x: (x * m.g + m.b).masked_fill(x[..., :1] > 0, 0),
    "rows shifted": lambda m, x: x * m.g + x.sum(-1, keepdim=True),
    "two kinds of rows": lambda m, x: torch.cat([x * m.g, x], 1),
    "features chosen": lambda m, x: torch.cat([(x * m.g)[..., :4], (x * m.g)[..., 4:]], -1),
    "no scale": lambda m, x: rms(x) + m.b,
    "no parameter": lambda m, x: rms(x) * x,
    "a table": lambda m, x: x * m.table,
    "one number": lambda m, x: x * m.number,
    "nonlinear": lambda m, x: torch.tanh(x * m.g),
}


@pytest.mark.parametrize("name", AFFINE)
def test_scales_and_shifts(name: str) -> None:
    function, spelled = AFFINE[name]
    module, captured, activation, affine = found_in(function)
    assert affine is not None
    assert " ".join(f"{'*' if step.scales else '+'} {step.vector.path}" for step in affine.steps) == spelled
    check_affine(module, captured, activation, affine)


@pytest.mark.parametrize("name", SHIFTED_TOO_EARLY)
def test_what_cannot_move_into_a_linear(name: str) -> None:
    """A shift that is scaled or dropped by rows after it; a scale of which only a part is read."""
    assert found_in(SHIFTED_TOO_EARLY[name])[-1] is None


class Residual(Function):
    """`x + linear(norm(x))`, or with a norm after the add, that the next add reads."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            y = self.function(self, x)
            x = (y if self.after else x) + torch.tanh(self.linear(y)) @ self.linear.weight
        return x

    after = False


@pytest.mark.parametrize("after", [False, True])
def test_a_scaled_value_that_a_residual_add_carries_on_is_the_stream(after: bool) -> None:
    module = Residual(lambda m, x: rms(x) * m.g + m.b)
    module.after = after
    captured = capture_graph(module, torch.randn(2, 3, D, dtype=torch.float64))
    facts = facts_of(captured.graph, captured.fake_mode)
    found = [feature_affine(group.activation, captured.graph) for group in facts.groups if group.features == D]
    assert len(found) == 2
    assert [affine is None for affine in found] == [after, after]


@pytest.mark.parametrize(
    ("function", "scales"),
    [
        (lambda m, x: x * m.g, True),
        (lambda m, x: x * m.g.exp(), True),
        (lambda m, x: x[0, 0] * m.g, True),
        (lambda m, x: x + m.b, False),
        (lambda m, x: m.b + x, False),
        (lambda m, x: x - m.b, None),
        (lambda m, x: torch.add(x, m.b, alpha=2), None),
        (lambda m, x: x / m.g, None),
        (lambda m, x: x * m.number, None),
        (lambda m, x: x + m.number, None),
        (lambda m, x: m.g * m.number, None),
        (lambda m, x: x + m.g * m.g, False),
        (lambda m, x: x * x, None),
        (lambda m, x: x * m.table, None),
        (lambda m, x: x[..., :1] * m.g, None),
    ],
)
def test_one_step(function: Callable[..., Tensor], scales: bool | None) -> None:
    module = Function(lambda m, x: function(m, x) * torch.ones(3, D, dtype=torch.float64))
    captured = capture_graph(module, torch.randn(2, 3, D, dtype=torch.float64))
    steps = [step for node in captured.graph.graph.nodes if (step := feature_step(node, captured.graph))]
    assert [step.scales for step in steps] == ([] if scales is None else [scales])
