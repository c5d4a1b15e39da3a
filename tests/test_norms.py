"""Norms by structure: where the scale of an RMSNorm stands, in every spelling; and what is none."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from larosa_compile.passes.analysis import GraphFacts, analyse
from larosa_compile.passes.graph import rotation_operands
from larosa_compile.passes.norms import feature_scale, is_squared_length
from tests.support.graphs import capture_graph

D, EPS = 8, 1e-5


class Block(nn.Module):
    """`x + b(tanh(a(norm(x))))`, in the dtype of the linears."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.weight, self.shift = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.rand(D))
        self.a, self.b = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(self.norm(x, self.weight, self.shift))))


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


# spelling -> (norm of x and its parameters, the scale it moves into the readers or None for none)
SPELLINGS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor] | None]] = {
    "scale last": (lambda x, w, b: rms(x) * w, lambda w: w),
    "scale first": (lambda x, w, b: w * rms(x), lambda w: w),
    "one plus": (lambda x, w, b: rms(x) * (1 + w), lambda w: 1 + w),
    "in float32": (lambda x, w, b: w * rms(x.float()).to(x.dtype), lambda w: w),
    "all in float32": (lambda x, w, b: (rms(x.float()) * w.float()).to(x.dtype), lambda w: w.float()),
    "one plus in float32": (lambda x, w, b: (rms(x.float()) * (1.0 + w.float())).type_as(x), lambda w: 1.0 + w.float()),
    "functional": (lambda x, w, b: F.rms_norm(x, (D,), w, EPS), lambda w: w),
    "functional without scale": (lambda x, w, b: F.rms_norm(x, (D,), None, EPS), None),
    "sum of products": (
        lambda x, w, b: x / torch.sqrt(torch.mul(x, x).sum(-1, keepdim=True) / D + EPS) * w,
        lambda w: w,
    ),
    "no scale": (lambda x, w, b: rms(x), None),
    "no mean": (lambda x, w, b: x * w, lambda w: w),
    "scale with leading ones": (lambda x, w, b: rms(x) * w[None, None], lambda w: w[None, None]),
    "no norm": (lambda x, w, b: x, None),
    "times a number": (lambda x, w, b: 2 * (rms(x) * w), lambda w: w),
}

NO_READER: dict[str, Callable[..., Tensor]] = {
    "layer norm": lambda x, w, b: F.layer_norm(x, (D,), w, b, EPS),
    "layer norm without scale": lambda x, w, b: F.layer_norm(x, (D,)),
    "shifted": lambda x, w, b: rms(x) * w + b,
    "scaled by the activation": lambda x, w, b: rms(x) * x,
    "scaled twice": lambda x, w, b: rms(x * b) * w,
    "softmax": lambda x, w, b: x.softmax(-1) * w,
}


def facts(norm: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> tuple[Block, GraphFacts]:
    torch.manual_seed(0)
    model = Block(norm).to(dtype)
    return model, analyse(capture_graph(model, torch.randn(2, 3, D, dtype=dtype)).graph)


def leaves(node: Node) -> set[Node]:
    """Where the features of a stream node come from."""
    operands = rotation_operands(node)
    return set().union(*map(leaves, operands)) if operands else {node}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_reader_sees_the_stream_through_the_scale(name: str, dtype: torch.dtype) -> None:
    norm, scale = SPELLINGS[name]
    model, found = facts(norm, dtype)
    (stream,) = found.streams
    (reader,) = stream.readers
    assert reader.group.name == "a.weight"
    assert [node.op for node in leaves(reader.source)] == ["placeholder"]
    if scale is None:
        assert reader.scale is None
        assert reader.source is reader.group.activation
    else:
        assert reader.scale is not None
        assert reader.scale.source is reader.source
        parameters = dict(model.named_parameters())
        assert torch.equal(reader.scale.scale.evaluate(parameters), scale(model.weight.detach()))


@pytest.mark.parametrize("name", NO_READER)
def test_what_is_no_norm_of_a_stream_is_no_reader(name: str) -> None:
    _, found = facts(NO_READER[name])
    assert "a.weight" not in {reader.group.name for stream in found.streams for reader in stream.readers}


@pytest.mark.parametrize("name", ["shifted", "layer norm"])
def test_a_shift_after_the_scale_hides_it(name: str) -> None:
    _, found = facts(NO_READER[name])
    (group,) = (group for group in found.groups if group.name == "a.weight")
    assert feature_scale(group.origin, found.graph) is None


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.feature, self.number = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(()))
        self.table = nn.Parameter(torch.randn(3, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.feature, self.number) + 0 * self.table.sum()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, feature, number: x * feature, True),
        (lambda x, feature, number: x * feature.exp(), True),
        (lambda x, feature, number: x * number, False),
        (lambda x, feature, number: x + feature, False),
        (lambda x, feature, number: x / feature, False),
        (lambda x, feature, number: feature * number, False),
        (lambda x, feature, number: x * x, False),
        (lambda x, feature, number: x[..., :1] * feature, False),
    ],
)
def test_feature_scale(function: Callable[..., Tensor], expected: bool) -> None:
    captured = capture_graph(Function(function), torch.randn(2, 3, D))
    assert any(feature_scale(node, captured.graph) for node in captured.graph.graph.nodes) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.pow(2).mean(-1), True),
        (lambda x: x.square().sum(-1, keepdim=True), True),
        (lambda x: (x * x).sum(2), True),
        (lambda x: (x * x).sum((1, 2)), True),
        (lambda x: x.pow(2).sum(1), False),
        (lambda x: x.pow(2).amax(-1), False),
        (lambda x: x.pow(3).mean(-1), False),
        (lambda x: x.pow(2), False),
        (lambda x: (x * x.exp()).sum(-1), False),
        (lambda x: (y := x * x).sum(-1, keepdim=True) + y, False),
    ],
)
def test_is_squared_length(function: Callable[[Tensor], Tensor], expected: bool) -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    graph = capture_graph(Squares(), torch.randn(2, 3, D)).graph.graph
    (x,) = (node for node in graph.nodes if node.op == "placeholder")
    assert any(is_squared_length(user, x) for user in x.users) == expected
