"""What `benchmarks.coverage` measures of one architecture, on a tiny random model of it."""

import copy
import dataclasses
import gc
import inspect
import math
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import families
from benchmarks.coverage_linears import LinearWeights
from larosa_compile import registry
from larosa_compile.allocation import Coefficients
from larosa_compile.errors import RecipeError
from larosa_compile.recipe import Recipe
from larosa_compile.report import GraphReport

TOLERANCE = 1e-4
"""Largest relative error of float32 logits that counts as exact."""

SPARSITY = 0.5
PROMPT, DECODE_PROMPT, CALIBRATION = 12, 8, (4, 24)
"""Tokens of the compared forward, tokens before the decoded one, and the batch to calibrate on."""

MISSING_LISTED = 10

Emit = Callable[["Record"], None]


@dataclass
class Record:
    """One family. `step` is the one under way, "" at the end; `errors` and `seconds` are by step.

    What was not reached keeps its default: False for what would have to hold, None for what was not measured.
    """

    family: str
    model_type: str = ""
    step: str = ""
    built: bool = False
    compiled: bool = False
    exact: bool = False
    error_rel: float | None = None
    decode_exact: bool | None = None
    decode_error_rel: float | None = None
    decode_reason: str | None = None
    sparse_changes_logits: bool | None = None
    parameters: int = 0
    linears: dict[str, int] = field(default_factory=dict)
    sites: int = 0
    sparse_bytes_share: float | None = None
    decode_sparse_bytes_share: float | None = None
    self_check_faults: int = 0
    streams: int = 0
    streams_rotated: int = 0
    online_rotations: int = 0
    graphs: int = 0
    refusals: list[dict[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    dense_reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_total: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)
    error: str | None = None


def measure_family(family: str, lowering: str = "eager", emit: Emit = lambda record: None) -> Record:
    """Builds, calibrates, compiles and runs one family; whatever it raises ends up in the record."""
    record = Record(family)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            _measure(record, lowering, emit)
    except Exception as error:
        fail(record, described(error))
    finally:
        registry.drop_graphs()
        gc.collect()
    return finished(record, time.perf_counter() - start)


def fail(record: Record, reason: str) -> None:
    """Notes why the step under way failed."""
    record.errors[record.step] = reason


def finished(record: Record, seconds: float) -> Record:
    """Sums up a record to which nothing will be added."""
    record.step = ""
    record.seconds_total = round(seconds, 2)
    record.error = "; ".join(f"{step}: {error}" for step, error in record.errors.items()) or None
    record.dense_reason = _dense_reason(record)
    return record


def _measure(record: Record, lowering: str, emit: Emit) -> None:
    with _step(record, "build", emit):
        model = families.tiny_model(record.family)
        record.model_type = str(model.config.model_type)
        record.parameters = sum(parameter.numel() for parameter in model.parameters())
        inputs = families.example_inputs(model, 1, PROMPT, seed=1)
        dense = _prefill(model, model, inputs)
        weights = LinearWeights.of(model, inputs)
        record.linears = weights.counts()
        record.built = True
    with _step(record, "eager decode", emit):
        decoding = _Decoding.start(model, record)
    record.decode_exact = False if decoding else None  # what does not compile does not decode

    with _step(record, "calibrate", emit):
        recipe = _recipe(model)
    registry.drop_graphs()  # a user calibrates in another process, or once; Dynamo's sizes must start afresh
    options: Any = {"recipe": recipe.with_sparsity(0.0), "lowering": lowering}
    fast: Any = torch.compile(model, backend="larosa", options=options)
    with _step(record, "prefill", emit):
        graphs_before = counters["stats"]["unique_graphs"]
        found = _prefill(model, fast, inputs)
        record.compiled = True
        record.graphs = counters["stats"]["unique_graphs"] - graphs_before
        reports = registry.reports_of(model.parameters())
        _facts(record, reports, weights)
        record.error_rel, record.exact = _compared(found, dense)
    if decoding:
        # what fails from here on leaves what was measured before it as it is
        with _tried(record), _step(record, "decode", emit):
            record.decode_error_rel, record.decode_exact = decoding.compare(fast)
            known = set(map(id, reports))
            decode = [report for report in registry.reports_of(model.parameters()) if id(report) not in known]
            record.decode_sparse_bytes_share = weights.bytes_share(_in_sites(decode, weights))
            record.self_check_faults += _faults(decode)
    if recipe.sites:
        with _tried(record), _step(record, "sparse", emit):
            registry.drop_graphs()
            options = {"recipe": recipe, "lowering": lowering}
            sparse = _prefill(model, torch.compile(model, backend="larosa", options=options), inputs)
            if not torch.equal(torch.isfinite(sparse), torch.isfinite(dense)):
                raise ArithmeticError("the sparse logits are not finite where the dense ones are")
            record.sparse_changes_logits = not torch.equal(sparse, dense)


@contextmanager
def _step(record: Record, name: str, emit: Emit) -> Iterator[None]:
    record.step = name
    emit(record)
    start = time.perf_counter()
    try:
        yield
    finally:
        record.seconds[name] = round(time.perf_counter() - start, 2)


@contextmanager
def _tried(record: Record) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        fail(record, described(error))


def _prefill(model: PreTrainedModel, forward: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # some models draw numbers in evaluation too
    accepted = inspect.signature(model.forward).parameters
    without_cache = {"use_cache": False} if {"use_cache", "kwargs"} & accepted.keys() else {}
    logits = forward(**inputs, **without_cache).logits
    assert isinstance(logits, Tensor)
    return logits


def _recipe(model: PreTrainedModel) -> Recipe:
    """Calibrated with heads as sites; empty where there is nothing to make sparse, which must compile all the same."""
    batch = families.example_inputs(model, *CALIBRATION, seed=2)
    extra = sorted(batch.keys() - {"input_ids"})
    if extra:
        raise TypeError(f"calibrate takes token ids alone, and this model needs {', '.join(extra)}")
    ids, coefficients = [batch["input_ids"]], Coefficients(heads=1.0)
    try:
        return larosa_compile.calibrate(model, ids, SPARSITY, coefficients=coefficients, progress=False)
    except RecipeError:
        shapes = {path: tuple(p.shape) for path, p in model.named_parameters(remove_duplicate=False)}
        return Recipe(0.0, {}, {}, shapes, {})


@dataclass(frozen=True)
class _Decoding:
    """A prompt that the eager model has read into its own kind of cache, and what it makes of the next two tokens."""

    model: PreTrainedModel
    cache_name: str
    cache: Any
    steps: list[Tensor]
    expected: list[Tensor]

    @classmethod
    def start(cls, model: PreTrainedModel, record: Record) -> "_Decoding | None":
        """None, and the reason in the record, where the eager model itself cannot decode."""
        try:
            output = model(**families.example_inputs(model, 1, DECODE_PROMPT, seed=3), use_cache=True)
            name, cache = families.cache_of(output)
            steps = [families.example_inputs(model, 1, 1, seed)["input_ids"] for seed in (4, 5)]
            started = cls(model, name, cache, steps, [])
            return dataclasses.replace(started, expected=started.logits(model))
        except Exception as error:
            record.decode_reason = described(error)
            return None

    def logits(self, forward: Any) -> list[Tensor]:
        """Logits of one token through `forward`, and of one more, eagerly, from the cache that it left."""
        cache, logits = copy.deepcopy(self.cache), []
        for step, run in zip(self.steps, (forward, self.model), strict=True):
            output = run(input_ids=step, **{self.cache_name: cache}, use_cache=True)
            _, cache = families.cache_of(output)
            logits.append(output.logits)
        return logits

    def compare(self, forward: Any) -> tuple[float | None, bool]:
        return _compared(torch.cat(self.logits(forward)), torch.cat(self.expected))


def _compared(found: Tensor, expected: Tensor) -> tuple[float | None, bool]:
    """Relative error in float64 and whether it counts as exact; an infinity must be met by the same one."""
    if found.shape != expected.shape:
        return None, False
    wide, reference = found.double(), expected.double()
    difference = torch.where(wide == reference, 0.0, wide - reference).norm()
    error = float(difference / reference[reference.isfinite()].norm())
    return (error, error <= TOLERANCE) if math.isfinite(error) else (None, False)


def _facts(record: Record, reports: list[GraphReport], weights: LinearWeights) -> None:
    streams = [stream for report in reports for stream in report.streams]
    record.streams = len(streams)
    record.streams_rotated = sum(bool(stream.bases) for stream in streams)
    record.online_rotations = sum(len(report.online) for report in reports)
    refusals = dict.fromkeys((refusal.site, refusal.reason) for report in reports for refusal in report.refusals)
    record.refusals = [{"site": site, "reason": reason} for site, reason in refusals]

    record.self_check_faults = _faults(reports)

    inside = _in_sites(reports, weights)
    record.sites = len(inside)
    record.sparse_bytes_share = weights.bytes_share(inside)
    reasons = {weights.name_of(site): reason for site, reason in reversed(refusals)}
    missing = [path for path in weights.read if path not in inside]
    record.missing = [
        {"path": path, "reason": reasons.get(path, "no graph has a linear with this weight")}
        for path in missing[:MISSING_LISTED]
    ]


def _in_sites(reports: list[GraphReport], weights: LinearWeights) -> set[str]:
    return weights.among(path for report in reports for site in report.sites for path in site.paths)


def _faults(reports: list[GraphReport]) -> int:
    """Sites that the backend rewrote wrongly, noticed, and left dense: exact, but a defect all the same."""
    reasons = [refusal.reason for report in reports for refusal in report.refusals]
    return sum("self-check" in reason or "computes something else" in reason for reason in reasons)


def _dense_reason(record: Record) -> str | None:
    """Why a family is not exact, or nothing of it rotated: its errors, else the commonest reasons of its refusals."""
    if record.exact and record.streams_rotated:
        return None
    if record.error:
        return record.error
    if not record.exact:
        return f"relative error {record.error_rel:.1e}" if record.error_rel is not None else "logits not comparable"
    common = Counter(refusal["reason"] for refusal in [*record.refusals, *record.missing]).most_common(2)
    found = "streams are not rotated" if record.streams else "no residual stream found"
    return "; ".join([found, *(reason for reason, _ in common)])


def described(error: BaseException) -> str:
    """The exception that started it all, by type, first line of its message and place."""
    while True:
        cause = getattr(error, "inner_exception", None) or error.__cause__
        if cause is None or cause is error:
            break
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}{place}"
