"""How many architectures of transformers' causal-LM mapping `torch.compile(backend="larosa")` handles.

Every family becomes a tiny random model that is calibrated and compiled: logits at sparsity 0 against the eager model,
one decoded token through the family's own cache, and what share of the linear weights the report calls sparse.
Families run in worker processes, so one that hangs or crashes costs no other its result.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import coverage_table, measure
from benchmarks.coverage_record import Record
from benchmarks.coverage_workers import command, measured
from benchmarks.families import family_names
from larosa_compile.progress import progress_bar

QUICK = (
    *("llama", "gemma2", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmo2", "cohere"),  # RMSNorm and experts
    *("gpt2", "opt", "bloom", "falcon", "bart", "bert"),  # LayerNorm, before and after the block
    *("mamba", "recurrent_gemma"),  # state spaces
)
"""Families that differ in structure: norms and where they stand, experts, tied and parallel blocks, state spaces."""

TABLE = Path(__file__).resolve().parent / "results" / "coverage.md"

out = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)


def main() -> None:
    arguments = parsed(sys.argv[1:])
    names: list[str] = arguments.families
    meta = measure.machine() | {
        "command": shlex.join(["python", "-m", "benchmarks.coverage", *sys.argv[1:]]),
        "lowering": arguments.lowering,
        "workers": arguments.workers,
    }
    records: list[Record] = []
    interrupted = False
    try:
        with progress_bar(True) as bar:
            task = bar.add_task("families", total=len(names))
            for record in measured(names, arguments.workers, command(arguments.lowering), arguments.timeout):
                records = sorted([*records, record], key=lambda item: names.index(item.family))
                if bar.disable:
                    out.print(f"[{len(records)}/{len(names)}] {coverage_table.line(record)}", soft_wrap=True)
                bar.update(task, advance=1, description=record.family)
                if arguments.json:
                    write(arguments.json, meta, records)
    except KeyboardInterrupt:
        interrupted = True
    out.print(coverage_table.summary(records))
    if interrupted:
        out.print(f"interrupted after {len(records)} of {len(names)} families")
        sys.exit(130)
    if arguments.table:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(coverage_table.markdown(meta, records), encoding="utf-8")


def write(path: Path, meta: dict[str, Any], records: list[Record]) -> None:
    """Writes the records so far; whoever reads or interrupts meanwhile finds a whole file."""
    beside = path.with_name(path.name + ".tmp")
    measure.write(beside, meta, [asdict(record) for record in records])
    beside.replace(path)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with defaults filled in; `families` becomes the list of names to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} families, lowered eagerly")
    parser.add_argument("--families", help="only these, with commas between")
    parser.add_argument("--lowering", choices=("eager", "inductor"), help="default: inductor, eager with --quick")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a family may take (default: 600)")
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every family")
    parser.add_argument("--table", type=Path, help=f"write Markdown to this file (all families: {TABLE.name})")
    arguments = parser.parse_args(argv)
    known = family_names()
    arguments.table = arguments.table or (None if arguments.quick or arguments.families else TABLE)
    arguments.lowering = arguments.lowering or ("eager" if arguments.quick else "inductor")
    given = arguments.families.split(",") if arguments.families else list(QUICK) if arguments.quick else known
    arguments.families = list(dict.fromkeys(given))
    unknown = sorted(set(arguments.families) - set(known))
    if unknown:
        parser.error(f"no causal language model of transformers is called {', '.join(unknown)}")
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    return arguments


if __name__ == "__main__":
    main()
