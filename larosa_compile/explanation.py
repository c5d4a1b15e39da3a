"""The report of a model: of the graphs that were compiled from it, or of the one that would be."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from larosa_compile import registry
from larosa_compile.allocation import Coefficients, allocate
from larosa_compile.arguments import checked_sparsity
from larosa_compile.capture import Boxed, Captured, boxed, capture, compile_alone
from larosa_compile.copies import read_copy
from larosa_compile.errors import OptionError
from larosa_compile.passes.pipeline import facts_of
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import OWN_DTYPE
from larosa_compile.report import GraphReport, described, report_of


class Report:
    """Every graph that was compiled from a model, or one that would be; `str()` is the text."""

    def __init__(self, graphs: list[GraphReport]) -> None:
        self.graphs = graphs

    def __str__(self) -> str:
        return "\n\n".join(str(graph) for graph in self.graphs)

    __repr__ = __str__


def explain(
    model: torch.nn.Module,
    *,
    recipe: Recipe | None = None,
    sparsity: float = 0.5,
    example_inputs: Mapping[str, Any] | None = None,
) -> Report:
    """What the backend did with a compiled model, or would do with one that was not compiled yet.

    Args:
        model: a model, or what `torch.compile(model, backend="larosa")` returned.
        recipe: for a model that was not compiled: the recipe to plan with. By default the model's own; without
            any, the plan that `calibrate` would make at `sparsity`.
        sparsity: nominal sparsity of that plan.
        example_inputs: keyword arguments to trace the model with; by default its `dummy_inputs`, one token.

    Raises:
        RecipeMismatchError: the recipe belongs to another model.
        OptionError: the model has no `dummy_inputs` and no example inputs were given; or `sparsity` is out of range.
    """
    sparsity = checked_sparsity("sparsity", sparsity)
    original: torch.nn.Module = getattr(model, "_orig_mod", model)
    reports = registry.reports_of(original.parameters()) if recipe is None else []
    if reports:
        return Report(reports)
    recipe = recipe or registry.recipe_of(original.parameters())
    if recipe is not None:
        # here rather than in the backend below, whose errors Dynamo wraps
        recipe.locate({registry.path_of(p) or path: tuple(p.shape) for path, p in original.named_parameters()})
    if example_inputs is None:
        dummy = getattr(original, "dummy_inputs", None)
        if not isinstance(dummy, Mapping) or "input_ids" not in dummy:
            raise OptionError("this model has no dummy_inputs to trace it with; pass example_inputs={…}")
        example_inputs = {"input_ids": dummy["input_ids"][:1, :1], "use_cache": False}
    graphs: list[GraphReport] = []

    def plan_graph(captured: Captured) -> Boxed:
        planned, module = captured.copy(), captured.graph.module
        if recipe is None:
            choices = allocate(facts_of(planned.graph, planned.fake_mode), sparsity, Coefficients(), "auto")
            origin = f"not calibrated: the plan at nominal sparsity {sparsity:g}"
        else:
            planned = planned.renamed(recipe.locate(planned.shapes))
            choices, origin = dict(recipe.sites), described(recipe)
        read = read_copy(planned, choices, OWN_DTYPE if recipe is None else recipe.weights)
        graphs.append(report_of(read.rewritten, captured, origin, packs=recipe is not None and recipe.packs))
        return boxed(lambda inputs: module(*inputs))

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return capture(graph, inputs, plan_graph)

    with torch.no_grad():
        compile_alone(original, backend)(**example_inputs)
    return Report(graphs)
