"""Perplexity of a real model by method, format of weights and sparsity, next to the bytes that each skips.

Windows of `--context` tokens without overlap, through the compiled graph, all next-token losses. Protocols: all (every
token sparse), first-dense (the first token of each window goes through the dense model, the others go on from its
cache), decode (so does the first half, and losses of the second half count). Calibration takes windows from the start
of its text, of several in turn, evaluation from the middle of its own on, so that one text may serve both; methods that
end in `-search` choose on the windows between, at the bytes that larosa reads at 50 %.

Bytes skipped are of all linear weights, rotations counted against them. Where thresholds select, which promise an
average only, they are those of what was kept in the evaluated windows, counted; such methods run operation by
operation, through the ops' definitions, the others through Inductor. With `--equal-bytes` every method runs besides at
the nominal sparsity at which its recipe skips what larosa's does at each of `--sparsities`: "as". ± is the standard
error over windows of the paired difference in nats per token: to dense, and to larosa at the same place.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import assets, measure, methods
from benchmarks.methods import Run
from benchmarks.protocols import PROTOCOLS, begun_dense, dense_tokens
from benchmarks.windows import halves_of, in_turn, paired
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import OWN_DTYPE, WEIGHTS
from larosa_compile.shares import CountingModel

METHODS = tuple(methods.METHODS)
SPARSITIES = (0.0, 0.25, 0.4, 0.5)
NOTHING = 0.001
"""A difference of sparsities that is none."""

out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


@dataclass(frozen=True)
class Tokens:
    """Windows `[1, tokens]` to evaluate on, and their tokenizer, where bytes are to be counted."""

    windows: list[torch.Tensor]
    tokenizer: Any = None

    def losses(self, model: Any, dense: Any, protocol: str) -> list[float]:
        """Nats per token, by window."""
        begun = begun_dense(model, dense, protocol)
        return next_token_losses(begun, self.windows, counted_from=self.counted_from(protocol))

    def counted_from(self, protocol: str) -> int:
        """The first position whose prediction counts."""
        return dense_tokens(protocol, self.windows[0].shape[1]) if protocol == "decode" else 0

    def bits_per_byte(self, losses: list[float], protocol: str) -> float | None:
        """None without a tokenizer."""
        if self.tokenizer is None:
            return None
        predicted = [window[0, self.counted_from(protocol) + 1 :] for window in self.windows]
        count = sum(len(self.tokenizer.decode(tokens).encode()) for tokens in predicted)
        nats = sum(loss * len(tokens) for loss, tokens in zip(losses, predicted, strict=True))
        return nats / math.log(2) / count


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(measure.in_a_line(meta))
    model, tokenizer = assets.load_model(arguments.model, getattr(torch, arguments.dtype))
    texts = halves_of((*arguments.calibration, *arguments.text), tokenizer, arguments.context)
    reading = in_turn([texts[name][0] for name in arguments.calibration])
    learnt, unread = reading[: arguments.calibration_windows], reading[arguments.calibration_windows :]
    held_out = {name: Tokens(texts[name][1][: arguments.windows], tokenizer) for name in arguments.text}
    recipes = methods.Recipes(model, learnt, unread[: arguments.search_windows], arguments.resume, arguments.recipes)
    tokens = len(learnt) * arguments.context
    described = {
        "model": arguments.model,
        "context": arguments.context,
        "calibration": f"{' and '.join(arguments.calibration)}, {tokens} tokens",
    }
    found = measured(model, recipes.of, planned(arguments, recipes), held_out)
    records = measure.recorded(arguments.json, meta, described, found)
    for text in arguments.text:
        out.print(table([record for record in records if record["text"] == text]))


def planned(arguments: argparse.Namespace, recipes: methods.Recipes) -> list[Run]:
    """The runs of a command line, those of larosa first: the others are compared with them."""
    chosen = sorted(arguments.methods, key=lambda name: name != "larosa")
    product = itertools.product(arguments.protocols, arguments.sparsities, chosen, arguments.weights)
    runs = [Run(method, weights, sparsity, protocol) for protocol, sparsity, method, weights in product]
    if not arguments.equal_bytes:
        return runs
    larosa = recipes.of(Run("larosa", "model", 0.5))
    equal = []
    for run in runs:
        if run.method == "larosa" or arguments.equal_bytes == "besides":
            equal.append(run)
        if run.method == "larosa":
            continue
        share = recipes.promised("larosa", larosa.with_sparsity(run.sparsity))
        found = recipes.equal_bytes(run.method, share)
        if found is None:
            out.print(f"{run.method} cannot skip {share:.1%} of the weight bytes, as larosa does at {run.sparsity:.0%}")
        elif abs(found - run.sparsity) >= NOTHING or arguments.equal_bytes == "only":
            equal.append(replace(run, sparsity=found, place=run.sparsity))
    return equal


def measured(
    model: PreTrainedModel, recipe_of: Callable[[Run], Recipe], runs: Sequence[Run], held_out: Mapping[str, Tokens]
) -> Iterator[dict[str, Any]]:
    """Records of the dense model for each protocol and text, then of each run. `losses`: nats per token, by window."""
    protocols = tuple(dict.fromkeys(run.protocol for run in runs))
    dense: dict[tuple[str, str], list[float]] = {}
    larosa: dict[tuple[object, ...], list[float]] = {}
    with progress_bar(True) as bar:
        task = bar.add_task("perplexity", total=(len(runs) + len(protocols)) * len(held_out))
        for protocol, (text, tokens) in itertools.product(protocols, held_out.items()):
            dense[protocol, text] = losses = tokens.losses(model, model, protocol)
            bar.advance(task)
            scores = _scores(losses, losses, text, tokens, protocol)
            record = {"method": "dense", "weights": "model", "sparsity": 0.0, "as": 0.0, "bytes_skipped_share": 0.0}
            yield record | scores
        for run in runs:
            torch._dynamo.reset()
            sparse = Sparse(model, recipe_of(run), run)
            place = run.sparsity if run.place is None else run.place
            for text, tokens in held_out.items():
                losses, share = sparse.on(tokens)
                bar.advance(task)
                record = {"method": run.method, "weights": run.weights, "sparsity": run.sparsity, "as": place}
                record |= {"bytes_skipped_share": share}
                record |= _scores(losses, dense[run.protocol, text], text, tokens, run.protocol)
                key = (run.protocol, run.weights, place, text)
                if run.method == "larosa":
                    larosa[key] = losses
                elif key in larosa:
                    record["loss_over_larosa"], record["loss_over_larosa_error"] = paired(losses, larosa[key])
                yield record


class Sparse:
    """A model as a run wants it."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, run: Run) -> None:
        self._model, self._recipe, self._run = model, recipe, run
        self._report = larosa_compile.explain(model, recipe=recipe).graphs[0]
        options = {"recipe": recipe, "self_check": False}
        self._compiled: Any = torch.compile(model, backend="larosa", options=options)

    def on(self, tokens: Tokens) -> tuple[list[float], float]:
        """Nats per token by window, and the share of weight bytes that was skipped in them."""
        if not self._report.is_average:
            return tokens.losses(self._compiled, self._model, self._run.protocol), self._report.bytes_skipped_share
        counting = CountingModel(self._model, self._recipe)
        losses = tokens.losses(counting, self._model, self._run.protocol)
        if self._run.weights != OWN_DTYPE:  # counted with the model's own
            losses = tokens.losses(self._compiled, self._model, self._run.protocol)
        return losses, self._report.with_shares(counting.shares).bytes_skipped_share


