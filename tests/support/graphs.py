"""Captures small modules the way the backend does."""

from typing import Any

import torch

from larosa_compile.capture import Boxed, Captured, boxed, capture


def capture_graph(module: torch.nn.Module, *inputs: Any, dynamic: bool | None = None, **kwargs: Any) -> Captured:
    """The ATen graph of one call of `module`; the module must trace to a single graph."""
    found: list[Captured] = []

    def keep(captured: Captured) -> Boxed:
        found.append(captured)
        return boxed(lambda values: captured.graph.module(*values))

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return capture(graph, example_inputs, keep)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=dynamic)(*inputs, **kwargs)
    assert len(found) == 1, f"traced to {len(found)} graphs"
    return found[0]
