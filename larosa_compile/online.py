"""A model without a recipe: it runs dense and exact while one is learnt from its own traffic, and sparse from then on.

Every graph of it is compiled sparse when it is captured, as far as that goes without rotations: shapes, sites and
numbers of kept features are known, and folded weights are inputs. So the switch compiles nothing and has no guard: it
folds the weights, checks the graph, and calls what is there. Until then the captured graph runs as it is, operation
by operation, and reports what its readers see. All graphs of a model share one collection.
"""

import logging
import threading
from dataclasses import dataclass, replace
from typing import Any

from larosa_compile import registry
from larosa_compile.allocation import Coefficients, allocate
from larosa_compile.capture import Boxed, Captured
from larosa_compile.collection import Collection
from larosa_compile.compiled import CompiledGraph, compile_rewritten, lower_dense
from larosa_compile.config import Config
from larosa_compile.copies import Copy, exact_copy, read_copy
from larosa_compile.errors import OptionError
from larosa_compile.moments import observe
from larosa_compile.passes.graph import Refusal
from larosa_compile.passes.pipeline import Rewritten, facts_of, rewrite
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import LAROSA, OWN_DTYPE
from larosa_compile.report import described, report_of
from larosa_compile.self_check import find_fault
from larosa_compile.trace import Trace

SPARSITY = 0.5
"""Nominal sparsity of what is learnt, where no option says another."""

_log = logging.getLogger("larosa_compile")

_joining = threading.Lock()


def compile_online(captured: Captured, config: Config, started: float) -> Boxed:
    """The graph in a callable that runs it dense, and sparse as soon as there is a recipe.

    started: when the backend was entered, as `time.perf_counter` says it.

    Raises:
        OptionError: the originals are to be released, which the dense graph reads; or the method is one of thresholds,
            which are not known yet when the graph is compiled.
    """
    if config.method not in (None, LAROSA):
        raise OptionError(
            f"option 'method' must be 'larosa' or 'dense' for a model that has no recipe yet, got {config.method!r}; "
            f"make one with larosa_compile.calibrate(model, batches, method={config.method!r})"
        )
    if config.release_originals:
        raise OptionError(
            "option 'release_originals' must be False for a model that has no recipe yet, got True; calibrate it "
            "first, or pass options={'recipe': …}"
        )
    # what the model was called with first would otherwise live as long as the graph, its cache included
    captured = replace(captured, inputs=[])
    with _joining:
        collection, captured, is_new = _collection_for(captured, config)
        observing = captured.copy()
        facts = facts_of(observing.graph, observing.fake_mode)
        sparsity = collection.sparsity if config.sparsity is None else config.sparsity
        choices = allocate(facts, sparsity, Coefficients(), "auto")
        if not choices:
            return _without_sites(captured, config)
        choices = collection.join(captured, choices)
    if is_new:
        _log.warning(
            "this model has no recipe: it runs dense and exact while larosa learns one from the next %d tokens, then "
            "sparse (nominal sparsity %g); options={'calibration_tokens': 0} turns this off, and "
            "larosa_compile.calibrate does it beforehand",
            collection.wanted,
            sparsity,
        )
    observe(facts, choices, collection.add, *filter(None, (observing.attention_mask,)))
    trace, weights = Trace(config.dump, started), config.weights or OWN_DTYPE
    exact = exact_copy(captured, choices, weights, dense_prompts=config.dense_prompts)
    read = read_copy(captured, choices, weights, trace.graph, config.dense_prompts)
    with trace.stage(config.lowering):
        compiled = compile_rewritten(read.captured, config)
    trace.plan(read.rewritten.plan)
    trace.generated(compiled.run)
    parts = _Parts(captured, exact, read.rewritten, compiled, trace)
    return _SwitchingGraph(collection, observing, parts, config)


@dataclass(frozen=True)
class _Parts:
    """What a switch needs. exact: what is checked; read: how what was compiled was rewritten, perhaps in fewer bits."""

    captured: Captured
    exact: Copy
    read: Rewritten
    compiled: CompiledGraph
    trace: Trace


class _SwitchingGraph:
    """A compiled graph (AOTAutograd's calling convention) that is dense until its collection has a recipe."""

    _boxed_call = True

    def __init__(self, collection: Collection, observing: Captured, parts: _Parts, config: Config) -> None:
        self._collection, self._config = collection, config
        self._dense = observing.graph.module
        self._parts: _Parts | None = parts
        self._final: Boxed | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> Any:
        final = self._final
        if final is None:
            # before a call and not after it: by then the other graphs of the model have been met
            recipe = self._collection.learnt()
            if recipe is None:
                return self._dense(*inputs)
            with self._lock:
                final = self._final = self._final or self._switched(recipe, inputs)
        return final(inputs)

    def _switched(self, recipe: Recipe, inputs: list[Any]) -> Boxed:
        """What the graph is from now on; dense, should the check find that it computes something else."""
        assert self._parts is not None
        parts, self._parts = self._parts, None
        exact, trace, recipe = parts.exact, parts.trace, self._config.applied_to(recipe)
        faults, checked = list[Refusal](), None
        if self._config.self_check:
            with trace.stage("fold weights"):
                checked = exact.weights(recipe).fold()
            met = replace(parts.captured, inputs=list(inputs))
            with trace.stage("self-check"):
                fault = find_fault(met, exact.captured, exact.rewritten, checked.tensors, recipe)
            sites = {linear.path for site in exact.rewritten.sites for linear in site.site.linears}
            faults = [Refusal(path, fault.reason) for path in sorted(sites)] if fault else []
        read = parts.read
        if faults:
            # compiled anew it is sparse where it can be: which sites these are is found there, one by one
            _log.warning(
                "a graph of this model stays dense, as its check failed; call torch._dynamo.reset() to compile it "
                "anew with what was learnt, without the sites at fault"
            )
            read = rewrite(parts.captured.copy().graph, {}, parts.captured.fake_mode)
        report = report_of(read, parts.captured, described(recipe, self._config.dense_prompts), faults, recipe.packs)
        trace.report(report)
        registry.add_report(parts.captured.tensors.values(), report)
        trace.done(report)
        if faults:
            return lower_dense(parts.captured, replace(self._config, lowering="eager"))
        # the weights that were `checked`, if they were, are still there: these are the same, or are made of them. The
        # graph that reads them was taken apart when it was compiled, hence the other one.
        weights = Copy(exact.captured, read).weights(recipe).fold()
        return parts.compiled.with_weights(weights, self._config)


def _without_sites(captured: Captured, config: Config) -> Boxed:
    """A graph, perhaps a part of a model, in which no linear feeds a residual stream."""
    report = report_of(rewrite(captured.copy().graph, {}, captured.fake_mode), captured, "nothing to learn: no site")
    registry.add_report(captured.tensors.values(), report)
    _log.info("a graph of this model has no linear that feeds a residual stream, so it stays dense")
    return lower_dense(captured, config)


def _collection_for(captured: Captured, config: Config) -> tuple[Collection, Captured, bool]:
    """The collection a graph reports to, the graph with its names, and whether it is a new one."""
    for known in registry.collections_of(captured.tensors.values()):
        names = known.names(captured)
        if known.recipe is None and names is not None:
            return known, captured.renamed(names), False
    return (
        Collection(SPARSITY if config.sparsity is None else config.sparsity, config.calibration_tokens),
        captured,
        True,
    )