def _scores(losses: list[float], dense: list[float], text: str, held_out: Tokens, protocol: str) -> dict[str, Any]:
    mean, error = paired(losses, dense)
    ppl = perplexity(losses)
    return {
        "text": text,
        "tokens": sum(window.numel() for window in held_out.windows),
        "protocol": protocol,
        "losses": losses,
        "ppl": ppl,
        "gap": ppl - perplexity(dense),
        "bits_per_byte": held_out.bits_per_byte(losses, protocol),
        "loss_over_dense": mean,
        "loss_over_dense_error": error,
    }


def table(records: list[dict[str, Any]]) -> Table:
    """The records of one model and text; without columns that say nothing."""
    first = records[0]
    dense = {record["protocol"]: record["ppl"] for record in records if record["method"] == "dense"}
    rows = [_cells(record, dense[record["protocol"]]) for record in records]
    told = [name for name in rows[0] if any(row[name] for row in rows) and (name != "protocol" or len(dense) > 1)]
    title = f"{first['model']}, {first['tokens']} tokens of {first['text']}; {first['calibration']}"
    made = Table(title=title if len(dense) > 1 else f"{title}; protocol {first['protocol']}")
    for name in told:
        made.add_column(name, justify="left" if name in ("method", "weights", "protocol") else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(row[name] for name in told))
    return made


