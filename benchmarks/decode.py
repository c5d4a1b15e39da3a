"""Decode speed of whole models against the bytes they read: eager, torch.compile, its max-autotune, and larosa.

One sequence, greedy, static cache. The variants of a model take turns in one process, and the memory bandwidth is read
after every turn. inductor-max has its weights frozen. Bytes are those of the linear weights that a token reads; bound:
what reading them takes at the bandwidth of the same rounds. Compile time, peak memory, memory held afterwards and the
split of the time by kernels come from processes of the variants' own, which start with an empty compile cache; there
larosa releases the original weights, and what an eager model read of its file for the prompt does not count.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from benchmarks import decoding, measure, shapes
from benchmarks.decoding import GROUPS, VARIANTS, Subject, Variant
from larosa_compile.decoding import ROOM, Prompt, compare
from larosa_compile.machine import Bandwidth
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe

LAROSA = [name for name in VARIANTS if Variant(name).is_larosa]
SPLIT = (Variant("inductor"), *(Variant(name, 0.5) for name in LAROSA))
"""Variants whose time is split by kernels."""

PROFILED_TOKENS = 8

out = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    torch._dynamo.config.recompile_limit = 64  # all variants compile one forward, and at eight Dynamo gives up
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    meta = measure.machine()
    out.print(
        f"{meta['device']}, {meta['threads']} threads, reads {meta['bandwidth_gb_s']} GB/s; torch {meta['torch']}"
    )
    records: list[dict[str, Any]] = []
    for name in arguments.shape:
        found, recipe = together(arguments, name)
        records += found
        write = partial(measure.write_so_far, arguments.json, meta, records)
        write()
        if not arguments.no_children:
            gc.collect()  # the model, before another process loads it
            alone(found, recipe, write)
            out.print(split_table(found))
        for context in arguments.contexts:
            out.print(table([record for record in found if record["context"] == context]))
    fitted = fits(records)
    for fit in fitted:
        out.print(
            f"{', '.join(fit['fit'])}, context {fit['context']}: {fit['intercept_ms']:.2f} ms per token, and its bytes "
            f"at {fit['gb_per_s']:.1f} GB/s (R² {fit['r2']:.3f}, {fit['points']} points of {fit['variant']})"
        )
    measure.write_so_far(arguments.json, meta, records + fitted)


def together(arguments: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], Recipe | None]:
    """One model's records, without what only a process of a variant's own can tell; and its recipe."""
    start = time.perf_counter()
    calibrated, windows = any(run.is_larosa for run in arguments.runs), 4 if arguments.quick else 24
    subject = Subject.prepared(name, arguments.layers, arguments.contexts, calibrated, windows)
    out.print(f"{name}, {subject.layers} layers: prepared in {time.perf_counter() - start:.0f} s")
    sizes = {variant: subject.weight_bytes(variant) for variant in arguments.runs}
    records: list[dict[str, Any]] = []
    for context in arguments.contexts:
        records += speeds(subject, context, sizes, arguments.tokens, arguments.rounds)
        decoding.forget_compiled()
    return records, subject.recipe


def speeds(subject: Subject, context: int, sizes: dict[Variant, int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A record per variant, from one comparison in this process. `sizes`: the bytes that a token reads."""
    forwards = {str(variant): variant.forward(subject.model, subject.recipe) for variant in sizes}
    bandwidth, graphs = Bandwidth(), list[int]()

    def between() -> None:
        bandwidth.sample()
        graphs.append(counters["stats"]["unique_graphs"])

    with progress_bar(True) as bar:
        task = bar.add_task(f"{subject.name}, context {context}", total=len(forwards) * (rounds + 1))
        prompt = subject.prompts[context]
        found = compare(subject.model, forwards, prompt, tokens, rounds, lambda: bar.advance(task), between=between)
    if graphs[0] != graphs[-1]:
        out.print("a graph was compiled while others were timed: these numbers are not to be trusted", style="red")
    gb_per_s = bandwidth.taken().median
    inductor = found["inductor"][1].median if "inductor" in found else None
    records: list[dict[str, Any]] = []
    for variant, size in sizes.items():
        spread, bound = found[str(variant)][1], size / gb_per_s / 1e6
        records.append(
            {
                "model": subject.name,
                "layers": subject.layers,
                "variant": variant.name,
                "sparsity": variant.sparsity,
                "guarded": variant.guarded,
                "context": context,
                "tokens_per_s": 1 / spread.median,
                "spread": [1 / spread.maximum, 1 / spread.minimum],
                "ms_per_token": spread.median * 1e3,
                "bytes_per_token": size,
                "bandwidth_gb_s": gb_per_s,
                "bandwidth_bound_ms": bound,
                "over_bound": spread.median * 1e3 / bound,
                "vs_inductor": inductor / spread.median if inductor else None,
                "compile_s": None,
                "peak_rss_mb": None,
                "rss_mb": None,
                "split": None,
            }
        )
    return records


