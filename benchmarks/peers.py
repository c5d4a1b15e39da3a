"""The same model on the same machine in what people use instead: llama.cpp, OpenVINO, torchao, and torch.compile.

Every peer decodes in a process of its own with the same number of threads: one sequence, the same 128 tokens first,
then greedy. They take turns, in the opposite order in every other round; between rounds reading a large buffer says
what the memory gives. `tokens_per_s` is the median over all tokens, `spread` the lowest and highest median of a
round. Perplexity is over the same tokens everywhere: windows of 512 tokens of wiki text, all next-token losses.
`MB` is of linear weights that a token reads, with their scales: the head counts, the embedding does not.
What does not run is a record too, with the reason. torch.compile and larosa run without Dynamo's guards on modules.

GGUF files of other types are made from the given one, in the folder for temporary files (TMPDIR): of a file of 4 bits
per weight, those of 8 and 16 hold the same values, and another type of 4 loses a second time.
"""

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks import assets, measure
from benchmarks.gguf_files import gguf_type
from benchmarks.peer_process import Child, PeerError
from benchmarks.peer_runs import Job, install_hint, version
from larosa_compile.calibration import token_batches
from larosa_compile.evaluation import perplexity
from larosa_compile.kernels.formats import FORMATS
from larosa_compile.progress import progress_bar
from larosa_compile.recipe import Recipe

CONTEXT, PPL_CONTEXT, CALIBRATION_CONTEXT, TOKENS = 128, 512, 1024, 32
SPARSITIES, PACKED_SPARSITIES = (0.25, 0.4, 0.5), (0.0, 0.4, 0.5)
NO_GGUF = "reads GGUF files only: make one with llama.cpp's convert_hf_to_gguf.py, and pass --model FILE.gguf"

LEFT, RIGHT = ("weights", "peer", "version"), ("sparsity", "MB", "tokens/s", "rounds' medians", "perplexity")
out = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@dataclass(frozen=True)
class Peer:
    """A row of the table: a runtime (a key of `peer_runs.RUNTIMES`) with weights of one type."""

    name: str
    runtime: str
    weights: str
    package: str
    sparsity: float = 0.0
    recipe: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.weights} {self.sparsity:.0%}"


def peers(given: str, recipes: Sequence[Path] = ()) -> list[Peer]:
    """All of them; `given` is the type of the weights in the GGUF file, "" without one.

    Besides larosa as the paper has it, every recipe is run at the sparsity it was made for, and is named by its file
    up to the first dot.
    """
    found = [Peer("torch.compile", "torch", "bf16", "torch")]
    for weights, sparsities in {"bf16": SPARSITIES, **dict.fromkeys(FORMATS, PACKED_SPARSITIES)}.items():
        found += [Peer("larosa", "larosa", weights, "larosa-compile", sparsity) for sparsity in sparsities]
    for path in recipes:
        name, sparsity = path.name.partition(".")[0], Recipe.load(path).sparsity
        name = name if name.startswith("larosa") else f"larosa {name}"
        for weights in ("bf16", *FORMATS):
            found.append(Peer(name, "larosa", weights, "larosa-compile", sparsity, str(path)))
    found += [Peer("torchao", "torch", "int8", "torchao"), Peer("torchao, frozen", "frozen", "int8", "torchao")]
    for weights in dict.fromkeys(("bf16", "f16", "q8_0", "q4_0", given or "f16")):
        found.append(Peer("llama.cpp", "llama.cpp", weights, "llama-cpp-python"))
        if weights != "bf16":  # OpenVINO's reader knows f16 alone, and computes in what the processor prefers
            found.append(Peer("openvino", "openvino", weights, "openvino-genai"))
    return found


def missing(peer: Peer, gguf: str | None) -> str | None:
    """Why the peer cannot be started, if it cannot."""
    if version(peer.package) is None:
        return f"not installed: {install_hint(peer.package)}"
    return NO_GGUF if gguf is None and peer.runtime in ("llama.cpp", "openvino") else None


@dataclass
class Run:
    """A peer's process, what it measured, and why it did not measure more."""

    peer: Peer
    job: Job
    reason: str | None = None
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.peer_runs")
    timeout: float = 3600.0  # seconds for one answer; the longest is compiling a large model
    rounds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    bytes_per_token: int | None = None
    _child: Child | None = None

    def start(self) -> None:
        """Loads the model and decodes a few tokens, unless that has been done; so do the other steps."""
        self._ask(None, "")

    def decode(self) -> None:
        """One round."""
        # the first token finds the caches full of the other peers' weights
        self.rounds += [answer["seconds"][1:] for answer in self._ask({"decode": TOKENS + 1}, "")]
        self.rounds = self.rounds if self.reason is None else []  # or they would not be the others' rounds

    def predict(self) -> None:
        """The perplexity, and the bytes; without them the speed still stands."""
        for answer in self._ask({"losses": True}, "perplexity: "):
            self.losses, self.bytes_per_token = answer["losses"], answer["bytes"]

    def stop(self) -> None:
        """Ends the process; a later step starts another."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def record(self, model: str) -> dict[str, Any]:
        """The peer's line in the file."""
        speeds = [1 / statistics.median(seconds) for seconds in self.rounds]
        every = [token for seconds in self.rounds for token in seconds]
        return {
            "peer": self.peer.name,
            "version": version(self.peer.package),
            "model": model,
            "weights": self.peer.weights,
            "sparsity": self.peer.sparsity,
            "bytes_per_token": self.bytes_per_token,
            "tokens_per_s": 1 / statistics.median(every) if speeds else None,
            "spread": [min(speeds), max(speeds)] if speeds else None,
            "ppl": perplexity(self.losses) if self.losses else None,
            "skipped_reason": self.reason,
        }

    def _ask(self, request: dict[str, Any] | None, prefix: str) -> list[dict[str, Any]]:
        """The answer, if there is one."""
        if self.reason is not None:
            return []
        try:
            if self._child is None:
                self._child = Child(self.command, self.job.threads)
                self._child.ask(vars(self.job), self.timeout)
            return [self._child.ask(request, self.timeout)] if request else []
        except PeerError as error:
            self.stop()
            self.reason = prefix + str(error)
            if "SIGILL" in self.reason:
                self.reason += f"; built for another processor? {install_hint(self.peer.package)}"
        return []


