"""From a Dynamo graph to the functional ATen graph with its real parameters. Calibration and the backend share it."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Node

from larosa_compile.errors import InferenceOnlyError
from larosa_compile.passes.graph import GraphInvariantError, ParameterGraph

Boxed = Callable[[list[Any]], Any]
"""A compiled graph: takes its inputs as one list, which it may clear, and returns the outputs."""


@dataclass(frozen=True)
class Captured:
    """An ATen graph as Inductor would compile it.

    graph: the graph and its parameters' paths. tensors: parameter placeholder -> the real parameter.
    fakes: the graph's fake inputs, in order. compile_arguments: what Inductor's own compile step needs besides.
    """

    graph: ParameterGraph
    tensors: dict[Node, torch.Tensor]
    fakes: list[Any]
    fake_mode: FakeTensorMode
    compile_arguments: dict[str, Any]


def capture(
    dynamo_graph: GraphModule,
    example_inputs: Sequence[Any],
    compile_graph: Callable[[Captured], Boxed],
    inductor_options: dict[str, Any] | None = None,
) -> Any:
    """Lowers a Dynamo graph to ATen the way Inductor does, and lets `compile_graph` turn that into a callable.

    Raises:
        InferenceOnlyError: gradients would have to flow through the graph.
    """
    if torch.is_grad_enabled() and any(
        isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in example_inputs
    ):
        raise InferenceOnlyError(
            "larosa compiles inference only, but gradients are enabled and the model's parameters require them; "
            "call the model under torch.no_grad() or torch.inference_mode()"
        )
    real = list(example_inputs)
    paths = _parameter_paths(dynamo_graph, real)
    _guard_identity(dynamo_graph, paths)

    def inner_compile(module: GraphModule, fakes: Sequence[Any], **arguments: Any) -> Any:
        with unset_fake_temporarily():
            # AOTAutograd compiles under its fake mode; whoever needs that mode finds it in Captured
            return compile_graph(_captured(module, list(fakes), real, paths, arguments))

    # AOTAutograd's cache is keyed by Dynamo's graph alone: it would hand out what Inductor, or another recipe,
    # compiled from the same model before
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(
            dynamo_graph,
            real,
            inner_compile=inner_compile,
            config_patches=inductor_options or None,
        )


def compile_alone(model: torch.nn.Module, backend: Callable[..., Any]) -> Any:
    """`torch.compile`, for a look at the graphs: neither meets nor uses up Dynamo's recompile limit of the model."""
    compile_model: Any = torch.compile  # its overloads lack the argument
    return compile_model(model, backend=backend, isolate_recompiles=True)


def boxed(function: Callable[[list[Any]], Any]) -> Boxed:
    """Marks a function as taking its arguments in one list (AOTAutograd's calling convention)."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def _captured(
    module: GraphModule, fakes: list[Any], real: list[Any], paths: dict[int, str], arguments: dict[str, Any]
) -> Captured:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    aligned = len(placeholders) == len(real) and all(
        not isinstance(tensor, torch.Tensor) or len(fake.shape) == tensor.ndim
        for fake, tensor in zip(fakes, real, strict=True)
    )
    if not aligned:
        raise GraphInvariantError("capture", None, "the ATen graph's inputs must be the Dynamo graph's, in order")
    fake_mode = next(fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode"))
    by_node = {placeholders[index]: path for index, path in paths.items()}
    tensors = {placeholders[index]: real[index] for index in paths}
    return Captured(ParameterGraph(module, by_node), tensors, fakes, fake_mode, arguments)


def _parameter_paths(dynamo_graph: GraphModule, real: list[Any]) -> dict[int, str]:
    """Position among the inputs -> parameter path, for the inputs that are parameters."""
    placeholders = (node for node in dynamo_graph.graph.nodes if node.op == "placeholder")
    paths = {}
    for index, (node, tensor) in enumerate(zip(placeholders, real, strict=True)):
        source = getattr(node, "_dynamo_source", None)
        if isinstance(tensor, torch.nn.Parameter) and source is not None:
            path = parameter_path(source.name)
            if path:
                paths[index] = path
    return paths


def _guard_identity(dynamo_graph: GraphModule, paths: Iterable[int]) -> None:
    """Makes Dynamo compile again for other parameters of equal shape: what is made of these is right for these alone.

    Without it, a second model of one class would run the graph, folded weights included, of the first.
    """
    placeholders = [node for node in dynamo_graph.graph.nodes if node.op == "placeholder"]
    guards = TracingContext.get().guards_context.dynamo_guards
    for index in paths:
        guards.add(placeholders[index]._dynamo_source.make_guard(GuardBuilder.ID_MATCH))


def parameter_path(source: str) -> str:
    """`L['self']._modules['model']._parameters['weight']` -> `model.weight`; "" if it names no parameter."""
    names = re.findall(r"\._(?:modules|parameters)\['([^']+)'\]", source)
    return ".".join(names)
