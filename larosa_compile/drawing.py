"""A drawing of a residual stream with its rotations: one SVG, layers from top to bottom, no script and no fonts."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby

from larosa_compile.passes.graph import Refusal
from larosa_compile.report import GraphReport, OnlineReport, SiteReport
from larosa_compile.tally import OUTSIDE, layer_of, local_name

WIDTH = 360
"""Of the drawing, in pixels: a telephone's, so that text keeps its size there."""

STREAM, BOX, EDGE, ROW = 24, 78, 352, 24
"""x of the stream, of the left and of the right side of boxes; the height of a row."""

TITLE_COLUMNS, NAME_COLUMNS, REASON_COLUMNS = 50, 34, 50
"""Characters that fit beside each other: in the title, and in a box."""

OWN, ALTERNATING = "#8b95a1", ("#0f766e", "#b45309")
"""Colours of the model's own basis and of the others, in turns along the stream: neighbours differ."""

_STYLE = (
    ".larosa-stream text{font:11px system-ui,sans-serif;fill:#1f2933}"
    ".larosa-stream .small{font-size:9.5px;fill:#52606d}"
    ".larosa-stream .bold{font-weight:600}.larosa-stream .right{text-anchor:end}"
    ".larosa-stream .middle{text-anchor:middle}"
)
_LEGEND = "box: inputs kept of all; dot: a rotation computed at run time; Q: a basis"


@dataclass(frozen=True)
class _Bases:
    """How bases are shown: their short names, and their colours."""

    names: dict[str | None, str]
    colours: dict[str | None, str]

    @classmethod
    def of(cls, report: GraphReport) -> "_Bases":
        met = [_first_basis(report), *(item.end for item in report.online), *report.basis_names]
        order = [basis for basis in dict.fromkeys(met) if basis is not None]
        colours: dict[str | None, str] = {None: OWN}
        colours |= {basis: ALTERNATING[index % 2] for index, basis in enumerate(order)}
        return cls(report.basis_names | {key: key for key in order if key not in report.basis_names}, colours)


@dataclass(frozen=True)
class _Row:
    """Something in the drawing, drawn from y = 0 down, and the basis in which the stream leaves it."""

    svg: str
    height: int
    basis: str | None


def draw_streams(report: GraphReport) -> str:
    """The residual streams of one graph as SVG text.

    Down the left runs the stream, coloured by the basis it is in. To its right stand sites, filled as far as inputs
    are kept, and what stays dense, with the reason. Dots are rotations that are computed at run time.
    """
    bases = _Bases.of(report)
    title = "; ".join(map(str, report.streams)) or "no residual stream"
    parts, lines = [], []
    heading = [
        *((line, "bold") for line in textwrap.wrap(title, TITLE_COLUMNS)),
        (f"{report.recipe}; graph over {report.rows} token(s)", "small"),
        (_LEGEND, "small"),
    ]
    y = 16 * len(heading) + ROW
    started, basis = y - 10, _first_basis(report)
    for row in _rows(report, bases, basis):
        middle = y + row.height // 2
        if row.basis != basis:
            lines.append(_line(started, middle, bases.colours[basis]))
            started, basis = middle, row.basis
        parts.append(f'<g transform="translate(0 {y})">{row.svg}</g>')
        y += row.height
    end = y + 12
    lines.append(_line(started, end, bases.colours[basis]))
    tip = f'<path d="M{STREAM - 6} {end}h12l-6 9z" fill="{bases.colours[basis]}"/>'
    head = "".join(_text(8, 16 * line, said, kind) for line, (said, kind) in enumerate(heading, 1))
    height = end + ROW
    return (
        f'<svg class="larosa-stream" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img"><title>Residual stream: {escape(title)}</title>'
        f"<style>{_STYLE}</style>{head}{''.join(lines)}{tip}{''.join(parts)}</svg>\n"
    )


def _first_basis(report: GraphReport) -> str | None:
    """The basis in which the stream starts: a tied embedding may look its rows up in a head's."""
    if report.online:
        return report.online[0].start
    return next((site.read for site in report.sites if site.reads_stream), None)


def _rows(report: GraphReport, bases: _Bases, basis: str | None) -> Iterator[_Row]:
    """What stands along the stream, which starts in `basis`."""
    waiting, refusals = list(report.online), list(report.refusals)
    for layer, sites in groupby(report.sites, lambda site: layer_of(site.paths[0])):
        yield _Row(_text(BOX, ROW - 6, layer or "outside layers", "bold"), ROW + 2, basis)
        for site in sites:
            if site.reads_stream and site.read != basis:
                for item in _up_to(waiting, site.read):
                    basis = item.end if item.on_stream else basis
                    yield _rotation(item, bases, basis)
                if all(item.on_stream for item in report.online):
                    basis = site.read
            yield _Row(_site(site, bases), ROW, basis)
        here = [refusal for refusal in refusals if layer != OUTSIDE and layer_of(refusal.site) == layer]
        yield from (_refusal(refusal, basis) for refusal in here)
        refusals = [refusal for refusal in refusals if refusal not in here]
    for item in waiting:
        basis = item.end if item.on_stream else basis
        yield _rotation(item, bases, basis)
    if refusals:
        yield _Row(_text(BOX, ROW - 6, "elsewhere", "bold"), ROW + 2, basis)
    yield from (_refusal(refusal, basis) for refusal in refusals)


