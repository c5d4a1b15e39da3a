"""Building nodes: every new node carries its fake value, every new weight is a named extra input of the graph."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from larosa_compile.passes.algebra import Rotations
from larosa_compile.passes.equivariance import rotation_operands
from larosa_compile.passes.graph import ParameterGraph, aten, prims, value
from larosa_compile.passes.parameters import Parameters

Columns = Callable[[slice], torch.Tensor]
"""Makes some columns of a weight [features, columns]."""


@dataclass(frozen=True)
class FoldedTensor:
    """A weight computed from parameters and rotations, to be passed to the graph as an extra input.

    key: spells everything the value depends on but the parameters' contents and the recipe.
    paths: the parameters it is made of. build: computes it, more exactly than `dtype` holds it. It holds no node and
    no fake tensor: it may run while another thread compiles the graph, and a fake tensor is on 'meta' while that one
    asks it for a result.
    columns: some columns of a weight, as `build` makes all. source: the folded weight that this one is made of, by
    `convert`, column by column, so that it need not be there as a whole.
    """

    key: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    build: Callable[[Parameters, Rotations], torch.Tensor]
    columns: Callable[[Parameters, Rotations, slice], torch.Tensor] | None = None
    source: "FoldedTensor | None" = None
    convert: Callable[[Columns], torch.Tensor] | None = None

    def converted(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, convert: Callable[[Columns], torch.Tensor]
    ) -> "FoldedTensor":
        """What `convert` makes of the columns of this weight. `name`: of the conversion."""
        make = self.columns
        assert make is not None

        def build(parameters: Parameters, rotations: Rotations) -> torch.Tensor:
            return convert(partial(make, parameters, rotations))

        key = f"{name} of {self.key}"
        return FoldedTensor(key, self.paths, shape, dtype, self.device, build, source=self, convert=convert)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class GraphEditor:
    """Edits one ATen graph in place; collects the folded tensors its new placeholders stand for."""

    source: ParameterGraph
    fake_mode: FakeTensorMode
    folded: dict[Node, FoldedTensor] = field(default_factory=dict)
    created: set[Node] = field(default_factory=set)
    _inputs: dict[str, Node] = field(init=False)
    _last_input: Node | None = None

    def __post_init__(self) -> None:
        self._inputs = {tensor.key: node for node, tensor in self.folded.items()}

    @property
    def graph(self) -> Graph:
        return self.source.graph

    @property
    def last_input(self) -> Node:
        """The last placeholder; what reads any input stands after it."""
        if self._last_input is None:
            # found once: looking for it at every insertion would take time quadratic in layers
            self._last_input = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        return self._last_input

    def inserting_after(self, node: Node) -> AbstractContextManager[Any]:
        """Insertion right after a node; after an input, behind all inputs."""
        after = node if node.op != "placeholder" else self.last_input
        manager: AbstractContextManager[Any] = self.graph.inserting_before(after.next)
        return manager

    def call(self, name: str, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Adds a call at the current insertion point."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        fakes = map_arg((args, kwargs), lambda operand: operand.meta["val"])
        with self.fake_mode:
            node.meta["val"] = target(*fakes[0], **fakes[1])
        self.created.add(node)
        return node

    def folded_input(self, name: str, tensor: FoldedTensor) -> Node:
        """The placeholder of a folded tensor; the same one when it is asked for again."""
        known = self._inputs.get(tensor.key)
        if known is not None:
            return known
        with self.graph.inserting_after(self.last_input):
            node = self.graph.create_node("placeholder", name, name=name)
            node.target = node.name  # a valid identifier by now
        with self.fake_mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self.folded[node] = tensor
        self._inputs[tensor.key] = self._last_input = node
        return node

    def drop_dead(self) -> None:
        """Erases what nothing reads any more, folded inputs included."""
        self.graph.eliminate_dead_code()
        self._last_input = None
        for node in [node for node in self.folded if not node.users]:
            del self._inputs[self.folded.pop(node).key]
            self.graph.erase_node(node)

    def replay(self, chain: tuple[Node, ...], onto: Node) -> Node:
        """Copies a chain of operations that carry on one tensor so that it starts from `onto`."""
        for step in chain:
            (previous,) = rotation_operands(step)
            assert callable(step.target)
            args, kwargs = map_arg((step.args, step.kwargs), partial(_replaced, old=previous, new=onto))
            onto = self.call(f"{step.name}_unscaled", step.target, *args, **kwargs)
        return onto

    def cast_like(self, node: Node, model: Node) -> Node:
        """The node in the dtype of `model`."""
        dtype = model.meta["val"].dtype
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(f"{node.name}_cast", prims.convert_element_type.default, node, dtype)

    def as_rows(self, node: Node) -> Node:
        """`[..., features]` seen as `[rows, features]`."""
        fake = value(node)
        assert fake is not None
        return (
            node if fake.ndim == 2 else self.call(f"{node.name}_rows", aten.reshape.default, node, [-1, fake.shape[-1]])
        )

    def like(self, rows: Node, model: Node) -> Node:
        """`[rows, features]` seen in the shape of `model`, whose sizes may be symbolic."""
        fake = value(model)
        assert fake is not None
        if fake.ndim == 2:
            return rows
        sizes = [
            size if isinstance(size, int) else self.call(f"{model.name}_size", aten.sym_size.int, model, dim)
            for dim, size in enumerate(fake.shape)
        ]
        return self.call(f"{rows.name}_shaped", aten.reshape.default, rows, sizes)


def _replaced(node: Node, old: Node, new: Node) -> Node:
    return new if node is old else node
