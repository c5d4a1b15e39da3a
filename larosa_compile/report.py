"""What the compiler did with a model, and what it left alone and why."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from larosa_compile.capture import Captured
from larosa_compile.passes.fold import FoldedSite
from larosa_compile.passes.graph import Refusal, rows
from larosa_compile.passes.pack import refuse_to_pack
from larosa_compile.passes.pipeline import Rewritten
from larosa_compile.passes.plan import Plan
from larosa_compile.passes.selection import TOP_K
from larosa_compile.passes.streams import Stream
from larosa_compile.recipe import Recipe


@dataclass(frozen=True)
class SiteReport:
    """One product over the weights of `paths`: `kept` of `features` inputs, `outputs` outputs.

    selection: how these are chosen; anything but "top-k" promises `kept`, and `sparse_bytes`, on average only.

    read, written: the bases folded into the weight on either side; None is the model's own.
    reads_stream, writes_stream: whether it reads a residual stream, and whether what it computes enters one.
    weights: the format of the weight; None is the model's own dtype.
    """

    paths: tuple[str, ...]
    features: int
    outputs: int
    kept: int
    read: str | None
    written: str | None
    dense_bytes: int
    sparse_bytes: int
    reads_stream: bool
    writes_stream: bool
    weights: str | None = None
    selection: str = TOP_K

    def with_share(self, share: float) -> "SiteReport":
        """The same with another share of the inputs kept, as it was measured; groups of packed codes scale alike."""
        kept = round(share * self.features)
        reads = self.sparse_bytes * kept // self.kept
        return replace(self, kept=kept, sparse_bytes=reads)


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
    """A rotation that is computed at run time, and the bytes of its matrix.

    on_stream: whether the stream itself goes on in the basis `end`; else only sites read what is rotated.
    """

    start: str | None
    end: str | None
    source: str
    bytes: int
    on_stream: bool


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph. Byte counts are weight bytes read by one decode step of one sequence.

    rows: how many tokens the graph processes at once; with one, dropped weight rows are not read.
    other_bytes: weights of linears that stay dense. origins: what weights were before they were folded, in sentences.
    """

    rows: str
    recipe: str
    streams: tuple[StreamReport, ...]
    sites: tuple[SiteReport, ...]
    online: tuple[OnlineReport, ...]
    other_bytes: int
    refusals: tuple[Refusal, ...]
    origins: tuple[str, ...] = ()

    def with_shares(self, shares: Mapping[str, float]) -> "GraphReport":
        """The same with what sites keep as it was measured. shares: by path; what is not there stays as it is."""
        sites = [site.with_share(shares[site.paths[0]]) if site.paths[0] in shares else site for site in self.sites]
        return replace(self, sites=tuple(sites))

    @property
    def is_average(self) -> bool:
        """Whether a site keeps what it does on average only, as thresholds do."""
        return any(site.selection != TOP_K for site in self.sites)

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

    @property
    def basis_names(self) -> dict[str | None, str]:
        """Short names of the bases, Q0, Q1, …, in the order of the sites; the model's own is "own"."""
        bases = [basis for site in self.sites for basis in (site.read, site.written) if basis is not None]
        return {basis: f"Q{index}" for index, basis in enumerate(dict.fromkeys(bases))} | {None: "own"}

    def __str__(self) -> str:
        short = self.basis_names
        columns = ("site", "shape", "k", "chosen by", "reads in", "writes in", "weights", "dense bytes", "sparse bytes")
        sites = _table(*columns)
        for site in self.sites:
            shape = f"{site.features} x {site.outputs}"
            form, counts = site.weights or "model", (f"{site.dense_bytes:,}", f"{site.sparse_bytes:,}")
            read, written = short[site.read], short[site.written]
            sites.add_row(_joined(site.paths), shape, str(site.kept), site.selection, read, written, form, *counts)
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
            f"({self.bytes_skipped_share:.1%} skipped{', on average: thresholds select' if self.is_average else ''})"
        )
        header = "\n".join([header, *self.origins])
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


def report_of(
    rewritten: Rewritten, captured: Captured, recipe: str, faults: Sequence[Refusal] = (), packs: bool = False
) -> GraphReport:
    """The report of one rewritten graph, and of the captured one that it was made from.

    recipe: where its choices come from, in a few words. faults: what the self-check took out, and why. packs: whether
    its weights were to be in fewer bits.
    """
    plan = rewritten.plan
    reading = {linear.path for reader in plan.facts.readers for linear in reader.group.linears}
    sites = tuple(
        _site_report(folded, folded.site.linears[0].path in reading, folded.site.linears[0].path in plan.facts.writers)
        for folded in rewritten.sites
    )
    streams = tuple(
        StreamReport(stream.features, len(stream.readers), len(stream.writers), _bases_of(stream, plan))
        for stream in plan.facts.streams
    )
    online = tuple(
        OnlineReport(
            item.change.start,
            item.change.end,
            item.change.source.name,
            rewritten.folded[item.matrix].bytes,
            bool(item.change.users),
        )
        for item in rewritten.online
    )
    planned = {path for site in sites for path in site.paths}
    other = sum(linear.weight_bytes for linear in plan.facts.linears if linear.path not in planned)
    unpacked = [
        Refusal(linear.path, reason)
        for folded in rewritten.sites
        if packs and (reason := refuse_to_pack(folded.site))
        for linear in folded.site.linears
    ]
    tokens = str(rows(plan.facts.linears[0].activation)) if plan.facts.linears else "0"
    # what a site was taken out for says more than that the plan has no choice for it
    reasons = {refusal.site: refusal for refusal in (*captured.unreadable, *plan.refusals, *unpacked, *faults)}
    refusals = tuple(reasons.values())
    return GraphReport(tokens, recipe, streams, sites, online, other, refusals, captured.origins)


def _site_report(folded: FoldedSite, reads_stream: bool, writes_stream: bool) -> SiteReport:
    site, form = folded.site, folded.form
    features, outputs = site.group.features, sum(linear.out_features for linear in site.linears)
    return SiteReport(
        tuple(linear.path for linear in site.linears),
        features,
        outputs,
        site.kept,
        site.basis,
        folded.written,
        site.weight_bytes,
        site.kept_bytes if form is None else form.bytes_read(site.kept, features, outputs),
        reads_stream,
        writes_stream,
        None if form is None else f"int{form.bits}",
        site.selection.rule if site.is_sparse else TOP_K,
    )


def _bases_of(stream: Stream, plan: Plan) -> tuple[str, ...]:
    """The bases that a stream is read in, the model's own aside."""
    bases = [site.basis for site in plan.sites if site.reader in stream.readers and site.basis is not None]
    return tuple(dict.fromkeys(bases))


def described(recipe: Recipe, dense_prompts: bool = False) -> str:
    """A recipe in a few words, and whether prompts are left whole."""
    weights = f", {recipe.weights} weights" if recipe.packs else ""
    prompts = ", dense prompts" if dense_prompts else ""
    return f"{recipe.method}, nominal sparsity {recipe.sparsity:g}{weights}{prompts}, recipe {recipe.digest[:12]}"
