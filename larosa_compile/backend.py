"""`torch.compile(model, backend="larosa")`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from larosa_compile import registry
from larosa_compile.attempt import attempted
from larosa_compile.capture import Boxed, Captured, capture, check_has_values
from larosa_compile.collection import is_whole
from larosa_compile.compiled import lower_dense
from larosa_compile.config import Config
from larosa_compile.errors import MissingRecipeError
from larosa_compile.memory import return_freed
from larosa_compile.online import compile_online
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import DENSE
from larosa_compile.trace import Trace


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
        ModelError: a parameter is on the meta device, or of a class whose values cannot be read.
        ReleasedWeightsError: a weight that this graph needs was released after another was compiled.
    """
    started = time.perf_counter()
    config = Config.from_options(options)
    check_has_values(value for value in example_inputs if isinstance(value, torch.nn.Parameter))
    inductor_options = torch._inductor.list_mode_options(mode) if mode else {}

    def compile_graph(captured: Captured) -> Boxed:
        return _compile(captured, config, started)

    return capture(graph, example_inputs, compile_graph, inductor_options)


def _compile(captured: Captured, config: Config, started: float) -> Boxed:
    if not captured.tensors:
        # not a single parameter: nothing to read less of
        return lower_dense(captured, config)
    recipe = _recipe(config, captured)
    if recipe is None:
        return compile_online(captured, config, started)
    captured = captured.renamed(recipe.locate(captured.shapes))
    trace = Trace(config.dump, started)
    attempt = attempted(captured, recipe, config, trace)
    trace.report(attempt.report)
    registry.add_report(captured.tensors.values(), attempt.report)
    if attempt.is_sound:
        weights = attempt.weights
        with trace.stage("fold weights"):
            # what is left; what the self-check ran on is still there: these are the same, or are made of them
            weights.fold()
        if config.release_originals:
            weights.release()
        run = attempt.compiled.with_weights(weights, config)
        trace.generated(attempt.compiled.run)
    else:
        # not even the graph without a site agrees, so the graph that was captured is the one to run
        run = lower_dense(captured, config)
    return_freed()
    trace.done(attempt.report)
    return run


def _recipe(config: Config, captured: Captured) -> Recipe | None:
    """The recipe to compile a graph with, at the sparsity that was asked for; None where one is to be learnt."""
    if config.method == DENSE:
        return Recipe(0.0, {}, {}, captured.shapes, {}, method=DENSE)
    recipe = config.recipe or registry.recipe_of(captured.tensors.values())
    if recipe is None or (config.recipe is None and not is_whole(captured.tensors.values())):
        if config.calibration_tokens == 0:
            raise MissingRecipeError(
                "backend 'larosa' needs a recipe for this model, and option 'calibration_tokens' is 0, so none is "
                "learnt: make one with larosa_compile.calibrate(model, batches), or pass one as "
                'torch.compile(model, backend="larosa", options={"recipe": "model.larosa.safetensors"})'
            )
        return None
    return config.applied_to(recipe)
