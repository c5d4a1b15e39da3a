"""Worker processes for `benchmarks.coverage`: they outlive many families and are replaced when one kills them.

As a program this is a worker: family names come in on standard input, a line each, and records go out as JSON lines,
one at the start of every step, so that whoever reads them knows what a hanging or crashed family had got to.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

import transformers

from benchmarks.coverage_record import Record, fail, finished, measure_family

SERVED = 40
"""Families a worker measures before another takes its place: compiled code is never unloaded."""


class Worker:
    """A process that measures families one after the other; started at the first one, and again after a loss."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._command = list(command)
        self._environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        self._served = 0
        self._lock = threading.Lock()
        self._stopped = False

    def measure(self, family: str, timeout: float) -> Record:
        """The family's record; a worker that dies or takes too long leaves what it had sent by then."""
        start = time.perf_counter()
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            self.stop()

        timer = threading.Timer(timeout, give_up)
        timer.start()
        record, done = Record(family, step="start"), False
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(family + "\n")
                process.stdin.flush()
            while not done and (line := process.stdout.readline()):
                record = Record(**json.loads(line))
                done = not record.step
        finally:
            timer.cancel()
        if done:
            return record
        self.stop()
        fail(record, f"timed out after {timeout:.0f} s" if timed_out.is_set() else self._last_words(process))
        return finished(record, time.perf_counter() - start)

    def stop(self, for_good: bool = False) -> None:
        """Kills the process and its children; from another thread this also ends a `measure` under way."""
        with self._lock:
            self._stopped |= for_good
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def close(self) -> None:
        """Stops for good and frees the pipes, which only the thread that measures may do."""
        self.stop(for_good=True)
        self._forget()
        self._errors.close()

    def _forget(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and (self._served >= SERVED or self._process.poll() is not None):
            self.stop()
            self._forget()
        with self._lock:
            if self._stopped:
                raise InterruptedError("the worker was stopped")
            if self._process is None:
                self._process, self._served = self._start(), 0
        self._served += 1
        return self._process

    def _start(self) -> subprocess.Popen[str]:
        self._errors.seek(0)
        self._errors.truncate()
        # a session of its own: Ctrl-C is the parent's business, and children of the compiler die with it
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
            start_new_session=True,
        )

    def _last_words(self, process: subprocess.Popen[str]) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"worker exited with {process.returncode}" + (f": {lines[-1][:200]}" if lines else "")


def command(lowering: str) -> list[str]:
    """What starts a worker."""
    return [sys.executable, "-m", "benchmarks.coverage_workers", "--lowering", lowering]


def measured(names: Sequence[str], workers: int, command: Sequence[str], timeout: float) -> Iterator[Record]:
    """Records as they are finished, in any order. Leaving the iterator early ends all workers."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    records: queue.SimpleQueue[Record | BaseException] = queue.SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = [Worker(command, threads) for _ in range(min(workers, len(names)))]
    leaving = threading.Event()

    def work(worker: Worker) -> None:
        try:
            while not leaving.is_set():
                records.put(worker.measure(waiting.get_nowait(), timeout))
        except queue.Empty:
            pass
        except BaseException as error:
            records.put(error)
        finally:
            worker.close()

    with ThreadPoolExecutor(max(1, len(pool))) as executor:
        try:
            for worker in pool:
                executor.submit(work, worker)
            for _ in names:
                record = records.get()
                if isinstance(record, BaseException):
                    raise record
                yield record
        finally:
            leaving.set()
            for worker in pool:
                worker.stop(for_good=True)


def serve(lowering: str, names: TextIO, out: TextIO) -> None:
    """Measures the families named on `names` as they come, writing their records to `out`."""

    def emit(record: Record) -> None:
        out.write(json.dumps(dataclasses.asdict(record)) + "\n")
        out.flush()

    for line in names:
        emit(measure_family(line.strip(), lowering, emit))


def main() -> None:
    """The worker's entry: records go to standard output, whatever the libraries print to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(arguments.lowering, sys.stdin, out)


if __name__ == "__main__":
    main()
