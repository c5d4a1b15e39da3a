"""Parameter expressions: what a model does to a weight before it is used, read from the graph and run again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from larosa_compile.capture import Captured
from larosa_compile.passes.parameters import (
    ParameterExpression,
    SelectedParameter,
    parameter_expression,
    selected_parameter,
)
from tests.support.graphs import capture_graph

SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda w: w,
    "transposed": lambda w: w.T,
    "cast": lambda w: w.to(torch.bfloat16),
    "transposed and cast": lambda w: w.T.to(torch.bfloat16),
    "one plus": lambda w: 1 + w,
    "one plus, in float32": lambda w: (1.0 + w.to(torch.bfloat16)).float(),
    "scaled": lambda w: w * 0.5,
    "unsqueezed": lambda w: w[None],
    "sliced": lambda w: w[1:, 2:],
    "largest of every column": lambda w: w.max(0)[0],
    "part of a split": lambda w: w.split(2)[1],
    "its own statistics": lambda w: torch.var_mean(w, 1)[0],
}


class Uses(nn.Module):
    """`relu(spelling(weight))` beside something that is no parameter."""

    def __init__(self, spelling: Callable[[Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(shape))
        self.spelling = spelling

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.spelling(self.inner.weight).relu(), x.relu()


def outputs(captured: Captured) -> list[Node]:
    (output,) = (node for node in captured.graph.graph.nodes if node.op == "output")
    return list(output.args[0])


def expression_of(spelling: str) -> ParameterExpression:
    module = Uses(SPELLINGS[spelling], 4, 6)
    captured = capture_graph(module, torch.ones(2))
    first, second = outputs(captured)
    assert parameter_expression(second, captured.graph) is None
    found = parameter_expression(first.all_input_nodes[0], captured.graph)
    assert found is not None
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_expression_evaluates_to_what_eager_computes(spelling: str) -> None:
    found = expression_of(spelling)
    assert found.path == "inner.weight"
    weight = torch.randn(4, 6, requires_grad=True)
    expected, evaluated = SPELLINGS[spelling](weight), found.evaluate({"inner.weight": weight, "other": torch.ones(1)})
    assert evaluated.dtype == expected.dtype
    assert torch.equal(evaluated, expected)
    assert not evaluated.requires_grad


def test_the_plain_parameter_is_an_expression_without_steps() -> None:
    assert expression_of("plain") == ParameterExpression("inner.weight", ())
    assert str(expression_of("plain")) == "inner.weight"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_text_is_the_same_in_every_capture(spelling: str) -> None:
    """It is part of the key under which folded weights are cached."""
    assert str(expression_of(spelling)) == str(expression_of(spelling))


def test_different_expressions_have_different_texts() -> None:
    assert len({str(expression_of(name)) for name in SPELLINGS}) == len(SPELLINGS)


class Depends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("c", torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a * x, self.a * self.b, x.exp(), self.c.exp(), torch.ones(4).exp()


def test_what_depends_on_anything_else_is_no_expression() -> None:
    captured = capture_graph(Depends(), torch.randn(4))
    assert [parameter_expression(node, captured.graph) for node in outputs(captured)] == [None] * 5
    assert parameter_expression(1.0, captured.graph) is None
    assert parameter_expression(None, captured.graph) is None


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight * 2
        return self.weight * self.weight, torch.ops.aten.cat.default([weight, weight, weight])


def test_a_parameter_may_be_used_twice_in_one_step() -> None:
    module = Twice()
    captured = capture_graph(module, torch.ones(1))
    for node, expected in zip(outputs(captured), module(torch.ones(1)), strict=True):
        found = parameter_expression(node, captured.graph)
        assert found is not None
        assert torch.equal(found.evaluate({"weight": module.weight}), expected.detach())


EXPERTS, OUT, IN = 3, 6, 4


class Chooses(nn.Module):
    """`bmm(x, choice(stack, ids))`."""

    def __init__(self, choice: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(EXPERTS, OUT, IN))
        self.choice = choice

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor]:
        return (torch.bmm(x, self.choice(self.stack, ids)),)


def chosen(choice: Callable[[Tensor, Tensor], Tensor], features: int) -> tuple[Chooses, SelectedParameter | None]:
    module = Chooses(choice)
    count = EXPERTS if "ids" not in choice.__code__.co_varnames[1:2] else 5
    captured = capture_graph(module, torch.randn(count, 2, features), torch.tensor([0, 2, 1, 1, 0])[:count])
    (product,) = outputs(captured)
    return module, selected_parameter(product.args[1], captured.graph)


@pytest.mark.parametrize(
    ("choice", "features", "expected"),
    [
        (lambda stack, _: stack, OUT, lambda stack: stack),
        (lambda stack, _: stack.mT, IN, lambda stack: stack.mT),
        (lambda stack, ids: stack[ids], OUT, lambda stack: stack),
        (lambda stack, ids: stack[ids].mT, IN, lambda stack: stack.mT),
        (lambda stack, ids: stack.mT[ids], IN, lambda stack: stack.mT),
        (lambda stack, ids: stack.index_select(0, ids).transpose(1, 2), IN, lambda stack: stack.mT),
        (lambda stack, ids: (2 * stack)[ids], OUT, lambda stack: 2 * stack),
        (lambda stack, ids: stack.bfloat16()[ids].mT.float(), IN, lambda stack: stack.bfloat16().mT.float()),
        (lambda stack, ids: (stack * ids.sum())[ids], OUT, None),
        (lambda stack, ids: stack[ids].relu(), OUT, None),
        (lambda stack, ids: stack[ids] * 2, OUT, None),
        (lambda stack, ids: stack[ids].flip(1), OUT, None),
        (lambda stack, ids: stack[ids].flip(0), OUT, None),
        (lambda stack, ids: stack[ids][:, ids], 5, None),
    ],
)
def test_a_choice_of_entries_commutes_with_the_expression(
    choice: Callable[[Tensor, Tensor], Tensor],
    features: int,
    expected: Callable[[Tensor], Tensor] | None,
) -> None:
    """What is in the expression is applied to the whole stack, before entries are chosen from it."""
    module, found = chosen(choice, features)
    if expected is None:
        assert found is None or found.selection is None
        return
    assert found is not None
    stack = found.expression.evaluate({"stack": module.stack})
    assert torch.equal(stack, expected(module.stack).detach())
    assert found.shape == tuple(stack.shape)
    assert (found.selection is None) == (choice.__code__.co_varnames[1] == "_")


class Nameless(nn.Module):
    """Modules in a plain list have parameters without a path of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.named = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.named(self.plain[1](self.plain[0](x))),)


def test_no_two_parameters_have_one_path() -> None:
    """What is folded is looked up by path: one for two would be a wrong weight."""
    captured = capture_graph(Nameless(), torch.randn(3, 4))
    assert sorted(captured.graph.paths.values()) == ["named.bias", "named.weight"]


class Changing(nn.Module):
    """Dynamo reaches the parameters of what was changed while it traced by another way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.a, self.inner.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.inner.calls = 1
        return (self.inner.b(self.inner.a(x)),)


def test_a_path_does_not_depend_on_how_it_was_reached() -> None:
    captured = capture_graph(Changing(), torch.randn(3, 4))
    assert sorted(captured.graph.paths.values()) == ["inner.a.weight", "inner.b.weight"]


class Constant(nn.Module):
    def forward(self, count: int) -> tuple[Tensor]:
        return (torch.ones(4) * count,)


def test_a_graph_without_tensors_among_its_inputs() -> None:
    captured = capture_graph(Constant(), 3)
    assert not captured.graph.paths
    assert captured.fake_mode is not None
