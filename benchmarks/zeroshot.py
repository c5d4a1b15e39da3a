"""Zero-shot accuracy, dense and sparse, question by question: `python -m benchmarks.zeroshot [--quick] [--json FILE]`.

lm_eval's own wrapper of Hugging Face models runs the model, dense and compiled by the backend, on the same questions:
tasks of lm_eval by name where their data can be had (a hub), and files of multiple-choice questions in BIG-bench's JSON
format. "acc" is the share of questions whose best answer is the likeliest; "acc_norm" the same with likelihoods
per byte of the answer. Errors are those of the paired difference to dense. Every recipe runs at the sparsity it was
made for, or at each of `--sparsities`; what it skips is what it promises. Protocols: all (every token sparse),
first-dense (the first token of each question goes through the dense model, the others go on from its cache), decode (so
does the first half). Needs the extra `eval`.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import assets, measure
from benchmarks.local_tasks import write_tasks
from benchmarks.protocols import PROTOCOLS, begun_dense
from benchmarks.windows import paired, windows_of
from larosa_compile.recipe import Recipe

SPARSITIES = (0.4, 0.5)
METRICS = ("acc", "acc_norm")
ALL = "all"
"""The task of a record that is over the questions of all tasks together."""

out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)

Scores = dict[str, dict[str, list[float]]]
"""Task -> metric -> 1 or 0 for each question, in the order of the task."""


def main() -> None:
    arguments = parsed(sys.argv[1:])
    meta = measure.machine()
    out.print(measure.in_a_line(meta))
    model, tokenizer = assets.load_model(arguments.model, getattr(torch, arguments.dtype))
    if arguments.recipes:
        recipes = [(path.name.partition(".")[0], Recipe.load(path)) for path in arguments.recipes]
    else:
        windows = windows_of(arguments.calibration, tokenizer, arguments.context)[: arguments.calibration_windows]
        recipes = [("larosa", larosa_compile.calibrate(model, windows, sparsity=0.5))]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(task) for task in arguments.tasks if task.endswith(".json")]
        names = write_tasks(files, Path(folder)) + [task for task in arguments.tasks if not task.endswith(".json")]
        evaluation = Evaluation(tokenizer, names, Path(folder), arguments.limit, arguments.batch_size)
        runs = planned(recipes, arguments.sparsities, arguments.protocols)
        found = measured(model, runs, evaluation)
        records = measure.recorded(arguments.json, meta, {"model": arguments.model}, found)
    out.print(table(records))


class Evaluation:
    """Tasks, and how lm_eval runs a model on them.

    folder: where tasks beside lm_eval's own are described. limit: of questions of each task, from the first; None is
    all of them.
    """

    def __init__(
        self, tokenizer: Any, tasks: Sequence[str], folder: Path, limit: int | None = None, batch_size: int = 8
    ) -> None:
        self._tokenizer, self._tasks, self._folder = tokenizer, list(tasks), folder
        self._limit, self._batch_size = limit, batch_size

    def scores(self, model: PreTrainedModel) -> Scores:
        """What lm_eval finds for a model, as it stands: compiled in place or not."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        # its own tasks are listed only if one of them is asked for: that takes seconds
        own = any(not (self._folder / f"{task}.yaml").exists() for task in self._tasks)
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=self._batch_size),
            tasks=self._tasks,
            task_manager=TaskManager(include_path=str(self._folder), include_defaults=own),
            limit=self._limit,
            log_samples=True,
            bootstrap_iters=0,  # paired differences are what errors are needed of
        )
        samples = {task: sorted(made, key=lambda sample: sample["doc_id"]) for task, made in found["samples"].items()}
        return {
            task: {metric: [float(sample[metric]) for sample in made] for metric in METRICS if metric in made[0]}
            for task, made in samples.items()
        }


@dataclass(frozen=True)
class Run:
    """A recipe, at its own sparsity, and which tokens are sparse (one of `PROTOCOLS`). name: the recipe's."""

    name: str
    recipe: Recipe
    protocol: str


def planned(recipes: Sequence[tuple[str, Recipe]], sparsities: Sequence[float], protocols: Sequence[str]) -> list[Run]:
    """Every recipe, several of which may have one name, at each of the sparsities, or at its own without any."""
    runs = []
    for name, recipe in recipes:
        at = [recipe.with_sparsity(sparsity) for sparsity in sparsities] or [recipe]
        runs += [Run(name, each, protocol) for each, protocol in itertools.product(at, protocols)]
    return runs


