"""`torch.compile(model, backend="larosa")`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from larosa_compile import registry
from larosa_compile.capture import Boxed, Captured, capture, check_has_values
from larosa_compile.collection import is_whole
from larosa_compile.compiled import compile_rewritten, lower_dense
from larosa_compile.config import Config
from larosa_compile.errors import MissingRecipeError
from larosa_compile.memory import return_freed
from larosa_compile.online import compile_online
from larosa_compile.passes.graph import Refusal
from larosa_compile.passes.pipeline import Rewritten, pack, rewrite
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import DENSE
from larosa_compile.released import is_released
from larosa_compile.report import described, report_of
from larosa_compile.self_check import find_fault
from larosa_compile.site import SiteRecipe
from larosa_compile.trace import Trace
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
    # a model whose weights were released was checked, or not, when they were folded
    checked = config.self_check and not any(map(is_released, captured.tensors.values()))
    made = _checked(captured, recipe, trace) if checked else _rewritten(captured, recipe, recipe.sites, trace)
    if recipe.packs and made.is_sound:
        packed = pack(made.captured.graph, made.rewritten, recipe.weights, captured.fake_mode, trace.graph)
        made = replace(made, rewritten=packed)
    report = report_of(made.rewritten, captured, described(recipe), made.faults, recipe.packs)
    trace.plan(made.rewritten.plan)
    trace.report(report)
    registry.add_report(captured.tensors.values(), report)
    if made.is_sound:
        # what the self-check ran on, `made.weights`, is still there: these are the same, or are made of them
        release_each = config.release_originals and not checked
        with trace.stage("fold weights"):
            weights = FoldedWeights(list(made.rewritten.folded.values()), made.captured, recipe, release=release_each)
        if config.release_originals:
            weights.release()
    with trace.stage(config.lowering):
        if made.is_sound:
            compiled = compile_rewritten(made.captured, config)
            run = compiled.with_weights(weights, config)
            trace.generated(compiled.run)
        else:
            # not even the graph without a site agrees, so the graph that was captured is the one to run
            run = lower_dense(captured, config)
    return_freed()
    trace.done(report)
    return run


@dataclass(frozen=True)
class _Made:
    """A rewritten graph. weights: what the self-check ran it on; faults: the sites that it took out."""

    captured: Captured
    rewritten: Rewritten
    weights: FoldedWeights | None = None
    faults: tuple[Refusal, ...] = ()
    is_sound: bool = True


def _rewritten(captured: Captured, recipe: Recipe, choices: Mapping[str, SiteRecipe], trace: Trace) -> _Made:
    """Rewrites a captured graph in place. In fewer bits, a vocabulary matrix is no table to look embeddings up in."""
    return _Made(captured, rewrite(captured.graph, choices, captured.fake_mode, trace.graph, not recipe.packs))


def _checked(captured: Captured, recipe: Recipe, trace: Trace) -> _Made:
    """Rewrites copies of a captured graph until one computes what it does when nothing is dropped."""
    choices, faults = dict(recipe.sites), list[Refusal]()
    while True:
        made = _rewritten(captured.copy(), recipe, choices, trace)
        with trace.stage("fold weights"):
            weights = FoldedWeights(list(made.rewritten.folded.values()), made.captured, recipe)
        with trace.stage("self-check"):
            fault = find_fault(captured, made.captured, made.rewritten, weights.tensors, recipe)
        if fault is None or not choices:
            return replace(made, weights=weights, faults=tuple(faults), is_sound=fault is None)
        faulty = fault.sites & choices.keys() or choices.keys()
        faults += [Refusal(path, fault.reason) for path in sorted(faulty)]
        choices = {path: choice for path, choice in choices.items() if path not in faulty}


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