def alone(records: list[dict[str, Any]], recipe: Recipe | None, done: Callable[[], None] = lambda: None) -> None:
    """Fills in what a process of each record's own reports: `compile_s`, `peak_rss_mb`, `rss_mb` and `split`.

    records: of one model. done: called after each.
    """
    with tempfile.TemporaryDirectory() as folder, progress_bar(True) as bar:
        saved = Path(folder) / "recipe.larosa.safetensors"
        if recipe is not None:
            recipe.save(saved)
        model = shapes.checkpoint(records[0]["model"], records[0]["layers"], Path(folder) / "model")
        for record in bar.track(records, description="a process each"):
            command = [sys.executable, "-m", "benchmarks.decode", "--child", record["variant"], "--recipe", str(saved)]
            command += ["--shape", model, "--sparsities", str(record["sparsity"]), "--contexts", str(record["context"])]
            command += [] if record["guarded"] else ["--unguarded"]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                said = (run.stderr.strip().splitlines() or ["no message"])[-1]
                out.print(f"{' '.join(command[3:])}: exit status {run.returncode}, {said}", markup=False)
            else:
                record.update(json.loads(run.stdout.splitlines()[-1]))
                done()


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a variant costs by itself. Its prompt is random: neither time nor memory depends on the words."""
    variant = Variant(arguments.child, arguments.sparsities[0], not arguments.unguarded)
    model = shapes.build(arguments.shape[0])
    recipe = Recipe.load(arguments.recipe) if variant.is_larosa else None
    prompt = Prompt.read_by(model, decoding.random_ids(model, arguments.contexts[0], seed=2))
    decoding.forget_reading(model)
    with fresh_cache():
        forward = variant.forward(model, recipe, release=True)
        first, *others = prompt.decode_seconds(forward, 5)
        compile_s = None if variant.name == "eager" else first - statistics.median(others)
        gc.collect()
        memory = {"peak_rss_mb": measure.peak_rss_mb(), "rss_mb": measure.rss_mb()}
        found: dict[str, Any] = {"compile_s": compile_s, **memory, "split": None}
        if variant in SPLIT:
            if not variant.is_larosa:
                decoding.forget_compiled()  # larosa's options differ below, and its graph holds all weights there are
            profiled = variant.forward(model, recipe)
            with inductor_config.patch({"cpp.enable_kernel_profile": True}):
                prompt.decode_seconds(profiled, 2)
            found["split"] = decoding.time_split(prompt, profiled, PROFILED_TOKENS)
    return found


def fits(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds against bytes per token, over the larosa records of each context and format of weights: all models
    together, then each.

    Nothing for less than three points, nor where more bytes did not take longer.
    """
    found: list[dict[str, Any]] = []
    for context in dict.fromkeys(record["context"] for record in records):
        for variant in LAROSA:
            one = (variant, context, True)
            points = [record for record in records if (record["variant"], record["context"], record["guarded"]) == one]
            models = list(dict.fromkeys(record["model"] for record in points))
            for group in [models] if len(models) == 1 else [models, *([model] for model in models)]:
                chosen = [record for record in points if record["model"] in group]
                sizes = [float(record["bytes_per_token"]) for record in chosen]
                line = measure.Line.through(sizes, [record["ms_per_token"] / 1e3 for record in chosen])
                if line is not None and line.slope > 0:
                    fit = {"fit": group, "variant": variant, "context": context, "points": len(chosen), "r2": line.r2}
                    found.append(fit | {"gb_per_s": 1e-9 / line.slope, "intercept_ms": line.intercept * 1e3})
    return found


