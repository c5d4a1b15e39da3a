"""The vocabulary of ATen graphs: nodes, their fake values, parameters' paths. Predicates only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
prims = torch.ops.prims


class GraphInvariantError(RuntimeError):
    """The graph broke a rule that a pass relies on: a defect of this package, never of the user's model."""

    def __init__(self, stage: str, node: Node | None, rule: str) -> None:
        where = f" at node '{node.name}'" if node is not None else ""
        super().__init__(f"larosa pass '{stage}'{where}: {rule}")


@dataclass(frozen=True)
class Refusal:
    """A place that stays dense and exact, and why. `site` is a parameter path or a node name."""

    site: str
    reason: str


@dataclass(frozen=True)
class ParameterGraph:
    """An ATen graph together with what its parameter placeholders are.

    module: the functional ATen graph, Inductor's decompositions applied.
    paths: placeholder -> parameter path ("model.layers.0.self_attn.q_proj.weight").
    """

    module: GraphModule
    paths: dict[Node, str]

    @property
    def graph(self) -> Graph:
        return self.module.graph


def value(node: object) -> torch.Tensor | None:
    """The fake tensor a node produces; None for what is no node or does not produce exactly one tensor."""
    fake = node.meta.get("val") if isinstance(node, Node) else None
    return fake if isinstance(fake, torch.Tensor) else None


def width(node: object) -> int | None:
    """Static size of the last dimension of a floating tensor of rank >= 1; None for anything else."""
    fake = value(node)
    if fake is None or fake.ndim == 0 or not fake.is_floating_point():
        return None
    last = fake.shape[-1]
    return last if isinstance(last, int) else None


def is_call(node: object, *targets: Callable[..., Any]) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def rows(node: Node) -> int | torch.SymInt:
    """Number of feature vectors a tensor holds: the product of all its sizes but the last."""
    fake = value(node)
    assert fake is not None
    return math.prod(fake.shape[:-1])
