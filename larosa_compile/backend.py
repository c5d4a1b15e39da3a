"""`torch.compile(model, backend="larosa")`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx_inner
from torch.compiler import config as compiler_config
from torch.fx import GraphModule

import larosa_compile.kernels.lowering  # noqa: F401  (registers the lowerings of larosa:: ops)
from larosa_compile import registry
from larosa_compile.capture import Boxed, Captured, boxed, capture
from larosa_compile.config import Config
from larosa_compile.errors import MissingRecipeError
from larosa_compile.kernels.digest import source_digest
from larosa_compile.passes.graph import Refusal
from larosa_compile.passes.pipeline import Rewritten, pack, rewrite
from larosa_compile.recipe import Recipe, SiteRecipe
from larosa_compile.released import check_not_released, is_released
from larosa_compile.report import described, report_of
from larosa_compile.self_check import find_fault
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

    Raises:
        OptionError: an option is unknown or has a wrong value.
        MissingRecipeError: neither the options nor a calibration in this process give a recipe.
        RecipeError, RecipeMismatchError: the recipe cannot be read, or belongs to another model.
        InferenceOnlyError: gradients are enabled.
        ReleasedWeightsError: a weight that this graph needs was released after another was compiled.
    """
    started = time.perf_counter()
    config = Config.from_options(options)
    inductor_options = torch._inductor.list_mode_options(mode) if mode else {}

    def compile_graph(captured: Captured) -> Boxed:
        return _compile(captured, config, started)

    return capture(graph, example_inputs, compile_graph, inductor_options)


def _compile(captured: Captured, config: Config, started: float) -> Boxed:
    recipe = _recipe(config, captured)
    if recipe is None:
        # not a single parameter: nothing to read less of
        return _lower(captured, captured.fakes, captured.compile_arguments, config)
    captured = captured.renamed(recipe.locate(captured.shapes))
    trace = Trace(config.dump, started)
    # a model whose weights were released was checked, or not, when they were folded
    checked = config.self_check and not any(map(is_released, captured.tensors.values()))
    made = _checked(captured, recipe, trace) if checked else _rewritten(captured, recipe, recipe.sites, trace)
    if recipe.packs and made.is_sound:
        packed = pack(made.captured.graph, made.rewritten, recipe.weights, captured.fake_mode, trace.graph)
        made = replace(made, rewritten=packed)
    report = report_of(made.rewritten, described(recipe), made.faults, recipe.packs)
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
            compiled, run = _with_folded_weights(made.captured, weights, config)
        else:
            # not even the graph without a site agrees, so the graph that was captured is the one to run
            compiled = run = _lower(captured, captured.fakes, captured.compile_arguments, config)
    trace.generated(compiled)
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
    recipe = config.recipe or registry.recipe_of(captured.tensors.values())
    if recipe is None and captured.tensors:
        raise MissingRecipeError(
            "backend 'larosa' needs a recipe for this model: make one with larosa_compile.calibrate(model, batches), "
            'or pass one as torch.compile(model, backend="larosa", options={"recipe": "model.larosa.safetensors"})'
        )
    return recipe if recipe is None or config.weights is None else recipe.with_weights(config.weights)


def _with_folded_weights(captured: Captured, weights: FoldedWeights, config: Config) -> tuple[Boxed, Boxed]:
    """Compiles a rewritten graph: what was compiled, and the callable around it, which drops the inputs that are no
    longer read and appends the folded ones."""
    graph = captured.graph.graph
    count = len(captured.fakes)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    used = [index for index, node in enumerate(placeholders[:count]) if node.users or node not in captured.tensors]
    for index in sorted(set(range(count)) - set(used), reverse=True):
        graph.erase_node(placeholders[index])
    captured.graph.module.recompile()

    static = set(captured.compile_arguments.get("static_input_idxs", ()))
    arguments = captured.compile_arguments | {
        "static_input_idxs": [
            *(new for new, old in enumerate(used) if old in static),
            *range(len(used), len(used) + len(placeholders) - count),
        ]
    }
    fakes = [captured.fakes[index] for index in used] + [node.meta["val"] for node in placeholders[count:]]
    compiled = _lower(captured, fakes, arguments, config)
    folded = weights.tensors

    @boxed
    def run(inputs: list[Any]) -> Any:
        weights.check_fresh(inputs)
        if config.recipe_file is not None:
            config.recipe_file.check_unchanged()
        read = [inputs[index] for index in used]
        inputs.clear()
        return compiled([*read, *folded])

    return compiled, run


def _lower(captured: Captured, fakes: list[Any], arguments: dict[str, Any], config: Config) -> Boxed:
    check_not_released(tensor for node, tensor in captured.tensors.items() if node.users)
    module = captured.graph.module
    if config.lowering == "eager":
        return boxed(lambda inputs: module(*inputs))
    # Inductor's cache does not see the source of lowerings and templates that others registered
    tag = f"{compiler_config.cache_key_tag}larosa-{source_digest()}"
    with captured.fake_mode, compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Boxed = compile_fx_inner(module, fakes, **arguments)
    return compiled
