"""Residual streams of small modules: who writes, who reads, what enters, and where layers begin."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.equivariance import rotation_operands
from larosa_compile.passes.pipeline import facts_of
from larosa_compile.passes.streams import Stream, carried_from, exits
from tests.support.decoder import FEATURES, Decoder, RMSNorm, ids
from tests.support.graphs import capture_graph


def facts(module: nn.Module, *inputs: Tensor) -> GraphFacts:
    captured = capture_graph(module, *inputs)
    return facts_of(captured.graph, captured.fake_mode)


def names(paths: list[str]) -> list[str]:
    return [path.split(".")[-2] for path in paths]


def reader_names(stream: Stream) -> list[list[str]]:
    return [names([linear.path for linear in reader.group.linears]) for reader in stream.readers]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("norm", [RMSNorm, nn.Identity])
@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_a_decoder_is_one_stream(layers: int, norm: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    found = facts(Decoder(layers, norm=norm), ids(*shape))
    (stream,) = found.streams
    assert stream.features == FEATURES
    assert reader_names(stream) == [["q", "k", "v"], ["gate", "up"]] * layers + [["head"]]
    assert names([linear.path for linear in stream.writers.values()]) == ["o", "down"] * layers
    entries = list(stream.entries)
    assert len(entries) == 2 * layers + 1
    assert found.graph.paths[entries[0]] == "embedding.weight"
    assert set(entries[1:]) == set(stream.writers)
    assert found.feeding_streams == {linear.path for linear in found.linears} - {"head.weight"}


@pytest.mark.parametrize("norm", [RMSNorm, nn.Identity])
def test_parallel_branches(norm: Callable[[], nn.Module]) -> None:
    (stream,) = facts(Decoder(2, parallel=True, norm=norm), ids(2, 5)).streams
    assert reader_names(stream) == [["q", "k", "v", "gate", "up"]] * 2 + [["head"]]
    assert names([linear.path for linear in stream.writers.values()]) == ["o", "down"] * 2


def test_embeddings_that_are_added_both_enter() -> None:
    found = facts(Decoder(1, positions=9), ids(2, 5))
    (stream,) = found.streams
    tables = {found.graph.paths.get(node) for node in stream.entries}
    assert tables == {"embedding.weight", "positions.weight", None}


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("parallel", [False, True])
def test_layers_begin_where_shapes_repeat(layers: int, parallel: bool) -> None:
    (stream,) = facts(Decoder(layers, parallel=parallel), ids(2, 5)).streams
    *inner, last = stream.layers()
    assert [reader for layer in stream.layers() for reader in layer] == list(stream.readers)
    by_layer = [{linear.path.split(".")[1] for r in layer for linear in r.group.linears} for layer in inner]
    assert by_layer == [{str(index)} for index in range(len(inner))]
    assert last[-1].group.name == "head.weight"


@pytest.mark.parametrize("norm", [RMSNorm, nn.Identity, lambda: nn.LayerNorm(FEATURES)])
def test_nothing_leaves_a_stream_but_to_its_readers_and_outputs(norm: Callable[[], nn.Module]) -> None:
    """Else a rotation would have to be undone online."""
    found = facts(Decoder(2, norm=norm, returns_hidden=True), ids(2, 5))
    (stream,) = found.streams
    allowed = {linear.product for linear in found.linears}
    allowed |= {reader.affine.steps[0].node for reader in stream.readers if reader.affine}
    left = {user for node in stream.nodes for user in exits(node)} - allowed
    assert {node.op for node in left} == {"output"}


def test_nodes_are_closed_under_rotation_and_in_graph_order() -> None:
    found = facts(Decoder(2), ids(2, 5))
    (stream,) = found.streams
    inside, order = set(stream.nodes), list(found.graph.graph.nodes)
    assert list(stream.nodes) == [node for node in order if node in inside]
    for node in stream.nodes:
        assert inside.issuperset(rotation_operands(node))
        assert inside.issuperset(user for user in node.users if node in rotation_operands(user))
        assert carried_from(node) in inside
        assert len(rotation_operands(carried_from(node))) != 1


class Function(nn.Module):
    """`function(self, x)` over four linears and a scale."""

    def __init__(self, function: Callable[["Function", Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(FEATURES, 24), nn.Linear(24, FEATURES)
        self.c, self.d = nn.Linear(FEATURES, FEATURES), nn.Linear(24, 24)
        self.scale = nn.Parameter(torch.rand(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(m.a(x).relu()),
        lambda m, x: m.b(m.a(x).relu()) + 1,
        lambda m, x: m.c(x) * x,
        lambda m, x: torch.cat([m.c(x), x], -1),
        lambda m, x: m.b(m.a(x).relu() + m.a(x)),
        lambda m, x: x.exp() + x,
        lambda m, x: x.flip(-1) + m.b(m.a(x).relu()),
        lambda m, x: x.clamp(min=0) + m.b(m.a(x.clamp(max=1)).relu()),
    ],
    ids=[
        *("MLP", "plus a number", "gate", "concatenation", "written by none that reads it", "no linear"),
        *("features in another order", "read through another function"),
    ],
)
def test_no_stream(function: Callable[[Function, Tensor], Tensor]) -> None:
    found = facts(Function(function), torch.randn(2, 3, FEATURES))
    widths = {stream.features for stream in found.streams}
    assert FEATURES not in widths


@pytest.mark.parametrize(
    ("function", "readers", "writers"),
    [
        (lambda m, x: x + m.b(m.a(x).relu()), {"a"}, {"b"}),
        (lambda m, x: m.b(m.a(x).relu()) + x, {"a"}, {"b"}),
        (lambda m, x: x - 0.5 * m.b(m.a(x).relu()), {"a"}, {"b"}),
        (lambda m, x: x + m.b(m.a(x * m.scale).relu()), {"a"}, {"b"}),
        (lambda m, x: x[:, -1:] + m.b(m.a(x[:, -1:]).relu()), {"a"}, {"b"}),
        (lambda m, x: (y := m.c(x)) + m.b(m.a(y).relu()), {"a"}, {"b", "c"}),
        (lambda m, x: torch.cat([x, x], 1) + m.b(m.a(torch.cat([x, x], 1)).relu()), {"a"}, {"b"}),
        (lambda m, x: x + m.scale * m.b(m.a(x).relu()) + m.c(x), {"a", "c"}, {"c"}),
        (lambda m, x: x + m.b(m.a(x - x.mean(-1, keepdim=True)).relu()), {"a"}, {"b"}),
        (lambda m, x: x + m.b(m.a(F.layer_norm(x, x.shape[-1:], m.scale, m.scale)).relu()), {"a"}, {"b"}),
        (lambda m, x: x + F.pad(m.b(m.a(x[:, 1:]).relu()), (0, 0, 1, 0)), {"a"}, {"b"}),
        (lambda m, x: x.index_add(1, torch.tensor([0, 0]), m.b(m.a(x[:, 1:]).relu())), {"a"}, {"b"}),
    ],
)
def test_streams_of_many_spellings(
    function: Callable[[Function, Tensor], Tensor], readers: set[str], writers: set[str]
) -> None:
    (stream,) = facts(Function(function), torch.randn(2, 3, FEATURES)).streams
    assert {name for reader in reader_names(stream) for name in reader} == readers
    assert set(names([linear.path for linear in stream.writers.values()])) == writers


def test_two_widths_are_two_streams() -> None:
    def function(m: Function, x: Tensor) -> Tensor:
        x = x + torch.relu(m.c(x))
        x = x + m.c(x)
        y = torch.tanh(m.a(x))
        return y + m.d(y)

    streams = facts(Function(function), torch.randn(2, 3, FEATURES)).streams
    assert [stream.features for stream in streams] == [FEATURES, 24]
    assert [reader_names(stream) for stream in streams] == [[["c"], ["c"], ["a"]], [["d"]]]


def test_a_shared_weight_is_a_reader_wherever_it_reads() -> None:
    def function(m: Function, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.b(m.a(x).relu())
        return x

    found = facts(Function(function), torch.randn(2, 3, FEATURES))
    (stream,) = found.streams
    assert reader_names(stream) == [["a"], ["a"]]
    assert len({reader.source for reader in stream.readers}) == 2


def test_the_last_linears_before_a_stream_write_to_it_whatever_is_between() -> None:
    def function(m: Function, x: Tensor) -> Tensor:
        x = x + m.scale * torch.tanh(m.b(m.a(x).relu()))
        return x + F.layer_norm(m.c(x), x.shape[-1:], m.scale)

    found = facts(Function(function), torch.randn(2, 3, FEATURES))
    (stream,) = found.streams
    assert not stream.writers
    assert found.writers == {"b.weight", "c.weight"}
    assert found.feeding_streams == {"a.weight", "b.weight", "c.weight"}
