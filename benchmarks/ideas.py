"""Ideas to lose less for the same bytes that the package does not have, measured.

Each starts from bases that layers share, at the bytes that the paper's settings read at `--sparsity`, and is measured
on windows that nothing was learnt from, every token sparse, the rewritten graph run with the ops' definitions:

    bias       what a site drops on average, times its weight, added to its output; it costs no weight bytes
    low-rank   the part of what o and down drop along its `RANK` leading directions kept, and all sites drop more for it
    refreshed  bases made again from what readers see when all sites are sparse
    alike      as many bases, of layers that are alike instead of as many layers each
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import assets, edited, likeness, measure
from benchmarks.edited import Edited, Product
from benchmarks.methods import Recipes
from benchmarks.windows import paired
from larosa_compile import registry
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe

RANK = 32
START = "larosa-shared"

out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(measure.in_a_line(meta))
    model, tokenizer = assets.load_model(arguments.model, getattr(torch, arguments.dtype))
    learnt, held_out = edited.windows_for(arguments, tokenizer, arguments.text)
    found = measured(model, Recipes(model, learnt), held_out, arguments.sparsity)
    records = measure.recorded(arguments.json, meta, edited.described(arguments), found)
    out.print(table(records))


def measured(
    model: PreTrainedModel, recipes: Recipes, held_out: dict[str, list[Tensor]], sparsity: float
) -> Iterator[dict[str, Any]]:
    """A record for every idea and text; "none" is where all of them start."""
    dense = {text: next_token_losses(model, windows) for text, windows in held_out.items()}
    start: dict[str, list[float]] = {}
    with progress_bar(True) as bar:
        task = bar.add_task("ideas", total=None)
        for idea, share, compiled in _tried(model, recipes, sparsity):
            bar.update(task, description=idea)
            for text, windows in held_out.items():
                losses = next_token_losses(compiled, windows)
                start.setdefault(text, losses)
                over, error = paired(losses, start[text])
                yield {
                    "idea": idea,
                    "bytes_skipped_share": share,
                    "text": text,
                    "tokens": sum(window.numel() for window in windows),
                    "ppl": perplexity(losses),
                    "gap": perplexity(losses) - perplexity(dense[text]),
                    "loss_over_start": over,
                    "loss_over_start_error": error,
                    "losses": losses,
                }
            registry.drop_graphs()


def _tried(model: PreTrainedModel, recipes: Recipes, sparsity: float) -> Iterator[tuple[str, float, Any]]:
    """Name, share of weight bytes skipped, and the model that does it; the first is where the others start."""
    paper = recipes.calibrated("larosa").with_sparsity(sparsity)
    share = recipes.promised("larosa", paper)
    start = _at(recipes, share)
    yield "none", share, Edited(model, start)

    dropped = Dropped(model, start, recipes.learnt)
    yield "bias", share, Edited(model, start, dropped.with_mean)

    dropped.keep_leading(RANK)
    extra = RANK * dropped.sides * model.dtype.itemsize / recipes.report(START).dense_bytes
    yield "low-rank", share, Edited(model, _at(recipes, share + extra), dropped.with_leading)

    yield "refreshed", share, Edited(model, refreshed(model, start, recipes.learnt))
    yield "alike", share, Edited(model, likeness.shared(paper, start))


def _at(recipes: Recipes, share: float) -> Recipe:
    """What all ideas start from, skipping this share of the linear weight bytes."""
    sparsity = recipes.equal_bytes(START, share)
    if sparsity is None:
        sys.exit(f"{START} cannot skip {share:.1%} of the weight bytes; ask for a lower --sparsity")
    return recipes.calibrated(START).with_sparsity(sparsity)


class Dropped:
    """What sites drop on some text, all of them sparse: its mean, and for writers its second moments.

    sides: inputs and outputs of all writers together, what a rank more of each costs.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, batches: Sequence[Tensor]) -> None:
        self._writers = {path for path, site in recipe.sites.items() if site.kind == "writer"}
        self.sides = sum(sum(recipe.parameters[path]) for path in self._writers)
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._moments: dict[str, Tensor] = {}
        self._leading: dict[str, Tensor] = {}
        watching = Edited(model, recipe, self._watched)
        for ids in batches:
            watching(input_ids=ids, use_cache=False)
        registry.drop_graphs()

    def _watched(self, product: Product) -> Tensor:
        path, rest = product.path, (product.x - product.largest).float()
        self._sums[path] = self._sums.get(path, torch.zeros(())) + rest.sum(0)
        self._rows[path] = self._rows.get(path, 0) + len(rest)
        if path in self._writers:
            self._moments[path] = self._moments.get(path, torch.zeros(())) + rest.T @ rest
        return product.as_it_is()

    def keep_leading(self, rank: int) -> None:
        """Makes the leading directions of what writers drop, [features, rank] each."""
        for path, moment in self._moments.items():
            self._leading[path] = torch.linalg.eigh(moment.double()).eigenvectors[:, -rank:].float()

    def with_mean(self, product: Product) -> Tensor:
        """Reads, besides what a site does, the mean of what it drops."""
        mean = self._sums[product.path] / self._rows[product.path]
        return (product.largest + mean.to(product.x.dtype)) @ product.weight

    def with_leading(self, product: Product) -> Tensor:
        """Reads, besides what a site does, what it drops along the leading directions."""
        if product.path not in self._leading:
            return product.as_it_is()
        leading, read = self._leading[product.path].to(product.x.dtype), product.largest
        return (read + (product.x - read) @ leading @ leading.T) @ product.weight


