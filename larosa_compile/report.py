"""What the compiler did with a model, and what it left alone and why."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

from larosa_compile import registry
from larosa_compile.allocation import Coefficients, allocate
from larosa_compile.arguments import checked_sparsity
from larosa_compile.capture import Boxed, Captured, boxed, capture, compile_alone
from larosa_compile.errors import OptionError
from larosa_compile.passes.graph import Refusal, rows
from larosa_compile.passes.pipeline import Rewritten, facts_of, rewrite
from larosa_compile.passes.plan import Plan
from larosa_compile.passes.streams import Stream
from larosa_compile.recipe import Recipe


@dataclass(frozen=True)
class SiteReport:
    """One product over the weights of `paths`: `kept` of `features` inputs, `outputs` outputs.

    read, written: the bases folded into the weight on either side; None is the model's own.
    """

    paths: tuple[str, ...]
    features: int
    outputs: int
    kept: int
    read: str | None
    written: str | None
    dense_bytes: int
    sparse_bytes: int


@dataclass(frozen=True)
class StreamReport:
    """A residual stream: its width, who reads and writes it, and in which bases it is read."""

    features: int
    readers: int
    writers: int
    bases: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.features} features, {self.readers} reader groups, {self.writers} linear writers, "
            f"read in {len(self.bases)} bases"
        )


@dataclass(frozen=True)
class OnlineReport:
    """A rotation that is computed at run time, and the bytes of its matrix."""

    start: str | None
    end: str | None
    source: str
    bytes: int


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph. Byte counts are weight bytes read by one decode step of one sequence.

    rows: how many tokens the graph processes at once; with one, dropped weight rows are not read.
    other_bytes: weights of linears that stay dense.
    """

    rows: str
    recipe: str
    streams: tuple[StreamReport, ...]
    sites: tuple[SiteReport, ...]
    online: tuple[OnlineReport, ...]
    other_bytes: int
    refusals: tuple[Refusal, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all linear weights, as the uncompiled model reads them."""
        return sum(site.dense_bytes for site in self.sites) + self.other_bytes

    @property
    def sparse_bytes(self) -> int:
        """Bytes read instead: kept rows, rotations computed at run time, linears that stay dense."""
        return (
            sum(site.sparse_bytes for site in self.sites) + sum(item.bytes for item in self.online) + self.other_bytes
        )

    @property
    def bytes_skipped_share(self) -> float:
        """Share of the dense weight bytes that one decode step does not read, rotations counted against it."""
        return 1 - self.sparse_bytes / self.dense_bytes if self.dense_bytes else 0.0

    def __str__(self) -> str:
        bases = [basis for site in self.sites for basis in (site.read, site.written) if basis is not None]
        short = {basis: f"Q{index}" for index, basis in enumerate(dict.fromkeys(bases))} | {None: "own"}
        sites = _table("site", "shape", "k", "reads in", "writes in", "dense bytes", "sparse bytes")
        for site in self.sites:
            shape = f"{site.features} x {site.outputs}"
            counts = (f"{site.dense_bytes:,}", f"{site.sparse_bytes:,}")
            sites.add_row(_joined(site.paths), shape, str(site.kept), short[site.read], short[site.written], *counts)
        online = _table("rotation computed at run time", "after", "bytes")
        for item in self.online:
            online.add_row(f"{short[item.start]} -> {short[item.end]}", item.source, f"{item.bytes:,}")
        refusals = _table("dense and exact", "reason")
        for refusal in self.refusals:
            refusals.add_row(refusal.site, refusal.reason)
        streams = _table("residual stream")
        for stream in self.streams or ("none found",):
            streams.add_row(str(stream))
        header = (
            f"graph over {self.rows} token(s); {self.recipe}\n"
            f"linear weight bytes per decoded token: {self.dense_bytes:,} dense, {self.sparse_bytes:,} sparse "
            f"({self.bytes_skipped_share:.1%} skipped)"
        )
        names = "\n".join(f"{name} is the basis of {basis}" for basis, name in short.items() if basis is not None)
        tables = [_text(table) for table in (streams, sites, online, refusals) if table.row_count]
        return "\n\n".join(filter(None, [header, *tables, names]))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column == "k" or "bytes" in column else "left", no_wrap=True)
    return table


def _text(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=240, color_system=None, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _joined(paths: tuple[str, ...]) -> str:
    """`a.b.q.weight`, `a.b.k.weight` -> `a.b.q + k`."""
    names = [path.removesuffix(".weight") for path in paths]
    return " + ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def report_of(rewritten: Rewritten, recipe: str, faults: Sequence[Refusal] = ()) -> GraphReport:
    """The report of one rewritten graph.

    recipe: where its choices come from, in a few words. faults: what the self-check took out, and why.
    """
    plan = rewritten.plan
    sites = tuple(
        SiteReport(
            tuple(linear.path for linear in folded.site.group.linears),
            folded.site.group.features,
            sum(linear.out_features for linear in folded.site.group.linears),
            folded.site.kept,
            folded.site.basis,
            folded.written,
            folded.site.weight_bytes,
            folded.site.kept_bytes,
        )
        for folded in rewritten.sites
    )
    streams = tuple(
        StreamReport(stream.features, len(stream.readers), len(stream.writers), _bases_of(stream, plan))
        for stream in plan.facts.streams
    )
    online = tuple(
        OnlineReport(item.change.start, item.change.end, item.change.source.name, rewritten.folded[item.matrix].bytes)
        for item in rewritten.online
    )
    planned = {path for site in sites for path in site.paths}
    other = sum(linear.weight_bytes for linear in plan.facts.linears if linear.path not in planned)
    tokens = str(rows(plan.facts.linears[0].activation)) if plan.facts.linears else "0"
    # what a site was taken out for says more than that the plan has no choice for it
    reasons = {refusal.site: refusal for refusal in (*plan.refusals, *faults)}
    return GraphReport(tokens, recipe, streams, sites, online, other, tuple(reasons.values()))


def _bases_of(stream: Stream, plan: Plan) -> tuple[str, ...]:
    """The bases that a stream is read in, the model's own aside."""
    bases = [site.basis for site in plan.sites if site.reader in stream.readers and site.basis is not None]
    return tuple(dict.fromkeys(bases))


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
            choices = allocate(facts_of(planned.graph, planned.fake_mode), sparsity, Coefficients(), "layer")
            origin = f"not calibrated: the plan at nominal sparsity {sparsity:g}"
        else:
            planned = planned.renamed(recipe.locate(planned.shapes))
            choices, origin = dict(recipe.sites), described(recipe)
        graphs.append(report_of(rewrite(planned.graph, choices, planned.fake_mode), origin))
        return boxed(lambda inputs: module(*inputs))

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return capture(graph, inputs, plan_graph)

    with torch.no_grad():
        compile_alone(original, backend)(**example_inputs)
    return Report(graphs)


def described(recipe: Recipe) -> str:
    """A recipe in a few words."""
    return f"nominal sparsity {recipe.sparsity:g}, recipe {recipe.digest[:12]}"
