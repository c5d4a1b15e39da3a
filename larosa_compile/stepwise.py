"""Rewritten graphs run operation by operation, by an interpreter that watches them or changes what they do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from larosa_compile.capture import Boxed, Captured, boxed, capture, compile_alone
from larosa_compile.passes.pipeline import Rewritten, rewrite
from larosa_compile.recipe import Recipe
from larosa_compile.site import SiteRecipe
from larosa_compile.weights import FoldedWeights


def compile_stepwise(
    model: torch.nn.Module,
    recipe: Recipe,
    interpreter: Callable[[GraphModule, Rewritten], Interpreter],
    sites: Mapping[str, SiteRecipe] | None = None,
) -> Any:
    """The model, called as ever; an interpreter is made for each of its graphs, and runs it with folded weights.

    sites: what the graphs are rewritten by, where that is not what the recipe says. Weights keep the model's dtype,
    whatever format the recipe asks for.
    """

    def interpreted(captured: Captured) -> Boxed:
        own = captured.copy().renamed(recipe.locate(captured.shapes))
        rewritten = rewrite(own.graph, recipe.sites if sites is None else sites, own.fake_mode)
        weights = FoldedWeights(list(rewritten.folded.values()), own, recipe).fold()
        made = interpreter(own.graph.module, rewritten)

        def run(inputs: list[Any]) -> Any:
            values = [*inputs, *weights.tensors]
            inputs.clear()
            return made.run(*values, enable_io_processing=False)

        return boxed(run)

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return capture(graph, inputs, interpreted)

    return compile_alone(model, backend)