def table(records: list[dict[str, Any]]) -> Table:
    """The records of one model at one context."""
    first = records[0]
    title = (
        f"{first['model']}, {first['layers']} layers, context {first['context']}, {first['bandwidth_gb_s']:.1f} GB/s"
    )
    made = Table(title=title)
    columns = ("tokens/s (low, high)", "ms/token", "MB/token", "bound ms", "over bound", "vs inductor")
    for column in ("variant", *columns, "compile s", "peak MB", "MB held"):
        made.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for record in records:
        low, high = record["spread"]
        made.add_row(
            str(Variant(record["variant"], record["sparsity"], record["guarded"])),
            f"{record['tokens_per_s']:.1f} ({low:.1f}, {high:.1f})",
            f"{record['ms_per_token']:.2f}",
            f"{record['bytes_per_token'] / 1e6:,.0f}",
            f"{record['bandwidth_bound_ms']:.2f}",
            f"{record['over_bound']:.2f}x",
            _shown(record["vs_inductor"], ".2f", "x"),
            _shown(record["compile_s"], ".0f"),
            _shown(record["peak_rss_mb"], ",.0f"),
            _shown(record["rss_mb"], ",.0f"),
        )
    return made


def split_table(records: list[dict[str, Any]]) -> Table:
    """Milliseconds per token by group of kernels."""
    made = Table(title="ms per token under the profiler")
    for column in ("variant", "context", *GROUPS):
        made.add_column(column, justify="left" if column == "variant" else "right")
    for record in records:
        if record["split"]:
            variant = str(Variant(record["variant"], record["sparsity"]))
            times = [f"{record['split'][group]:.2f}" for group in GROUPS]
            made.add_row(f"{record['model']}, {variant}", str(record["context"]), *times)
    return made


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in; `runs` becomes the list of variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four layers of one shape, one context, one sparsity")
    known = f"{', '.join(shapes.SHAPES)}, smollm2, a hub name, a folder or a GGUF file"
    parser.add_argument("--shape", nargs="+", default=["llama-1b"], help=known)
    parser.add_argument("--layers", type=measure.positive, help="cut known shapes to this depth")
    parser.add_argument("--contexts", nargs="+", type=measure.positive, help="tokens of the prompt")
    parser.add_argument("--sparsities", nargs="+", type=measure.sparsity, help="of larosa")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--unguarded", action="store_true", help="besides without Dynamo's guards on modules")
    parser.add_argument("--rounds", type=measure.positive, help="turns of every variant")
    parser.add_argument("--tokens", type=measure.positive, default=32, help="timed in a turn (default: 32)")
    parser.add_argument("--no-children", action="store_true", help="no compile time, peak memory and split by kernels")
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every model")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    if quick and arguments.layers is None and set(arguments.shape) <= set(shapes.SHAPES):
        arguments.layers = 4
    arguments.contexts = arguments.contexts or ([128] if quick else [128, 2048])
    arguments.sparsities = arguments.sparsities or ([0.5] if quick else [0.25, 0.4, 0.5, 0.75])
    usual = ["eager", "inductor", "inductor-max", "larosa"]
    arguments.variants = arguments.variants or [name for name in usual if not quick or name != "inductor-max"]
    arguments.rounds = arguments.rounds or (2 if quick else 3)
    for name in arguments.shape if arguments.layers is not None else []:
        try:
            shapes.check_depth(name, arguments.layers)
        except ValueError as error:
            parser.error(str(error))
    if arguments.tokens >= ROOM:
        parser.error(f"--tokens must be below {ROOM}, the room that the cache has, got {arguments.tokens}")
    # frozen with the weights is the first cache it met: it goes on behind the tokens of earlier turns
    if "inductor-max" in arguments.variants and 4 + arguments.rounds * (arguments.tokens + 1) > ROOM:
        parser.error(f"inductor-max has room for {ROOM} tokens in all rounds together: lower --rounds or --tokens")
    arguments.runs = [
        Variant(name, sparsity, guarded)
        for name in dict.fromkeys(arguments.variants)
        for sparsity in (dict.fromkeys(arguments.sparsities) if name in LAROSA else [0.0])
        for guarded in ([True, False] if arguments.unguarded and name in ("inductor", *LAROSA) else [True])
    ]
    return arguments


if __name__ == "__main__":
    main()
