"""From a Dynamo graph to the functional ATen graph with its real parameters. Calibration and the backend share it."""

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Node

from larosa_compile import registry
from larosa_compile.arrival import origins, unreadable
from larosa_compile.errors import InferenceOnlyError, ModelError
from larosa_compile.passes.graph import GraphInvariantError, ParameterGraph, Refusal
from larosa_compile.passes.quantised import is_quantised, take_values

_log = logging.getLogger("larosa_compile")

Boxed = Callable[[list[Any]], Any]
"""A compiled graph: takes its inputs as one list, which it may clear, and returns the outputs."""


@dataclass(frozen=True)
class Captured:
    """An ATen graph as Inductor would compile it.

    graph: the graph and its parameters' paths. tensors: parameter placeholder -> the real parameter.
    inputs: what the graph was first called with, in order; fakes: their fake values. compile_arguments: what
    Inductor's own compile step needs besides. attention_mask: the input that a caller gave by this name, if any.
    unreadable: of the model's tensors, those that hold codes of which only their modules know the meaning.
    """

    graph: ParameterGraph
    tensors: dict[Node, torch.Tensor]
    inputs: list[Any]
    fakes: list[Any]
    fake_mode: FakeTensorMode
    compile_arguments: dict[str, Any]
    attention_mask: Node | None = None
    unreadable: tuple[Refusal, ...] = ()

    @property
    def origins(self) -> tuple[str, ...]:
        """What its parameters were before, in a sentence each."""
        return origins(list(self.tensors.values()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter path -> shape."""
        return {self.graph.paths[node]: tuple(tensor.shape) for node, tensor in self.tensors.items()}

    def renamed(self, names: Mapping[str, str]) -> "Captured":
        """The same graph with its parameters known by other paths: old -> new."""
        paths = {node: names[path] for node, path in self.graph.paths.items()}
        return replace(self, graph=ParameterGraph(self.graph.module, paths))

    def copy(self) -> "Captured":
        """A copy whose graph can be rewritten without touching this one; nodes keep their names."""
        module = GraphModule(self.graph.module, copy.deepcopy(self.graph.graph))
        by_name = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
        paths = {by_name[node.name]: path for node, path in self.graph.paths.items()}
        tensors = {by_name[node.name]: tensor for node, tensor in self.tensors.items()}
        mask = self.attention_mask and by_name[self.attention_mask.name]
        return replace(self, graph=ParameterGraph(module, paths), tensors=tensors, attention_mask=mask)


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
    check_is_readable(real)
    paths = _parameter_paths(dynamo_graph, real)
    mask = _attention_mask(dynamo_graph, real)
    codes = unreadable(_stored(dynamo_graph, real))
    if codes:
        more = f" and {len(codes) - 1} more" if len(codes) > 1 else ""
        _log.warning("%s%s: %s", codes[0].site, more, codes[0].reason)
    _guard_identity(dynamo_graph, paths)

    def inner_compile(module: GraphModule, fakes: Sequence[Any], **arguments: Any) -> Any:
        with unset_fake_temporarily():
            # AOTAutograd compiles under its fake mode; whoever needs that mode finds it in Captured
            captured = _captured(module, list(fakes), real, paths, mask, arguments)
            return compile_graph(replace(captured, unreadable=codes))

    # AOTAutograd's cache is keyed by Dynamo's graph alone: it would hand out what Inductor, or another recipe,
    # compiled from the same model before
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(
            dynamo_graph,
            [_stand_in(value) if is_quantised(value) else value for value in real],
            inner_compile=inner_compile,
            config_patches=inductor_options or None,
        )


def check_has_values(parameters: Iterable[torch.Tensor]) -> None:
    """Refuses parameters that have a shape and nothing else.

    Raises:
        ModelError: one is on the meta device.
    """
    if any(parameter.is_meta for parameter in parameters):
        raise ModelError(
            "this model's weights are on device 'meta', which holds no values, where the CPU or an accelerator is "
            "allowed; load the model with from_pretrained, or fill it after model.to_empty(device=…)"
        )


def check_is_readable(inputs: Iterable[Any]) -> None:
    """Refuses tensors of classes that keep their values in other tensors and do not say what these stand for.

    Raises:
        ModelError: there is one.
    """
    for tensor in inputs:
        # every tensor has a method of this name, for torch's own quantised dtypes
        says_so = getattr(type(tensor), "dequantize", None) is not torch.Tensor.dequantize
        if is_quantised(tensor) and not (says_so and isinstance(tensor, torch.nn.Parameter)):
            raise ModelError(
                f"a weight {list(tensor.shape)} is a {type(tensor).__name__}, where plain tensors and "
                "parameters whose class has a dequantize() are allowed; load the model unquantised and give "
                "options={'weights': 'int8'} (or 'int4') for small weights"
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
    module: GraphModule,
    fakes: list[Any],
    real: list[Any],
    paths: dict[int, str],
    mask: int | None,
    arguments: dict[str, Any],
) -> Captured:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    aligned = len(placeholders) == len(real) and all(
        not isinstance(tensor, torch.Tensor) or len(fake.shape) == tensor.ndim
        for fake, tensor in zip(fakes, real, strict=True)
    )
    if not aligned:
        raise GraphInvariantError("capture", None, "the ATen graph's inputs must be the Dynamo graph's, in order")
    # a graph may have no tensor among its inputs
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None
    by_node = {placeholders[index]: path for index, path in paths.items()}
    tensors = {placeholders[index]: real[index] for index in paths}
    graph = ParameterGraph(module, by_node)
    take_values(graph, [node for node, tensor in zip(placeholders, real, strict=True) if is_quantised(tensor)])
    values = [_without_guards(value) for value in real]
    attention_mask = None if mask is None else placeholders[mask]
    return Captured(graph, tensors, values, fakes, fake_mode, arguments, attention_mask)


def _stand_in(quantised: torch.Tensor) -> torch.Tensor:
    """A fake plain tensor for a quantised one: traced with it, a graph has its products rather than its arithmetic."""
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None
    with fake_mode:
        return torch.empty(quantised.shape, dtype=quantised.dtype, device=quantised.device)


def _without_guards(value: Any) -> Any:
    """A symbolic size as the number it was traced with; to ask for it as a number would bind the graph to it."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _parameter_paths(dynamo_graph: GraphModule, real: list[Any]) -> dict[int, str]:
    """Position among the inputs -> parameter path, for the inputs that are parameters.

    What two parameters would share is no name: as inputs like any other they stay as they are.
    """
    placeholders = (node for node in dynamo_graph.graph.nodes if node.op == "placeholder")
    paths: dict[int, str] = {}
    named: dict[str, set[int]] = defaultdict(set)
    for index, (node, tensor) in enumerate(zip(placeholders, real, strict=True)):
        source = getattr(node, "_dynamo_source", None)
        if isinstance(tensor, torch.nn.Parameter) and source is not None:
            path = registry.path_of(tensor) or parameter_path(source.name)
            if path:
                paths[index] = path
                named[path].add(id(tensor))
    return {index: path for index, path in paths.items() if len(named[path]) == 1}


def _stored(dynamo_graph: GraphModule, real: list[Any]) -> dict[str, torch.Tensor]:
    """Path -> parameter or buffer of a module, for those that the graph reads."""
    placeholders = (node for node in dynamo_graph.graph.nodes if node.op == "placeholder")
    sources = ((getattr(node, "_dynamo_source", None), tensor) for node, tensor in zip(placeholders, real, strict=True))
    named = ((parameter_path(source.name), tensor) for source, tensor in sources if source is not None)
    return {path: tensor for path, tensor in named if path and isinstance(tensor, torch.Tensor)}


def _attention_mask(dynamo_graph: GraphModule, real: list[Any]) -> int | None:
    """Position among the inputs of the first tensor that a caller gave as `attention_mask`, or as an entry of it."""
    placeholders = (node for node in dynamo_graph.graph.nodes if node.op == "placeholder")
    for index, (node, tensor) in enumerate(zip(placeholders, real, strict=True)):
        name = source.name if (source := getattr(node, "_dynamo_source", None)) is not None else ""
        # an argument, or an entry of one; what a module holds is behind one of its private attributes
        if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and "['attention_mask']" in name and "._" not in name:
            return index
    return None


def _guard_identity(dynamo_graph: GraphModule, paths: Iterable[int]) -> None:
    """Makes Dynamo compile again for other parameters of equal shape: what is made of these is right for these alone.

    Without it, a second model of one class would run the graph, folded weights included, of the first.
    """
    placeholders = [node for node in dynamo_graph.graph.nodes if node.op == "placeholder"]
    guards = TracingContext.get().guards_context.dynamo_guards
    for index in paths:
        guards.add(placeholders[index]._dynamo_source.make_guard(GuardBuilder.ID_MATCH))


_PATH = re.compile(
    r"""
    (?: (?: \._modules | \.__dict__\['_modules'\] ) \['[^']+'\] )*
    (?: \._(?:parameters|buffers) | \.__dict__\['_(?:parameters|buffers)'\] ) \['[^']+'\] $
    """,
    re.VERBOSE,
)


def parameter_path(source: str) -> str:
    """`L['self']._modules['model']._parameters['weight']` -> `model.weight`; "" if it names no parameter or buffer."""
    found = _PATH.search(source)
    names: list[str] = re.findall(r"\['([^']+)'\]", found[0]) if found else []
    return ".".join(name for name in names if name not in ("_modules", "_parameters", "_buffers"))