def measured(model: PreTrainedModel, runs: Sequence[Run], evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Records of the dense model, task by task and over all questions, then of each run."""
    dense = evaluation.scores(model)
    told = {"recipe": None, "calibration": None, "method": "dense", "protocol": "all"}
    told |= {"sparsity": 0.0, "bytes_skipped_share": 0.0}
    yield from _records(told, dense, dense)
    for run in runs:
        skipped = larosa_compile.explain(model, recipe=run.recipe).graphs[0].bytes_skipped_share
        torch._dynamo.reset()
        model.compile(backend="larosa", options={"recipe": run.recipe})
        # what `Module.compile` sets is what a call of the module calls
        compiled: Any = model._compiled_call_impl
        model._compiled_call_impl = begun_dense(compiled, model._call_impl, run.protocol)
        try:
            scores = evaluation.scores(model)
        finally:
            model._compiled_call_impl = None
        told = {"recipe": run.name, "calibration": run.recipe.calibration["tokens"]}
        told |= {"method": run.recipe.method, "protocol": run.protocol}
        told |= {"sparsity": run.recipe.sparsity, "bytes_skipped_share": skipped}
        yield from _records(told, scores, dense)


def _records(told: dict[str, Any], scores: Scores, dense: Scores) -> Iterator[dict[str, Any]]:
    for task in (*scores, ALL):
        for metric in METRICS:
            tasks = [name for name in (scores if task == ALL else [task]) if metric in scores[name]]
            found = [score for name in tasks for score in scores[name][metric]]
            base = [score for name in tasks for score in dense[name][metric]]
            if len(found) < 2:
                continue
            over, error = paired(found, base)
            yield told | {
                "task": task,
                "metric": metric,
                "questions": len(found),
                "accuracy": statistics.mean(found),
                "over_dense": over,
                "over_dense_error": error,
            }


def table(records: list[dict[str, Any]]) -> Table:
    """A line per task and metric; accuracies in percent, differences in points with one standard error."""
    made = Table(title=f"{records[0]['model']}, zero-shot")
    for column in ("task", "metric", "questions"):
        made.add_column(column, justify="right" if column == "questions" else "left", no_wrap=True)
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        lines.setdefault((record["task"], record["metric"]), []).append(record)
    for record in next(iter(lines.values())):  # every line has the same runs, of which two may have one name
        told = "dense" if record["recipe"] is None else f"{record['recipe']} {100 * record['sparsity']:.3g} %"
        made.add_column(told if record["protocol"] == "all" else f"{told}, {record['protocol']}", justify="right")
    for (task, metric), line in lines.items():
        cells = [f"{record['accuracy']:.2%}" for record in line[:1]]
        cells += [
            f"{record['accuracy']:.2%} ({100 * record['over_dense']:+.2f} ± {100 * record['over_dense_error']:.2f})"
            for record in line[1:]
        ]
        made.add_row(task, metric, str(line[0]["questions"]), *cells)
    return made


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", help="names of lm_eval's tasks, and files of BIG-bench's format (.json)")
    parser.add_argument("--quick", action="store_true", help="32 questions of each task, one sparsity")
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    parser.add_argument("--recipes", nargs="+", type=Path, default=[], help="by default one is calibrated")
    known = f"{', '.join(assets.TEXTS)}, or a file"
    parser.add_argument("--calibration", default="wiki", help=f"text to calibrate on: {known} (default: wiki)")
    parser.add_argument("--calibration-windows", type=measure.positive, default=24)
    parser.add_argument("--context", type=measure.positive, default=1024, help="tokens of such a window")
    own = f"the recipes', {', '.join(map(str, SPARSITIES))} without any"
    parser.add_argument("--sparsities", nargs="+", type=measure.sparsity, default=[], help=f"(default: {own})")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=["all"])
    parser.add_argument("--limit", type=measure.positive, help="questions of each task (default: all)")
    parser.add_argument("--batch-size", type=measure.positive, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every variant")
    arguments = parser.parse_args(argv)
    if not arguments.recipes and not arguments.sparsities:
        arguments.sparsities = SPARSITIES[:1] if arguments.quick else SPARSITIES
    arguments.limit = arguments.limit or (32 if arguments.quick else None)
    return arguments


if __name__ == "__main__":
    main()