def _cells(record: dict[str, Any], dense: float) -> dict[str, str]:
    bits = record["bits_per_byte"]
    compared, nominal = "loss_over_larosa" in record, record["as"] == record["sparsity"]
    return {
        "method": record["method"],
        "weights": record["weights"],
        "protocol": record["protocol"],
        "sparsity": f"{record['sparsity']:.{0 if nominal else 1}%}",
        "as": "" if nominal else f"larosa {record['as']:.0%}",
        "skipped": f"{record['bytes_skipped_share']:.1%}",
        "perplexity": f"{record['ppl']:.3f}",
        "gap": f"{record['gap']:+.3f}",
        "of dense": f"{record['gap'] / dense:+.2%}",
        "bits/byte": "" if bits is None else f"{bits:.4f}",
        "nats over dense": f"{record['loss_over_dense']:+.4f} ± {record['loss_over_dense_error']:.4f}",
        "over larosa": f"{record['loss_over_larosa']:+.4f} ± {record['loss_over_larosa_error']:.4f}"
        if compared
        else "",
    }


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two windows, 50 %% only")
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    known = f"{', '.join(assets.TEXTS)}, or a file"
    parser.add_argument("--text", nargs="+", default=["wiki"], help=f"to evaluate on: {known} (default: wiki)")
    parser.add_argument(
        "--calibration", nargs="+", default=["wiki"], help="to calibrate and search on: as --text (default: wiki)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["larosa"])
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=["all"])
    parser.add_argument(
        "--equal-bytes",
        nargs="?",
        const="besides",
        choices=("besides", "only"),
        help="besides, or only, all skipping what larosa skips",
    )
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["model"], help="formats of weights")
    parser.add_argument("--sparsities", nargs="+", type=measure.sparsity)
    parser.add_argument("--context", type=measure.positive, default=1024)
    parser.add_argument("--windows", type=measure.positive, help="to evaluate on, at least 2 (default: 16)")
    parser.add_argument("--calibration-windows", type=measure.positive, help="(default: 24)")
    parser.add_argument("--search-windows", type=measure.positive, default=24, help="for larosa-search (default: 24)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="where searches write how far they are")
    parser.add_argument("--recipes", type=Path, metavar="FOLDER", help="save the recipe of every run there")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every run")
    arguments = parser.parse_args(argv)
    arguments.sparsities = arguments.sparsities or ([0.5] if arguments.quick else list(SPARSITIES))
    arguments.windows = arguments.windows or (2 if arguments.quick else 16)
    arguments.calibration_windows = arguments.calibration_windows or (4 if arguments.quick else 24)
    if arguments.windows < 2:
        parser.error(f"--windows must be at least 2, for an error to be known, got {arguments.windows}")
    return arguments


if __name__ == "__main__":
    main()
