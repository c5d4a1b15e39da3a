"""Perplexity against tokens per second, drawn from what `benchmarks.peers --json` wrote: the price of speed.

Both were measured in one run, on the same tokens; a file is a run, and what several have in common, torch.compile for
one, says how far their speeds can be compared. larosa has a line for each recipe and format of weights, along its
sparsities; any other peer has points, its types of weights. A dashed line is the dense model, as torch.compile runs it:
what lies above it is lost. Lower and further right is better. Needs the extra `report`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from larosa_compile.plots import MARKERS, MUTED, SERIES, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAROSA, DENSE = "larosa", "torch.compile"
HEIGHT = 4.2
"""Inches: points have names."""

CLOSE = 0.07
"""Of the width of the figure: the names of two points that are nearer would meet."""


@dataclass(frozen=True)
class Point:
    """What was measured of one peer. spread: of the tokens per second, lowest and highest median of a round."""

    name: str
    tokens_per_s: float
    spread: tuple[float, float]
    perplexity: float


def lines_of(records: Sequence[dict[str, Any]]) -> dict[str, list[Point]]:
    """Name of a line -> its points from slow to fast, for all records that have both numbers.

    Raises:
        ValueError: none has, or they are of several models.
    """
    measured = [record for record in records if record.get("tokens_per_s") and record.get("ppl")]
    models = {record["model"] for record in measured}
    if len(models) != 1:
        raise ValueError(
            f"a plot shows what was measured of one model, got {', '.join(sorted(models)) or 'no measurement'}; "
            "give a file that `python -m benchmarks.peers --json FILE` wrote"
        )
    lines: dict[str, list[Point]] = {}
    for record in measured:
        is_larosa = record["peer"].startswith(LAROSA)
        line = f"{record['peer']}, {record['weights']}" if is_larosa else record["peer"]
        name = f"{100 * record['sparsity']:.0f}" if is_larosa else record["weights"]
        point = Point(name, record["tokens_per_s"], tuple(record["spread"]), record["ppl"])
        lines.setdefault(line, []).append(point)
    return {line: sorted(points, key=lambda point: point.tokens_per_s) for line, points in lines.items()}


def close_to_next(points: Sequence[Point], distance: float) -> list[bool]:
    """Whether each of the points, from slow to fast, is less than so many tokens per second behind the next one."""
    gaps = (after.tokens_per_s - point.tokens_per_s for point, after in pairwise(points))
    return [gap < distance for gap in gaps] + [False]


def once_each(points: Sequence[Point]) -> list[Point]:
    """Of the points of one name the fastest, from slow to fast."""
    return sorted({point.name: point for point in points}.values(), key=lambda point: point.tokens_per_s)


def drawn(lines: dict[str, list[Point]], model: str) -> str:
    """The figure as SVG.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """

    fastest = max(point.tokens_per_s for points in lines.values() for point in points)

    def draw(axes: "Axes") -> None:
        # of larosa's lines colours are recipes and markers formats; any other peer has one line
        named = {name: name.rpartition(", ") if name.startswith(LAROSA) else (name, "", "") for name in lines}
        colours, markers = (list(dict.fromkeys(each[part] for each in named.values())) for part in (0, 2))
        for name, points in lines.items():
            peer, _, weights = named[name]
            style: dict[str, Any] = {
                "color": SERIES[colours.index(peer) % len(SERIES)],
                "marker": MARKERS[markers.index(weights) % len(MARKERS)],
            }
            speeds, losses = [point.tokens_per_s for point in points], [point.perplexity for point in points]
            below = [point.tokens_per_s - point.spread[0] for point in points]
            above = [point.spread[1] - point.tokens_per_s for point in points]
            # a peer's types of weights are no curve, larosa's sparsities are
            is_curve = name.startswith(LAROSA)
            told = f"{name}: {', '.join(point.name for point in points)} %" if is_curve else name
            joined = "-" if is_curve else "none"
            axes.errorbar(
                speeds, losses, xerr=[below, above], linestyle=joined, markersize=5, elinewidth=0.8, label=told, **style
            )
            # names along several curves would meet; theirs are in the legend. What several runs have is named once
            once = once_each(points)
            alone = [] if is_curve else zip(once, close_to_next(once, CLOSE * fastest), strict=True)
            for point, is_close in alone:
                # on either side, so that names of close points stay apart
                side, offset = ("right", (-5, 4)) if is_close else ("left", (5, -11))
                axes.annotate(
                    point.name,
                    (point.tokens_per_s, point.perplexity),
                    xytext=offset,
                    textcoords="offset points",
                    ha=side,
                    fontsize=8,
                    color=style["color"],
                )
        for point in lines.get(DENSE, [])[:1]:  # every run has it, and its loss is the same
            axes.axhline(
                point.perplexity, color=MUTED, linestyle="--", linewidth=1, label=f"dense, {point.perplexity:.4g}"
            )
        axes.margins(x=0.1, y=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens per second (bars: medians of rounds)")
        axes.set_ylabel("perplexity")
        axes.figure.legend(loc="outside upper left", handlelength=1.6)

    svg = figure("peers", f"Perplexity against decode speed of {model}, measured", draw, HEIGHT + 0.2 * len(lines))
    # on a page the text has its font
    return svg.replace("<svg", '<svg font-family="sans-serif"', 1)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    found = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.files]
    records = [record for one in found for record in one["records"]]
    try:
        lines = lines_of(records)
    except ValueError as error:
        sys.exit(f"benchmarks.plot: {error}")
    arguments.output.write_text(drawn(lines, records[0]["model"]), encoding="utf-8")
    print(f"{arguments.output}: {sum(map(len, lines.values()))} points in {len(lines)} series")


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what benchmarks.peers --json wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("peers.svg"), help="the SVG (default: peers.svg)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
