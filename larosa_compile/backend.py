"""`torch.compile(model, backend="larosa")`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from larosa_compile import registry
from larosa_compile.capture import Boxed, Captured, capture, check_has_values
from larosa_compile.collection import is_whole
from larosa_compile.compiled import compile_rewritten, lower_dense
from larosa_compile.config import Config
from larosa_compile.dump import GraphDump
from larosa_compile.errors import MissingRecipeError
from larosa_compile.online import compile_online
from larosa_compile.passes.graph import Refusal
from larosa_compile.passes.pipeline import rewrite
from larosa_compile.recipe import Recipe, SiteRecipe
from larosa_compile.released import is_released
from larosa_compile.report import described, report_of
from larosa_compile.self_check import find_fault
from larosa_compile.weights import FoldedWeights


def larosa(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Any:
    """The backend. `options`: see `larosa_compile.config.Config`; `mode`: as Inductor's.

    Without a recipe, in the options or by a calibration in this process, one is learnt from what the model is called
    with (`larosa_compile.online`).

    Raises:
        OptionError: an option is unknown or has a wrong value.
        MissingRecipeError: there is no recipe, and `calibration_tokens` is 0.
        RecipeError, RecipeMismatchError: the recipe cannot be read, or belongs to another model.
        InferenceOnlyError: gradients are enabled.
        ModelError: a parameter is on the meta device.
        ReleasedWeightsError: a weight that this graph needs was released after another was compiled.
    """
    config = Config.from_options(options)
    check_has_values(value for value in example_inputs if isinstance(value, torch.nn.Parameter))
    inductor_options = torch._inductor.list_mode_options(mode) if mode else {}

    def compile_graph(captured: Captured) -> Boxed:
        return _compile(captured, config)

    return capture(graph, example_inputs, compile_graph, inductor_options)


def _compile(captured: Captured, config: Config) -> Boxed:
    if not captured.tensors:
        # not a single parameter: nothing to read less of
        return lower_dense(captured, config)
    recipe = _recipe(config, captured)
    if recipe is None:
        return compile_online(captured, config)
    captured = captured.renamed(recipe.locate(captured.shapes))
    dump = GraphDump.start(config.dump)
    choices: dict[str, SiteRecipe] = dict(recipe.sites)
    faults: list[Refusal] = []
    # a model whose weights were released was checked, or not, when they were folded
    checked = config.self_check and not any(map(is_released, captured.tensors.values()))
    while True:
        attempt = captured.copy() if checked else captured
        rewritten = rewrite(attempt.graph, choices, captured.fake_mode, dump.graph)
        streaming = config.release_originals and not checked
        weights = FoldedWeights(list(rewritten.folded.values()), attempt, recipe, release=streaming)
        fault = find_fault(captured, attempt, rewritten, weights.tensors, recipe) if checked else None
        if fault is None or not choices:
            break
        faulty = fault.sites & choices.keys() or choices.keys()
        faults += [Refusal(path, fault.reason) for path in sorted(faulty)]
        choices = {path: choice for path, choice in choices.items() if path not in faulty}
    report = report_of(rewritten, described(recipe), faults)
    dump.text("report", str(report))
    registry.add_report(captured.tensors.values(), report)
    if fault is not None:
        # not even the graph without a site agrees, so the graph that was captured is the one to run
        return lower_dense(captured, config)
    if config.release_originals:
        weights.release()
    return compile_rewritten(attempt, config).with_weights(weights, config)


def _recipe(config: Config, captured: Captured) -> Recipe | None:
    """The recipe to compile a graph with, at the sparsity that was asked for; None where one is to be learnt."""
    recipe = config.recipe or registry.recipe_of(captured.tensors.values())
    if recipe is None or (config.recipe is None and not is_whole(captured.tensors.values())):
        if config.calibration_tokens == 0:
            raise MissingRecipeError(
                "backend 'larosa' needs a recipe for this model, and option 'calibration_tokens' is 0, so none is "
                "learnt: make one with larosa_compile.calibrate(model, batches), or pass one as "
                'torch.compile(model, backend="larosa", options={"recipe": "model.larosa.safetensors"})'
            )
        return None
    return recipe if config.sparsity is None else recipe.with_sparsity(config.sparsity)
