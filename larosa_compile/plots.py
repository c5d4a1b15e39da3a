"""The figures of a report page as inline SVG. matplotlib draws them, an optional extra that is imported here alone."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from larosa_compile.curves import Perplexities, Speeds
from larosa_compile.errors import MissingPackageError
from larosa_compile.report import GraphReport
from larosa_compile.tally import OUTSIDE, Tally, layer_of, local_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, PALE, ACCENT, SECOND = "#1f2933", "#52606d", "#e4e7eb", "#cbd2d9", "#0f766e", "#b45309"
SERIES = (ACCENT, SECOND, "#1d4ed8", "#7c3aed", "#be185d", "#4d7c0f", "#475569")
MARKERS = "osD^vP"
"""Beside the colours, for whoever cannot tell those apart."""

NAME_COLUMNS, LEGEND_COLUMNS = 19, 40
"""Characters of a name beside an axis and in a legend."""

WIDTH, HEIGHT = 4.3, 2.8
"""Inches, 72 units of the drawing each: about a telephone's width, so that text keeps its size there."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def figure(name: str, title: str, draw: "Callable[[Axes], None]", height: float = HEIGHT) -> str:
    """One figure as an `<svg>` element with a title. name: makes the ids inside unique to a page.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "the figures of a report are drawn by matplotlib, which is not installed; "
            'run: pip install "larosa-compile[report]"'
        ) from error
    out = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        drawn = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(drawn.add_subplot())
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: no prologue, ids of its own, as wide as its place."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    # the family is the page's; the size was measured with one that is wider than most
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"<svg([^>]*)>", rf'<svg\1 role="img"><title>{escape(title)}</title>', svg, count=1, flags=re.DOTALL)


def bytes_by_kind(tallies: Sequence[Tally]) -> str:
    """Dense and sparse bytes of every kind of site, as bars."""

    def draw(axes: "Axes") -> None:
        places = range(len(tallies))
        axes.barh(
            [place - 0.2 for place in places], [tally.dense / 1e6 for tally in tallies], 0.38, color=PALE, label="dense"
        )
        axes.barh(
            [place + 0.2 for place in places],
            [tally.sparse / 1e6 for tally in tallies],
            0.38,
            color=ACCENT,
            label="sparse",
        )
        axes.set_yticks(list(places), [_broken(tally.name) for tally in tallies], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("weight bytes per token, MB")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="best")

    return figure("kinds", "Weight bytes per token by kind of site, dense and sparse", draw, 1.1 + 0.42 * len(tallies))


def bytes_by_layer(tallies: Sequence[Tally]) -> str:
    """Dense and sparse bytes of every layer, the share of rotations apart."""
    layers = [tally for tally in tallies if tally.name != OUTSIDE]

    def draw(axes: "Axes") -> None:
        places = range(len(layers))
        kept = [(tally.sparse - tally.rotations) / 1e6 for tally in layers]
        axes.bar(places, [tally.dense / 1e6 for tally in layers], 0.85, color=PALE, label="dense")
        axes.bar(places, kept, 0.55, color=ACCENT, label="kept weights")
        axes.bar(places, [tally.rotations / 1e6 for tally in layers], 0.55, kept, color=SECOND, label="rotations")
        axes.set_xlabel("layer")
        axes.set_ylabel("weight bytes per token, MB")
        axes.grid(axis="x", visible=False)
        _whole_ticks(axes)
        axes.margins(y=0.22)
        axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1)

    return figure("layers", "Weight bytes per token by layer, dense and sparse", draw)


def sparsity_by_layer(report: GraphReport, tallies: Sequence[Tally]) -> str:
    """Share of inputs dropped by every site of a layer, and the share of the layer's bytes that this saves."""
    layers = [tally.name for tally in tallies if tally.name != OUTSIDE]

    def draw(axes: "Axes") -> None:
        points: dict[str, list[tuple[int, int]]] = {}
        for site in report.sites:
            layer = layer_of(site.paths[0])
            if layer != OUTSIDE:
                dropped = 100 * (1 - site.kept / site.features)
                points.setdefault(local_name(site.paths), []).append((layers.index(layer), round(dropped)))
        # kinds that drop the same everywhere would hide each other
        together: dict[tuple[tuple[int, int], ...], list[str]] = {}
        for name, found in points.items():
            together.setdefault(tuple(found), []).append(name)
        for index, (places, names) in enumerate(together.items()):
            style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
            label = "\n".join(_broken(name, LEGEND_COLUMNS) for name in names)
            axes.plot(*zip(*places, strict=True), linestyle="none", markersize=4, label=label, **style)
        skipped = [100 * (1 - tally.sparse / tally.dense) for tally in tallies if tally.name != OUTSIDE]
        axes.plot(range(len(layers)), skipped, color=INK, linewidth=1.4, label="bytes skipped in the layer")
        axes.set_ylim(min([0, *skipped]), 100)
        axes.set_xlabel("layer")
        axes.set_ylabel("dropped, %")
        _whole_ticks(axes)
        axes.figure.legend(loc="outside upper left", ncols=1, handlelength=1.2)

    kinds = len({local_name(site.paths) for site in report.sites})
    return figure("sparsity", "Share of inputs dropped by layer", draw, HEIGHT + 0.2 * kinds)


