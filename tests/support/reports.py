"""Reports of tiny models, each made once in a process: tracing is what takes the time."""

from functools import cache

import larosa_compile
from larosa_compile.report import GraphReport
from tests.support.models import tiny_model


@cache
def tiny_report(architecture: str) -> GraphReport:
    """The plan at nominal sparsity 0.5 of a decoder of three layers."""
    (report,) = larosa_compile.explain(tiny_model(architecture)).graphs
    return report
