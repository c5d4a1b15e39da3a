"""Ways of rounding weights to a format, compared: as many bytes, other codes and scales.

    exact           the folded weights as they are
    nearest         what the package does: the extreme of a group is a code, and every weight takes the nearest one
    least-squares   the one of a few scales per group whose codes are nearest in sum, features weighted by their energy
    compensated     what rounding a feature adds to the output is taken off the features that follow (GPTQ, arXiv
                    2210.17323), with the second moments of what the unrounded model's site reads

Bases are shared by layers, as the package has it by default. The rewritten graph is run with the ops' definitions on
windows of a text that nothing was learnt from. ± is the standard error over windows of the paired difference to exact.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import assets, edited, measure
from benchmarks.edited import Edited, Product
from benchmarks.windows import paired
from larosa_compile import registry
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.kernels.formats import (
    FORMATS,
    UNSORTED,
    Group,
    WeightFormat,
    groups,
    nearest_codes,
    nearest_scale,
    pack,
    unpack,
)
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe

SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Of the scale at which the extreme of a group is a code."""

DAMPING = 0.01
"""Share of every second moment that is added to it, so that compensation does not trust what hardly varies."""

Rounding = Callable[[Tensor, WeightFormat, Tensor], Tensor]
"""A weight [features, columns], its format, second moments [features, features] -> the weight that its codes mean."""

out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(measure.in_a_line(meta))
    model, tokenizer = assets.load_model(arguments.model, getattr(torch, arguments.dtype))
    learnt, held_out = edited.windows_for(arguments, tokenizer)
    recipe = larosa_compile.calibrate(model, learnt, sparsity=0.5)
    found = measured(model, recipe, learnt, held_out[edited.WIKI], arguments.weights, arguments.sparsities)
    records = measure.recorded(arguments.json, meta, edited.described(arguments), found)
    out.print(table(records))


def measured(
    model: PreTrainedModel,
    recipe: Recipe,
    learnt: Sequence[Tensor],
    held_out: Sequence[Tensor],
    formats: Sequence[str],
    sparsities: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """A record for every format, rounding and sparsity."""
    moments = Moments(model, recipe, learnt)
    exact: dict[float, list[float]] = {}
    tried = [("model", "exact"), *((name, rounding) for name in formats for rounding in ROUNDINGS)]
    with progress_bar(True) as bar:
        task = bar.add_task("rounding", total=len(tried) * len(sparsities))
        for name, rounding in tried:
            rule = Rounded(FORMATS[name], ROUNDINGS[rounding], moments) if name in FORMATS else Product.as_it_is
            for sparsity in sparsities:
                bar.update(task, description=f"{name} {rounding} {sparsity:.0%}")
                losses = next_token_losses(Edited(model, recipe.with_sparsity(sparsity), rule), held_out)
                registry.drop_graphs()
                over, error = paired(losses, exact.setdefault(sparsity, losses))
                bar.advance(task)
                yield {
                    "weights": name,
                    "rounding": rounding,
                    "sparsity": sparsity,
                    "tokens": sum(window.numel() for window in held_out),
                    "ppl": perplexity(losses),
                    "over_exact": perplexity(losses) / perplexity(exact[sparsity]) - 1,
                    "loss_over_exact": over,
                    "loss_over_exact_error": error,
                    "losses": losses,
                }


class Rounded:
    """What sites put out with their weights rounded, each once."""

    def __init__(self, form: WeightFormat, rounding: Rounding, moments: "Moments") -> None:
        self._form, self._rounding, self._moments = form, rounding, moments
        self._weights: dict[str, Tensor] = {}

    def __call__(self, product: Product) -> Tensor:
        path, weight = product.path, product.weight
        if path not in self._weights:
            form = self._form if product.is_sorted else UNSORTED
            self._weights[path] = self._rounding(weight.float(), form, self._moments.of(path)).to(weight.dtype)
        return replace(product, weight=self._weights[path]).as_it_is()


class Moments:
    """Second moments of what every site reads, nothing dropped."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, batches: Sequence[Tensor]) -> None:
        self._sums: dict[str, Tensor] = {}
        watched = Edited(model, recipe.with_sparsity(0.0), self._add)
        for ids in batches:
            watched(input_ids=ids, use_cache=False)
        registry.drop_graphs()

    def of(self, path: str) -> Tensor:
        """Of the site of this path, [features, features], their mean on the diagonal 1."""
        return self._sums[path] / self._sums[path].diag().mean()

    def _add(self, product: Product) -> Tensor:
        rows = product.x.float()
        self._sums[product.path] = self._sums.get(product.path, torch.zeros(())) + rows.T @ rows
        return product.as_it_is()


def nearest(weight: Tensor, form: WeightFormat, moments: Tensor) -> Tensor:
    """What the package does."""
    del moments
    return unpack(pack(weight, form), *weight.shape, form)


def least_squares(weight: Tensor, form: WeightFormat, moments: Tensor) -> Tensor:
    """Each group of a column at the scale, of a few, whose error is least, features weighted by their energy."""
    found = torch.empty_like(weight)
    energies = moments.diag().unsqueeze(1)
    for group in groups(len(weight), form):
        part = weight[group.features]
        largest = nearest_scale(part, group.range)
        tried = torch.stack([_meant(part, (share * largest).bfloat16().float(), group) for share in SHRUNK])
        errors = (energies[group.features] * (tried - part) ** 2).sum(1)
        best = errors.argmin(0).expand(1, *part.shape)
        found[group.features] = tried.gather(0, best)[0]
    return found


def compensated(weight: Tensor, form: WeightFormat, moments: Tensor) -> Tensor:
    """GPTQ: feature by feature, the error of one is taken off those behind it as far as they move together."""
    left, found = weight.clone(), torch.empty_like(weight)
    damped = moments.double() + DAMPING * moments.diag().double().clamp_min(1e-12).diag()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    for group in groups(len(weight), form):
        first, last = group.features.start, group.features.stop
        scale, errors = nearest_scale(left[first:last], group.range), []
        for i in range(first, last):
            found[i] = _meant(left[i], scale, group)
            errors.append((left[i] - found[i]) / factor[i, i])
            left[i:last] -= factor[i, i:last, None] * errors[-1]
        left[last:] -= factor[first:last, last:].T @ torch.stack(errors)
    return found


def _meant(part: Tensor, scale: Tensor, group: Group) -> Tensor:
    return scale * nearest_codes(part, scale, group.range)


ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "least-squares": least_squares, "compensated": compensated}


def table(records: list[dict[str, Any]]) -> Table:
    made = Table(title=f"{records[0]['model']}, {records[0]['tokens']} tokens of wiki text")
    for name in ("weights", "rounding", "sparsity", "perplexity", "over exact", "nats over exact"):
        made.add_column(name, justify="left" if name in ("weights", "rounding") else "right", no_wrap=True)
    for record in records:
        over = f"{record['loss_over_exact']:+.4f} ± {record['loss_over_exact_error']:.4f}"
        shown = (f"{record['sparsity']:.0%}", f"{record['ppl']:.3f}", f"{record['over_exact']:+.2%}", over)
        made.add_row(record["weights"], record["rounding"], *shown)
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = edited.argument_parser(__doc__, "two windows, calibrated on four, int4 only")
    parser.add_argument("--weights", nargs="+", choices=tuple(FORMATS), help="formats (default: all)")
    parser.add_argument("--sparsities", nargs="+", type=measure.sparsity, default=[0.0])
    arguments = edited.parsed(parser, argv)
    arguments.weights = arguments.weights or (["int4"] if arguments.quick else list(FORMATS))
    return arguments


if __name__ == "__main__":
    main()