def spectra(spectra: dict[str, Tensor]) -> str:
    """Energy along the columns of every basis, in order; one line a basis, from the first (dark) to the last."""

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps

        for index, spectrum in enumerate(spectra.values()):
            colour = colormaps["viridis"](0.9 * index / max(1, len(spectra) - 1))
            components = range(1, len(spectrum) + 1)
            axes.plot(components, (100 * spectrum.double()).clamp_min(1e-9).tolist(), color=colour, linewidth=0.9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("component, largest first")
        axes.set_ylabel("share of energy, %")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)

    return figure("spectra", "Eigenvalue spectrum of every basis", draw)


def energy_kept(names: Sequence[str], kept: Sequence[float], shares: Sequence[float]) -> str:
    """Per basis: energy in the first k components, and the share of components that k is."""

    def draw(axes: "Axes") -> None:
        places = range(len(names))
        axes.plot(
            places, [100 * value for value in kept], "o", color=ACCENT, markersize=4, label="energy kept, at least"
        )
        axes.plot(places, [100 * value for value in shares], "_", color=SECOND, label="components kept")
        axes.set_ylim(0, 105)
        axes.set_xlabel("basis, in the order of the graph")
        axes.set_ylabel("%")
        _whole_ticks(axes)
        axes.legend(loc="lower right")

    return figure("energy", "Energy that Top-K keeps in every basis", draw)


def perplexity(measured: Perplexities) -> str:
    """Perplexity against nominal sparsity; the dense model is a dashed line."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator

        sparsities, values = zip(*measured.sparse.items(), strict=True)
        axes.plot([100 * one for one in sparsities], values, "o-", color=ACCENT, label="sparse")
        axes.axhline(measured.dense, color=MUTED, linestyle="--", linewidth=1, label=f"dense, {measured.dense:.4g}")
        if max(values) > 8 * measured.dense:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            _plain_ticks(axes.yaxis)
        axes.set_xlim(left=0)
        axes.set_xlabel("nominal sparsity, %")
        axes.set_ylabel("perplexity")
        axes.legend(loc="upper left")

    return figure("perplexity", "Perplexity against sparsity, measured", draw)


def speed(measured: Speeds) -> str:
    """Tokens per second against nominal sparsity, with the limit that memory bandwidth sets."""

    def draw(axes: "Axes") -> None:
        dense, *sparse = measured.variants
        at = [100 * (variant.sparsity or 0) for variant in sparse]
        medians = [1 / variant.seconds.median for variant in sparse]
        below = [1 / variant.seconds.median - 1 / variant.seconds.maximum for variant in sparse]
        above = [1 / variant.seconds.minimum - 1 / variant.seconds.median for variant in sparse]
        axes.errorbar(
            at, medians, [below, above], fmt="o-", color=ACCENT, capsize=2, label="larosa, median and extremes"
        )
        axes.axhline(1 / dense.seconds.median, color=MUTED, linestyle="--", linewidth=1, label="torch.compile, dense")
        limits = [(100 * (variant.sparsity or 0), 1 / measured.bound_s(variant)) for variant in measured.variants]
        axes.plot(*zip(*limits, strict=True), color=SECOND, linestyle=":", label="limit of memory bandwidth")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nominal sparsity, %")
        axes.set_ylabel("tokens per second")
        axes.figure.legend(loc="outside upper left", ncols=1)

    return figure("speed", "Decode speed against sparsity, measured", draw, HEIGHT + 0.4)


def _whole_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _plain_ticks(axis: Any) -> None:
    """Numbers instead of powers of ten, which mathematical text would spell with fonts of its own."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _broken(name: str, columns: int = NAME_COLUMNS) -> str:
    """A name on at most two lines, the middle of what does not fit left out."""
    import textwrap

    lines = textwrap.wrap(name, columns, break_on_hyphens=False)
    return "\n".join(lines if len(lines) <= 2 else [lines[0], f"{lines[1][: columns - 1]}…"])
