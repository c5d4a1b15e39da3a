"""From a Dynamo graph to ATen: inputs, parameters by path, modes, caches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from larosa_compile.capture import Boxed, Captured, boxed, capture, parameter_path
from tests.support.decoder import Decoder, ids

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._parameters['weight']", "weight"),
        ("L['self']._modules['model']._parameters['weight']", "model.weight"),
        ("L['self']._modules['layers']._modules['0']._modules['q']._parameters['bias']", "layers.0.q.bias"),
        ("L['model']._modules['head']._parameters['weight']", "head.weight"),
        ("G['model']._modules['head']._parameters['weight']", "head.weight"),
        ("L['fn'].__closure__[0].cell_contents._modules['head']._parameters['weight']", "head.weight"),
        ("L['x']", ""),
        ("L['self']._modules['rope']._buffers['table']", "rope.table"),
    ],
)
def test_spellings_of_a_source(source: str, path: str) -> None:
    assert parameter_path(source) == path


def recording(found: list[Captured]) -> Callable[[GraphModule, list[Any]], Any]:
    """A backend that runs the captured graph as it is."""

    def keep(captured: Captured) -> Boxed:
        found.append(captured)
        return boxed(lambda values: captured.graph.module(*values))

    return lambda graph, inputs: capture(graph, inputs, keep)


def check_inputs(captured: Captured, model: nn.Module) -> None:
    """Placeholders, fakes and real parameters say the same, and paths are the model's own."""
    placeholders = [node for node in captured.graph.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(captured.fakes)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert captured.tensors.keys() == captured.graph.paths.keys()
    for node, path in captured.graph.paths.items():
        assert captured.tensors[node] is parameters[path]
        assert node.meta["val"].shape == parameters[path].shape
    for node, fake in zip(placeholders, captured.fakes, strict=True):
        if isinstance(fake, Tensor):
            assert str(node.meta["val"].shape) == str(fake.shape)


def closing_over(model: nn.Module) -> Callable[[Tensor], Any]:
    return lambda tokens: model(tokens)


@pytest.mark.parametrize("called", ["module", "function"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"positions": 16}])
def test_every_parameter_is_known_by_its_path(called: str, mode: Callable[[], Any], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, found = Decoder(layers=2, **options), []
    target = model if called == "module" else closing_over(model)
    with mode():
        (expected,) = model(ids(2, 5).fill_(3))
        (logits,) = torch.compile(target, backend=recording(found))(ids(2, 5).fill_(3))
    assert (logits - expected).norm() <= 16 * torch.finfo(torch.float32).eps * expected.norm()
    (captured,) = found
    check_inputs(captured, model)
    assert {id(tensor) for tensor in captured.tensors.values()} == {id(p) for p in model.parameters()}


def test_symbolic_sizes_stay_aligned_with_the_inputs() -> None:
    torch.manual_seed(0)
    model, found = Decoder(layers=1, positions=16), []
    compiled = torch.compile(model, backend=recording(found), dynamic=True)
    with torch.no_grad():
        for shape in ((2, 5), (3, 7)):
            tokens = ids(*shape)
            (expected,) = model(tokens)
            assert (compiled(tokens)[0] - expected).norm() <= 1e-5 * expected.norm()
    (captured,) = found
    check_inputs(captured, model)
    assert any(isinstance(fake, torch.SymInt) for fake in captured.fakes)


class Scaled(nn.Module):
    """Buffers, plain tensors and numbers next to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4))
        self.plain = torch.randn(4)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return x * self.weight * factor + self.shift + self.plain


def test_only_parameters_have_a_path() -> None:
    model, found = Scaled(), []
    x = torch.randn(3, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend=recording(found))(x, 2.0)
        assert torch.allclose(compiled, model(x, 2.0))
    assert list(found[0].graph.paths.values()) == ["weight"]


@pytest.mark.parametrize("replaced", [False, True])
def test_other_parameters_of_the_same_shape_are_captured_anew(replaced: bool) -> None:
    models, found = [Scaled(), Scaled()], []
    backend = recording(found)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.compile(models[0], backend=backend)(x, 2.0)
        torch.compile(models[0], backend=backend)(x, 2.0)
        assert len(found) == 1
        if replaced:
            models[0].weight = nn.Parameter(torch.randn(4))
        other = models[0] if replaced else models[1]
        torch.compile(other, backend=backend)(x, 2.0)
    assert len(found) == 2
    assert list(found[1].tensors.values()) == [other.weight]


def test_what_inductor_compiled_before_is_not_served() -> None:
    torch.manual_seed(0)
    model, found = Scaled(), []
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = torch.compile(model)(x, 2.0)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(model, backend=recording(found))(x, 2.0), expected)
        torch._dynamo.reset()
        torch.compile(model, backend=recording(found))(x, 2.0)
    assert len(found) == 2
