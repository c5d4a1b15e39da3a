"""What a captured graph computes in float64, and what the method makes of it before any rewrite."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from larosa_compile.capture import Captured
from larosa_compile.passes.graph import aten, is_call, prims
from tests.support.simulation import keep_largest

if TYPE_CHECKING:
    from tests.support.stages import Stages

Operands = Mapping[Node, tuple[int, Callable[[Tensor], Tensor]]]
"""Product -> the position of its activation, and what becomes of that."""

_ROUNDED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Casts to these only round; to eight bits is an operation of the model."""


def in_float64(captured: Captured, graph: Graph, values: list[Any], changed: Operands | None = None) -> list[Any]:
    """What `graph` gives with every floating value, casts included, in float64."""
    return _Exact(captured.graph.module, graph, changed or {}).results(values)


class Evaluation(Interpreter):
    """Runs a graph whose strides may differ from those that were captured."""

    def __init__(self, module: GraphModule, graph: Graph) -> None:
        super().__init__(module, graph=graph)
        self.written: list[Any] = []

    def results(self, values: list[Any]) -> list[Any]:
        """The outputs, then what the graph writes to its inputs."""
        with torch.no_grad():
            return [*self.run(*values), *self.written]

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if is_call(node, aten.copy_.default):
            self.written.append(result.clone())
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # at its end the pipeline makes a reshape of every view that strides do not allow
        return super().call_function(aten.reshape.default if target is aten.view.default else target, args, kwargs)


class _Exact(Evaluation):
    def __init__(self, module: GraphModule, graph: Graph, changed: Operands) -> None:
        super().__init__(module, graph)
        self.changed = changed

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        return result.double() if isinstance(result, Tensor) and result.is_floating_point() else result

    def fetch_args_kwargs_from_env(self, node: Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(node)
        if node in self.changed:
            position, change = self.changed[node]
            args = (*args[:position], change(args[position]), *args[position + 1 :])
        return args, kwargs

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is prims.convert_element_type.default and args[1] in _ROUNDED:
            return args[0].double()
        if kwargs.get("dtype") in _ROUNDED:
            kwargs = kwargs | {"dtype": torch.float64}
        if "grouped_mm" in str(target):
            return _grouped(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _grouped(x: Tensor, weights: Tensor, offsets: Tensor | None = None, offs: Tensor | None = None) -> Tensor:
    ends = (offs if offsets is None else offsets).tolist()  # type: ignore[union-attr]
    parts = [x[start:end] @ weight for start, end, weight in zip([0, *ends], ends, weights, strict=False)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], weights.shape[-1])])


def sparse_operands(stages: "Stages") -> Operands:
    """`(x − s)/g → @ Q → Top-K → @ Qᵀ → · g + s` for the activation x of every planned product."""
    parameters = {stages.captured.graph.paths[node]: tensor for node, tensor in stages.captured.tensors.items()}
    changed: dict[Node, tuple[int, Callable[[Tensor], Tensor]]] = {}
    for site in stages.plan.sites:
        affine = site.reader.affine if site.reader else None
        scale, shift = affine.evaluate(parameters) if affine else (torch.ones(1), None)
        basis = stages.rotations[site.basis] if site.basis else torch.eye(site.group.features, dtype=torch.float64)
        change = partial(_sparse, scale=scale, shift=shift, basis=basis, kept=site.kept)
        for linear in site.linears:
            changed[linear.product] = (linear.product.args.index(linear.activation), change)
    return changed


def _sparse(x: Tensor, scale: Tensor, shift: Tensor | None, basis: Tensor, kept: int) -> Tensor:
    offset = torch.zeros(1) if shift is None else shift
    return keep_largest((x - offset) / scale @ basis, kept) @ basis.T * scale + offset
