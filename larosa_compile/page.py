"""`html_report`: what a recipe does to a model, as one page that needs no network and no script."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import curves, plots
from larosa_compile.drawing import draw_streams
from larosa_compile.explanation import explain
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe
from larosa_compile.report import GraphReport
from larosa_compile.tally import OUTSIDE, by_kind, by_layer, layer_of

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Panel:
    """A figure with the numbers it is drawn from. note: what it shows and, if measured, how. svg: "" for none."""

    title: str
    note: str
    svg: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def html_report(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    windows: Sequence[Tensor] | None = None,
    speed: bool = False,
    name: str = "",
    progress: bool = True,
) -> str:
    """One self-contained page about a model under a recipe, as HTML text.

    Bytes read per token by kind of site and by layer, sparsity by layer, the spectra of the bases, what stays dense,
    and a drawing of the residual stream; all of that is known without running the model.

    Args:
        model: not compiled; in eval mode, on its device.
        recipe: what to plan with, at its own nominal sparsity.
        windows: token ids `[1, tokens]` of one length, to measure perplexity against sparsity on.
        speed: measure time per token against sparsity as well, which takes minutes on an idle machine.
        name: what the page calls the model; by default its class.
        progress: show progress bars on a terminal.

    Raises:
        MissingPackageError: matplotlib is not installed.
        RecipeMismatchError: the recipe belongs to another model.
        OptionError: windows differ in length, or the model has too few positions to be timed.
    """
    graphs = explain(model, recipe=recipe).graphs
    panels = [panel for graph in graphs for panel in known_panels(graph, recipe)]
    with progress_bar(progress) as bar:
        if windows is not None:
            task = bar.add_task("perplexity", total=1 + len(curves.sparsities_around(recipe)))
            panels.append(perplexity_panel(curves.perplexities(model, recipe, windows, lambda: bar.advance(task))))
        if speed:
            task = bar.add_task("speed", total=curves.speed_steps(recipe))
            panels.append(speed_panel(curves.speeds(model, recipe, lambda: bar.advance(task))))
    return rendered(name or type(model).__name__, graphs, recipe, panels)


def rendered(name: str, graphs: Sequence[GraphReport], recipe: Recipe, panels: Sequence[Panel]) -> str:
    """The page of these panels."""
    environment = Environment(
        loader=PackageLoader("larosa_compile", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    dense, sparse = (sum(getattr(graph, f"{kind}_bytes") for graph in graphs) for kind in ("dense", "sparse"))
    return environment.get_template(TEMPLATE).render(
        name=name,
        recipe=recipe,
        graphs=graphs,
        panels=panels,
        streams=[draw_streams(graph) for graph in graphs],
        refusals=[refusal for graph in graphs for refusal in graph.refusals],
        sites=sum(len(graph.sites) for graph in graphs),
        dense=dense,
        sparse=sparse,
        skipped=1 - sparse / dense if dense else 0.0,
        made={
            "made": datetime.date.today().isoformat(),
            "larosa_compile": larosa_compile.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        provenance=_flat(recipe.calibration),
    )


def known_panels(graph: GraphReport, recipe: Recipe) -> list[Panel]:
    """What is known of a graph without running it."""
    kinds, layers = by_kind(graph), by_layer(graph)
    return [
        Panel(
            "Bytes by kind of site",
            "Linear weight bytes that one decoded token reads. Rotations computed at run time count as read.",
            plots.bytes_by_kind(kinds),
            ("kind", "dense MB", "sparse MB"),
            tuple((tally.name, _mb(tally.dense), _mb(tally.sparse)) for tally in kinds),
        ),
        Panel(
            "Bytes by layer",
            "Rotations are counted in the layer whose basis they lead to. The table has what belongs to no layer.",
            plots.bytes_by_layer(layers),
            ("layer", "dense MB", "sparse MB", "of that rotations"),
            tuple(
                (tally.name or "outside layers", _mb(tally.dense), _mb(tally.sparse), _mb(tally.rotations))
                for tally in layers
            ),
        ),
        Panel(
            "Sparsity by layer",
            "Share of inputs that every site drops, and the share of a layer's bytes that is not read, rotations "
            "counted against it.",
            plots.sparsity_by_layer(graph, layers),
            ("layer", "bytes skipped, %"),
            tuple(
                (tally.name, f"{100 * (1 - tally.sparse / tally.dense):.1f}")
                for tally in layers
                if tally.name != OUTSIDE and tally.dense
            ),
        ),
        *spectrum_panels(graph, recipe),
    ]


def spectrum_panels(graph: GraphReport, recipe: Recipe) -> list[Panel]:
    """The spectra of the bases that sites read in, and what k of their components hold."""
    kept: dict[str, tuple[int, int]] = {}
    for site in graph.sites:
        if site.read is not None:
            kept.setdefault(site.read, (site.kept, site.features))
    if not kept:
        return []
    title = "Spectrum of each basis"
    if not kept.keys() <= recipe.spectra.keys():
        return [Panel(title, "Not stored: this recipe was made before recipes kept it. Calibrate again to see it.", "")]
    spectra = {basis: recipe.spectra[basis] for basis in kept}
    held = [float(spectra[basis].double()[:count].sum()) for basis, (count, _) in kept.items()]
    shares = [count / features for count, features in kept.values()]
    names = graph.basis_names
    return [
        Panel(
            title,
            "Share of the energy Σx² of the calibration text along each component, largest first. One line a basis, "
            "the first dark, the last light.",
            plots.spectra(spectra),
        ),
        Panel(
            "Energy that Top-K keeps",
            "What the first k components of a basis hold of the energy. Top-K chooses the k largest entries of every "
            "token, so it keeps at least as much. Were the energy spread evenly, it would be the share of components.",
            plots.energy_kept(list(kept), held, shares),
            ("basis", "of", "k", "energy, at least"),
            tuple(
                (names[basis], layer_of(basis) or basis, f"{count} / {features}", f"{100 * value:.1f} %")
                for (basis, (count, features)), value in zip(kept.items(), held, strict=True)
            ),
        ),
    ]


def perplexity_panel(measured: curves.Perplexities) -> Panel:
    """Perplexity against sparsity."""
    rows = [("dense", f"{measured.dense:.2f}", "")]
    for sparsity, value in measured.sparse.items():
        rows.append((f"{100 * sparsity:g} %", f"{value:.2f}", f"{value - measured.dense:+.2f}"))
    return Panel(
        "Perplexity against sparsity",
        f"Measured: {measured.protocol}.",
        plots.perplexity(measured),
        ("nominal sparsity", "perplexity", "gap"),
        tuple(rows),
    )


def speed_panel(measured: curves.Speeds) -> Panel:
    """Speed against sparsity, beside what memory bandwidth allows."""
    rows = tuple(
        (
            "torch.compile, dense" if variant.sparsity is None else f"{100 * variant.sparsity:g} %",
            f"{variant.seconds.median * 1e3:.1f}",
            f"{variant.seconds.minimum * 1e3:.1f} to {variant.seconds.maximum * 1e3:.1f}",
            f"{measured.bound_s(variant) * 1e3:.1f}",
        )
        for variant in measured.variants
    )
    bandwidth = measured.bandwidth
    return Panel(
        "Speed against sparsity",
        f"Measured: {measured.protocol}. The limit is the linear weights' bytes at the {bandwidth.median:.1f} GB/s "
        f"({bandwidth.minimum:.1f} to {bandwidth.maximum:.1f}) that memory gave meanwhile.",
        plots.speed(measured),
        ("nominal sparsity", "ms per token", "extremes", "limit, ms"),
        rows,
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested provenance as one level: {"versions": {"torch": …}} -> {"versions torch": …}."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key} ")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
