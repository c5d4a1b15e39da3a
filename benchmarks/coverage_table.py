"""How the records of `benchmarks.coverage` are counted and shown."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from benchmarks.coverage_record import Record

COLUMNS = ("family", "exact", "decode", "in sites", "bytes", "rotated", "online", "graphs", "s", "remark")
LEGEND = (
    "exact, decode: relative error of the logits at sparsity 0 against the eager model, of a prompt and of two tokens "
    "after one, read through the family's own cache. in sites, bytes: linear weights (routers and stacks of experts "
    "too) that are in a sparse site, of those that a forward reads, and their share of the bytes. rotated: residual "
    "streams read in a calibrated basis, of those found. online: rotations computed at run time."
)


@dataclass(frozen=True)
class Totals:
    """Counts over families. decodes: built ones that the eager model can decode; the rest is of what was built."""

    names: int
    built: int
    compiled: int
    exact: int
    decodes: int
    decode_exact: int
    rotated: int
    unfaulted: int
    median_share: float | None

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Totals":
        listed = list(records)
        built = [record for record in listed if record.built]
        shares = [record.sparse_bytes_share for record in built if record.linears.get("weights")]
        return cls(
            names=len(listed),
            built=len(built),
            compiled=sum(record.compiled for record in built),
            exact=sum(record.exact for record in built),
            decodes=sum(record.decode_exact is not None for record in built),
            decode_exact=sum(record.decode_exact is True for record in built),
            rotated=sum(record.streams_rotated > 0 for record in built),
            unfaulted=sum(record.compiled and not record.self_check_faults for record in built),
            # a family that did not compile has nothing in sites
            median_share=statistics.median(share or 0.0 for share in shares) if shares else None,
        )

    def rows(self) -> list[tuple[str, str]]:
        """What is counted, and the count."""
        return [
            ("run eagerly here", f"{self.built} of {self.names}"),
            ("compiled without an exception", f"{self.compiled} of {self.built}"),
            ("exact at sparsity 0", f"{self.exact} of {self.built}"),
            ("decode exact at sparsity 0", f"{self.decode_exact} of {self.decodes}"),
            ("compiled, and no site was taken out by the self-check", f"{self.unfaulted} of {self.compiled}"),
            ("with a rotated residual stream", f"{self.rotated} of {self.built}"),
            ("median share of linear weight bytes in sparse sites", _percent(self.median_share)),
        ]


def failing(records: Iterable[Record]) -> dict[str, list[str]]:
    """What does not hold -> the built families it does not hold for; only what some family fails."""
    built = [record for record in records if record.built]
    lists = {
        "not compiled": [record.family for record in built if not record.compiled],
        "compiled, not exact": [record.family for record in built if record.compiled and not record.exact],
        "decode not exact": [record.family for record in built if record.decode_exact is False],
        "cannot decode eagerly": [record.family for record in built if record.decode_exact is None],
        "sparsity changes nothing": [record.family for record in built if record.sparse_changes_logits is False],
        "sites taken out by the self-check": [record.family for record in built if record.self_check_faults],
        "fewer bytes in sites when decoding": [record.family for record in built if _loses_sites(record)],
        "no rotated stream": [record.family for record in built if record.compiled and not record.streams_rotated],
        "less than half of the bytes in sites": [
            record.family for record in built if record.compiled and (record.sparse_bytes_share or 0.0) < 0.5
        ],
    }
    return {what: names for what, names in lists.items() if names}


def line(record: Record) -> str:
    """A record in one line, for logs."""
    if not record.built:
        return f"{record.family}: out ({record.error})"
    _, exact, decode, inside, share, rotated, *_ = _row(record)
    state = f"exact {exact}" if record.compiled else exact
    facts = f"{state}, decode {decode}, sites {inside} ({share} of bytes), rotated {rotated}"
    return f"{record.family}: {facts}, {record.seconds_total:.0f} s" + (f"; {record.error}" if record.error else "")


def summary(records: Sequence[Record]) -> RenderableType:
    """Tables for a terminal: families, totals, and who fails what."""
    by_family = Table(*COLUMNS, box=None, pad_edge=False, caption=LEGEND, caption_justify="left")
    for column in by_family.columns[:-1]:
        column.no_wrap = True
    for record in _built(records):
        *cells, remark = _row(record)
        by_family.add_row(*cells, textwrap.shorten(remark, 120, placeholder=" …"))
    totals = Table("coverage", "families", box=None, pad_edge=False)
    for what, count in Totals.of(records).rows():
        totals.add_row(what, count)
    lists = Table("of these", "", box=None, pad_edge=False)
    for what, names in (failing(records) | _left_out(records)).items():
        lists.add_row(f"{what} ({len(names)})", ", ".join(names))
    return Group(by_family, "", totals, "", lists if lists.row_count else "")


def markdown(meta: dict[str, Any], records: Sequence[Record]) -> str:
    """The table file: totals, who fails what, a row per family, and the families that were left out."""
    lines = [
        "# Coverage of transformers' causal language models",
        "",
        f"`{meta['command']}` on {meta['date']}, commit {meta['commit']}: {meta['device']}, {meta['cpu_capability']}, "
        f"torch {meta['torch']}, transformers {meta['transformers']}, lowering {meta['lowering']}, float32. Tiny "
        f"models with random weights for {len(records)} names of the mapping of causal language models.",
        "",
        *_markdown_table(("", "families"), Totals.of(records).rows()),
        "",
    ]
    lines += [f"- {what} ({len(names)}): {', '.join(names)}" for what, names in failing(records).items()]
    lines += ["", "## Families", "", LEGEND, "", *_markdown_table(COLUMNS, map(_row, _built(records)))]
    out = [(record.family, record.error or "") for record in records if not record.built]
    if out:
        lines += ["", "## Not counted", "", "What transformers itself does not build or run here.", ""]
        lines += _markdown_table(("family", "error"), out)
    return "\n".join(lines) + "\n"


def _row(record: Record) -> tuple[str, ...]:
    weights = record.linears.get("weights", 0)
    decode = "-" if record.decode_exact is None else _error(record.decode_exact, record.decode_error_rel)
    return (
        record.family,
        _error(record.exact, record.error_rel) if record.compiled else "not compiled",
        decode,
        f"{record.sites} of {weights}",
        _percent(record.sparse_bytes_share)
        + (f", decode {_percent(record.decode_sparse_bytes_share)}" if _loses_sites(record) else ""),
        f"{record.streams_rotated} of {record.streams}",
        str(record.online_rotations),
        str(record.graphs),
        f"{record.seconds_total:.0f}",
        _remark(record),
    )


def _loses_sites(record: Record) -> bool:
    prefill, decode = record.sparse_bytes_share, record.decode_sparse_bytes_share
    return prefill is not None and decode is not None and _percent(decode) != _percent(prefill)


def _error(exact: bool, error: float | None) -> str:
    shown = "?" if error is None else f"{error:.0e}"
    return shown if exact else f"NO ({shown})"


def _remark(record: Record) -> str:
    """What went wrong, else what kept it dense, else the first weight outside every site."""
    remarks = [record.error or record.dense_reason]
    if not remarks[0] and record.missing:
        remarks = [f"{record.missing[0]['path']}: {record.missing[0]['reason']}"]
    if record.decode_reason:
        remarks.append(f"no decoding: {record.decode_reason}")
    return "; ".join(filter(None, remarks))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _built(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.built]


def _left_out(records: Iterable[Record]) -> dict[str, list[str]]:
    out = [record.family for record in records if not record.built]
    return {"not counted": out} if out else {}


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in escaped),
    ]