def take_turns(
    runs: list[Run], rounds: int, keep: bool, bandwidths: list[float], done: Callable[[], Any] = lambda: None
) -> None:
    """Every run decodes once a round; where they are not kept, each loads its model anew for it.

    bandwidths: what memory gave when it was read before, between and after the rounds is appended here, in GB/s. done:
    called after every step.
    """
    try:
        for run in runs if keep else []:
            run.start()
            done()
        for number in range(rounds):
            bandwidths.append(round(measure.bandwidth_gb_s(3), 1))
            for run in runs if number % 2 == 0 else reversed(runs):
                run.decode()
                if not keep:
                    run.stop()
                done()
        bandwidths.append(round(measure.bandwidth_gb_s(3), 1))
        for run in runs:
            run.predict()
            run.stop()
            done()
    finally:
        for run in runs:
            run.stop()


def bits(weights: str) -> int:
    """Of one weight, the scales of blocks not counted; 0 if the type's name does not say."""
    digits = re.search(r"\d+", weights)
    return int(digits[0]) if digits else 0


def table(records: list[dict[str, Any]], title: str) -> Table:
    """The records in blocks of equal precision."""
    caption = "Compare within a block: in the next one every weight has fewer bits, so fewer bytes are read."
    found = Table(*LEFT, *(Column(name, justify="right") for name in RIGHT), title=title, caption=caption)
    for width in sorted({bits(record["weights"]) for record in records}, reverse=True):
        found.add_section()
        found.add_row(f"[bold]{width} bits[/bold]" if width else "[bold]other[/bold]")
        for record in records:
            if bits(record["weights"]) == width:
                size, speed = record["bytes_per_token"], record["tokens_per_s"]
                spread, ppl = record["spread"], record["ppl"]
                found.add_row(
                    *(record["weights"], record["peer"], record["version"] or "—", f"{record['sparsity']:.0%}"),
                    f"{size / 1e6:,.0f}" if size else "—",
                    f"{speed:.1f}" if speed else "—",
                    f"{spread[0]:.1f} to {spread[1]:.1f}" if spread else "—",
                    f"{ppl:.2f}" if ppl else "—",
                )
    return found


def prepared(model: str, quick: bool, folder: str, only: Sequence[str] = (), recipes: Sequence[Path] = ()) -> list[Run]:
    """One run for every peer, or for those whose row has one of these words in it, all with the same tokens."""
    path = assets.smollm2_path() if model == "smollm2" else Path(model)
    gguf = str(path) if path.suffix == ".gguf" else None
    _, tokenizer = assets.load_model(model, torch.bfloat16)
    windows = list(token_batches(assets.text("wiki"), tokenizer, CALIBRATION_CONTEXT))
    calibration = [window[0].tolist() for window in windows[: 4 if quick else 24]]
    held_out = [part.tolist() for window in windows[len(windows) // 2 :] for part in window[0].split(PPL_CONTEXT)]
    prompt = windows[-1][0, :CONTEXT].tolist()
    runs = []
    for peer in peers(gguf_type(path) if gguf else "", recipes):
        if only and not any(words in str(peer) for words in only):
            continue
        what = (peer.runtime, model, gguf, peer.weights, peer.sparsity, torch.get_num_threads(), folder)
        job = Job(*what, prompt, held_out[: 2 if quick else 8], calibration, peer.recipe)
        runs.append(Run(peer, job, missing(peer, gguf)))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    parser.add_argument("--quick", action="store_true", help="fewer windows and rounds")
    parser.add_argument("--restart", action="store_true", help="one model in memory at a time, loaded in every round")
    words = "run those alone whose 'name weights sparsity' has these words in it, such as 'larosa int8' or q4_0"
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help=words)
    parser.add_argument(
        "--recipes", nargs="+", type=Path, default=[], metavar="FILE", help="to run larosa with besides"
    )
    parser.add_argument("--json", type=Path, help="also write the measurements to this file, anew after every step")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 5
    meta = measure.machine() | {"context": CONTEXT, "tokens": TOKENS, "rounds": rounds, "restart": arguments.restart}
    bandwidths: list[float] = []
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, progress_bar(True) as bar:
        runs = prepared(arguments.model, arguments.quick, folder, arguments.only, arguments.recipes)
        meta |= {"ppl_context": PPL_CONTEXT, "ppl_windows": len(runs[0].job.windows)}
        task = bar.add_task("peers", total=len(runs) * (rounds + 1 + (not arguments.restart)))

        def done() -> None:
            records[:] = [run.record(arguments.model) for run in runs]
            measure.write_so_far(arguments.json, meta | {"bandwidth_of_rounds_gb_s": bandwidths}, records)
            bar.advance(task)

        take_turns(runs, rounds, not arguments.restart, bandwidths, done)
    out.print(table(records, f"{arguments.model}: decode, one sequence, greedy, context {CONTEXT}"))
    for record in records:
        if record["skipped_reason"]:
            reason = f"{record['peer']} {record['weights']}: {record['skipped_reason']}"
            out.print(reason, soft_wrap=True, markup=False)
    out.print(f"{meta['device']}, {meta['threads']} threads; reads {bandwidths} GB/s between rounds")


if __name__ == "__main__":
    main()