def _up_to(waiting: list[OnlineReport], end: str | None) -> list[OnlineReport]:
    """Takes the rotations up to the first that ends in a basis; none where no rotation does."""
    ends = [item.end for item in waiting]
    count = ends.index(end) + 1 if end in ends else 0
    taken, waiting[:] = waiting[:count], waiting[count:]
    return taken


def _rotation(item: OnlineReport, bases: _Bases, basis: str | None) -> _Row:
    x = STREAM if item.on_stream else (STREAM + BOX) // 2
    colour = bases.colours[item.end]
    said = f"{bases.names[item.start]} → {bases.names[item.end]}"
    branch = "" if item.on_stream else f'<path d="M{STREAM} 12H{BOX}" stroke="{colour}"/>'
    hint = f"{item.start or 'own'} to {item.end or 'own'}, after {item.source}"
    return _Row(
        f"<g><title>{escape(hint)}</title>{branch}"
        f'<circle cx="{x}" cy="12" r="5.5" fill="{colour}" stroke="#fff" stroke-width="1.5"/>'
        f"{_text(BOX + 6, 16, f'{said}, rotated at run time', 'small')}"
        f"{_text(EDGE - 6, 16, _megabytes(item.bytes), 'small right')}</g>",
        ROW,
        basis,
    )


def _site(site: SiteReport, bases: _Bases) -> str:
    width = EDGE - BOX
    kept = width * site.kept / site.features
    hint = (
        f"{', '.join(site.paths)}: keeps {site.kept} of {site.features} inputs, chosen by {site.selection}; "
        f"{site.outputs} outputs; "
        f"reads in {site.read or 'its own basis'}, writes in {site.written or 'its own basis'}; "
        f"{site.dense_bytes:,} bytes dense, {site.sparse_bytes:,} sparse"
    )
    arrows = ""
    if site.reads_stream:
        colour = bases.colours[site.read]
        arrows += (
            f'<path d="M{STREAM} 12H{BOX - 6}" stroke="{colour}"/><path d="M{BOX - 7} 8l7 4l-7 4z" fill="{colour}"/>'
        )
        arrows += _text((STREAM + BOX) // 2, 8, bases.names[site.read], "small middle")
    if site.writes_stream:
        colour, y = bases.colours[site.written], 16 if site.reads_stream else 12
        arrows += f'<path d="M{STREAM + 7} {y}H{BOX}" stroke="{colour}"/>'
        arrows += f'<path d="M{STREAM + 10} {y - 4}l-7 4l7 4z" fill="{colour}"/>'
        arrows += _text((STREAM + BOX) // 2 + 4, y - 4, bases.names[site.written], "small middle")
    return (
        f"<g><title>{escape(hint)}</title>{arrows}"
        f'<rect x="{BOX}" y="2" width="{width}" height="20" rx="3" fill="#fff" stroke="#b8c1cb"/>'
        f'<rect x="{BOX}.5" y="2.5" width="{kept - 1:.1f}" height="19" rx="2.5" fill="#dbe7ee"/>'
        f"{_text(BOX + 6, 16, _shortened(local_name(site.paths), NAME_COLUMNS))}"
        f"{_text(EDGE - 6, 16, f'{site.kept} / {site.features}', 'right')}</g>"
    )


def _refusal(refusal: Refusal, basis: str | None) -> _Row:
    layer = layer_of(refusal.site)
    name = local_name((refusal.site,)) if layer else refusal.site
    reason = textwrap.wrap(refusal.reason, REASON_COLUMNS)
    height = 22 + 13 * len(reason)
    lines = "".join(_text(BOX + 6, 29 + 13 * index, line, "small") for index, line in enumerate(reason))
    return _Row(
        f"<g><title>{escape(f'{refusal.site} stays dense: {refusal.reason}')}</title>"
        f'<rect x="{BOX}" y="2" width="{EDGE - BOX}" height="{height - 2}" rx="3" fill="#fff" stroke="#8b95a1" '
        f'stroke-dasharray="3 3"/>{_text(BOX + 6, 16, _shortened(name, NAME_COLUMNS))}'
        f"{_text(EDGE - 6, 16, 'dense', 'right')}{lines}</g>",
        height + 2,
        basis,
    )


def _text(x: float, y: float, said: str, classes: str = "") -> str:
    kind = f' class="{classes}"' if classes else ""
    return f'<text x="{x}" y="{y}"{kind}>{escape(said)}</text>'


def _line(start: float, end: float, colour: str) -> str:
    return f'<path d="M{STREAM} {start}V{end}" stroke="{colour}" stroke-width="4"/>'


def _shortened(said: str, columns: int) -> str:
    return said if len(said) <= columns else f"{said[: columns - 1]}…"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
