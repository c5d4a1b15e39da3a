"""A captured graph rewritten, compiled while its weights are folded, and checked; again without sites at fault."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch._inductor.config as inductor_config

from larosa_compile.beside import beside
from larosa_compile.capture import Captured
from larosa_compile.compiled import CompiledGraph, compile_rewritten
from larosa_compile.config import Config
from larosa_compile.copies import Copy, exact_copy, read_copy
from larosa_compile.passes.graph import Refusal
from larosa_compile.recipe import Recipe
from larosa_compile.released import is_released
from larosa_compile.report import GraphReport, described, report_of
from larosa_compile.self_check import find_fault
from larosa_compile.site import SiteRecipe
from larosa_compile.trace import Trace
from larosa_compile.weights import FoldedWeights


@dataclass(frozen=True)
class Attempt:
    """A graph rewritten and compiled. weights: what it reads; exact: what is checked, with its weights, if it is."""

    compiled: CompiledGraph
    weights: FoldedWeights
    report: GraphReport
    exact: tuple[Copy, FoldedWeights] | None
    is_sound: bool = True


def attempted(captured: Captured, recipe: Recipe, config: Config, trace: Trace) -> Attempt:
    """Leaves sites out until the rewritten graph computes what the captured one does when nothing is dropped."""
    choices, faults = dict(recipe.sites), list[Refusal]()
    while True:
        attempt = _attempt(captured, recipe, config, trace, choices, faults)
        if attempt.exact is None:
            return attempt
        exact, weights = attempt.exact
        with trace.stage("fold weights"):
            weights.fold()
        with trace.stage("self-check"):
            fault = find_fault(captured, exact.captured, exact.rewritten, weights.tensors, recipe)
        if fault is None or not choices:
            return replace(attempt, is_sound=fault is None)
        faulty = fault.sites & choices.keys() or choices.keys()
        faults += [Refusal(path, fault.reason) for path in sorted(faulty)]
        choices = {path: choice for path, choice in choices.items() if path not in faulty}


def _attempt(
    captured: Captured,
    recipe: Recipe,
    config: Config,
    trace: Trace,
    choices: Mapping[str, SiteRecipe],
    faults: Sequence[Refusal],
) -> Attempt:
    """Rewrites and compiles; what there is no time to fold meanwhile is left. choices: without the sites at fault."""
    # a model whose weights were released was checked, or not, when they were folded
    checked = config.self_check and not any(map(is_released, captured.tensors.values()))
    # the check needs the originals
    release = config.release_originals and not checked
    read = read_copy(captured, choices, recipe.weights, trace.graph, config.dense_prompts)
    weights = read.weights(recipe, release)
    exact = None
    if checked:
        with trace.stage("rewrite again"):
            copy = exact_copy(captured, choices, recipe.weights, dense_prompts=config.dense_prompts)
            exact = copy, copy.weights(recipe)
    trace.plan(read.rewritten.plan)
    report = report_of(read.rewritten, captured, described(recipe, config.dense_prompts), faults, recipe.packs)
    first = exact[1] if exact else weights
    with trace.stage(config.lowering), beside(first.fold_one) if _leaves_time(captured, config) else nullcontext():
        compiled = compile_rewritten(read.captured, config)
    return Attempt(compiled, weights, report, exact)


def _leaves_time(captured: Captured, config: Config) -> bool:
    """Whether other work may go on while a graph is compiled: not where kernels are timed, to choose from them."""
    tunes = inductor_config.max_autotune or inductor_config.max_autotune_gemm
    on_cpu = all(tensor.device.type == "cpu" for tensor in captured.tensors.values())
    return config.lowering == "inductor" and on_cpu and not tunes
