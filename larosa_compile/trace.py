"""What one compile shows of itself: seconds by stage, the dump, torch's trace (TORCH_TRACE) and its log (TORCH_LOGS).

The log has the level that torch's own settings give it: `TORCH_LOGS=larosa_compile` shows one line a graph, and
`TORCH_LOGS=+larosa_compile` every stage and every site that stays dense.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch._logging._internal import trace_structured
from torch.fx import Graph

from larosa_compile.drawing import draw_streams
from larosa_compile.dump import GraphDump, readable, readable_plan
from larosa_compile.passes.plan import Plan
from larosa_compile.report import GraphReport

UNCHANGED = ("plan",)
"""Stages that change no graph: they are timed, and there is nothing new to write."""

_log = logging.getLogger(__name__)


class Trace:
    """One graph's way through the backend. seconds: by stage, those of a repeated stage added up."""

    def __init__(self, directory: Path | None, started: float) -> None:
        """directory: of dumps, or None. started: when the backend was entered, as `time.perf_counter` says it."""
        self._dump = GraphDump.start(directory)
        self.seconds: dict[str, float] = {}
        self._count = 0
        self._last = started
        self._lap("capture")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is done inside as a stage."""
        self._last = time.perf_counter()
        yield
        self._lap(name)

    def graph(self, stage: str, graph: Graph) -> None:
        """The graph as a stage left it, which ends here: the observer of `rewrite`."""
        if stage != "input":
            self._lap(stage)
        if stage not in UNCHANGED:
            self._show(f"{self._count}_{stage}.txt", lambda: readable(graph))
            self._count += 1
        self._last = time.perf_counter()  # writing is nobody's work

    def plan(self, plan: Plan) -> None:
        """What was decided."""
        self._show("plan.txt", lambda: readable_plan(plan))

    def report(self, report: GraphReport) -> None:
        """What was done, and what stays dense."""
        self._show("report.txt", lambda: str(report))
        self._show("stream.svg", lambda: draw_streams(report))
        for origin in report.origins:
            _log.info("%s", origin)
        for refusal in report.refusals:
            _log.debug("%s stays dense: %s", refusal.site, refusal.reason)

    def generated(self, compiled: object) -> None:
        """The code that Inductor made, kernels and all, where it made some."""
        source = getattr(compiled, "source_code", None)
        if source:
            self._show("generated_code.py", lambda: str(source))

    def done(self, report: GraphReport) -> None:
        """Ends the trace: timings, and the one line of the log."""
        timings = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())
        self._show("timings.txt", lambda: timings.replace(", ", "\n"))
        _log.info(
            "graph over %s token(s): %d sparse sites, %d rotations at run time, %d left dense; "
            "%.1f of %.1f MB of linear weights read per token; %s",
            report.rows,
            len(report.sites),
            len(report.online),
            len(report.refusals),
            report.sparse_bytes / 1e6,
            report.dense_bytes / 1e6,
            timings,
        )

    def _lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        _log.debug("%s took %.3f s", stage, now - self._last)
        self._last = now

    def _show(self, name: str, text: Callable[[], str]) -> None:
        """A file of the dump, and an artifact of torch's trace, whichever is wanted."""
        trace_structured("artifact", lambda: {"name": f"larosa_{name}", "encoding": "string"}, payload_fn=text)
        if self._dump.wanted:
            self._dump.write(name, text())
