"""A captured graph rewritten, compiled while its weights are folded, and checked; again without sites at fault."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch._inductor.config as inductor_config

from larosa_compile.beside import beside
from larosa_compile.capture import Captured
from larosa_compile.compiled import CompiledGraph, compile_rewritten
from larosa_compile.config import Config
from larosa_compile.passes.graph import Refusal
from larosa_compile.passes.pipeline import Observer, Rewritten, pack, rewrite
from larosa_compile.recipe import Recipe
from larosa_compile.released import is_released
from larosa_compile.report import GraphReport, described, report_of
from larosa_compile.self_check import find_fault
from larosa_compile.site import SiteRecipe
from larosa_compile.trace import Trace
from larosa_compile.weights import FoldedWeights


@dataclass(frozen=True)
class Copy:
    """A rewritten copy of a captured graph, with its weights."""

    captured: Captured
    rewritten: Rewritten
    weights: FoldedWeights


@dataclass(frozen=True)
class Attempt:
    """A graph rewritten and compiled. read: what was compiled, which takes a graph apart; exact: what was checked."""

    read: Copy
    exact: Copy | None
    report: GraphReport
    compiled: CompiledGraph
    is_sound: bool = True


def attempted(captured: Captured, recipe: Recipe, config: Config, trace: Trace) -> Attempt:
    """Leaves sites out until the rewritten graph computes what the captured one does when nothing is dropped."""
    choices, faults = dict(recipe.sites), list[Refusal]()
    while True:
        attempt = _attempt(captured, recipe, config, trace, choices, faults)
        exact = attempt.exact
        if exact is None:
            return attempt
        with trace.stage("fold weights"):
            exact.weights.fold()
        with trace.stage("self-check"):
            fault = find_fault(captured, exact.captured, exact.rewritten, exact.weights.tensors, recipe)
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
    read = _copy(
        captured, recipe, choices, trace.graph, pack_as=recipe.weights if recipe.packs else None, release=release
    )
    exact = None
    if checked:
        with trace.stage("rewrite again"):
            exact = _copy(captured, recipe, choices)
    trace.plan(read.rewritten.plan)
    report = report_of(read.rewritten, captured, described(recipe), faults, recipe.packs)
    weights = (exact or read).weights
    with trace.stage(config.lowering), beside(weights.fold_one) if _leaves_time(captured, config) else nullcontext():
        compiled = compile_rewritten(read.captured, config)
    return Attempt(read, exact, report, compiled)


def _copy(
    captured: Captured,
    recipe: Recipe,
    choices: Mapping[str, SiteRecipe],
    observe: Observer = lambda stage, graph: None,
    pack_as: str | None = None,
    release: bool = False,
) -> Copy:
    """In fewer bits, a vocabulary matrix is no table to look embeddings up in."""
    own = captured.copy()
    rewritten = rewrite(own.graph, choices, own.fake_mode, observe, share_tables=not recipe.packs)
    if pack_as is not None:
        rewritten = pack(own.graph, rewritten, pack_as, own.fake_mode, observe)
    return Copy(own, rewritten, FoldedWeights(list(rewritten.folded.values()), own, recipe, release))


def _leaves_time(captured: Captured, config: Config) -> bool:
    """Whether other work may go on while a graph is compiled: not where kernels are timed, to choose from them."""
    tunes = inductor_config.max_autotune or inductor_config.max_autotune_gemm
    on_cpu = all(tensor.device.type == "cpu" for tensor in captured.tensors.values())
    return config.lowering == "inductor" and on_cpu and not tunes