def refreshed(model: PreTrainedModel, recipe: Recipe, batches: Sequence[Tensor]) -> Recipe:
    """The recipe with bases from second moments that are taken with all sites sparse."""
    moments: dict[str, Tensor] = {}

    def watched(product: Product) -> Tensor:
        basis, x = recipe.sites[product.path].basis, product.x.double()
        if basis is not None:
            moments[basis] = moments.get(basis, torch.zeros(())) + x.T @ x
        return product.as_it_is()

    watching = Edited(model, recipe, watched)
    for ids in batches:
        watching(input_ids=ids, use_cache=False)
    registry.drop_graphs()
    # the input is seen in the basis that it has
    turned = {basis: torch.linalg.eigh(moment).eigenvectors.flip(1) for basis, moment in moments.items()}
    rotations = {basis: (q.double() @ turned[basis]).float() for basis, q in recipe.rotations.items()}
    return replace(recipe, rotations=rotations, spectra={})


def table(records: list[dict[str, Any]]) -> Table:
    made = Table(title=f"{records[0]['model']}, {records[0]['tokens']} tokens of each text")
    for name in ("text", "idea", "skipped", "perplexity", "gap", "nats over none"):
        made.add_column(name, justify="left" if name in ("text", "idea") else "right", no_wrap=True)
    for record in sorted(records, key=lambda record: str(record["text"])):
        over = f"{record['loss_over_start']:+.4f} ± {record['loss_over_start_error']:.4f}"
        skipped, ppl, gap = (record[name] for name in ("bytes_skipped_share", "ppl", "gap"))
        made.add_row(record["text"], record["idea"], f"{skipped:.1%}", f"{ppl:.3f}", f"{gap:+.3f}", over)
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = edited.argument_parser(__doc__, "two windows of one text, calibrated on four")
    parser.add_argument("--text", nargs="+", help=f"to evaluate on: {', '.join(assets.TEXTS)}, or a file")
    parser.add_argument("--sparsity", type=measure.sparsity, default=0.5)
    arguments = edited.parsed(parser, argv)
    arguments.text = arguments.text or (["wiki"] if arguments.quick else ["wiki", "c4"])
    return arguments


if __name__ == "__main__":
    main()
