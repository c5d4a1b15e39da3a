"""Before a rewritten graph is used: does it compute what the model computes when nothing is dropped?

Both graphs are run once, eagerly, on the inputs that the model was first called with. Where they differ, the first
value that does names the weights it was made from, and those stay dense: a wrong fold becomes a slower model with a
line in its report. What it cannot see is an error below its tolerance, or one that these inputs do not meet.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from larosa_compile.capture import Captured
from larosa_compile.kernels import half, ops
from larosa_compile.passes.pipeline import Rewritten
from larosa_compile.recipe import Recipe

TOLERANCES = {torch.float16: (0.5, 2e-2), torch.bfloat16: (0.5, 1e-1)}
"""dtype -> (share of rows, largest relative error that they may have); in half precision every layer rounds anew."""

DEFAULT_TOLERANCE = (0.9, 1e-3)
"""Not every row has to agree: where two experts are nearly equal, rounding decides which one a token meets."""

NAMED_SITES = 8
"""Sites that a warning names; a model may have hundreds."""

_log = logging.getLogger("larosa_compile")

Observer = Callable[[Node, Any], None]


@dataclass(frozen=True)
class Fault:
    """Sites whose rewriting changed the result, by parameter path, and what was seen."""

    sites: frozenset[str]
    reason: str


def find_fault(
    original: Captured, attempt: Captured, rewritten: Rewritten, folded: list[Tensor], recipe: Recipe
) -> Fault | None:
    """Compares `attempt`, the rewritten copy of `original`, with it on the example inputs; None where they agree.

    folded: the values of the placeholders that the rewriting added. Two forward passes; on a fault, two more, which
    keep intermediate values.
    """
    if any(isinstance(value, FakeTensor) for value in original.inputs):
        _log.warning("the inputs of a graph have no values yet, so its rewriting was not checked")
        return None
    expected = _run(original, original.inputs)
    found = _run(attempt, original.inputs, folded)
    if len(found) == len(expected) and not any(map(_differ, found, expected)):
        return None
    fault = _locate(original, attempt, rewritten, folded, recipe)
    _log.warning("%s: %s", fault.reason, _in_a_line(sorted(fault.sites)) or "the whole graph")
    return fault


def _in_a_line(sites: list[str]) -> str:
    """The report names all of them."""
    more = len(sites) - NAMED_SITES
    return ", ".join(sites[:NAMED_SITES]) + (f" and {more} more" if more > 0 else "")


def _locate(original: Captured, attempt: Captured, rewritten: Rewritten, folded: list[Tensor], recipe: Recipe) -> Fault:
    """Which sites the first differing value was made from; all of them where that cannot be told."""
    known: dict[str, Any] = {}
    bases = rewritten.plan.bases
    _run(original, original.inputs, observe=lambda node, result: known.setdefault(node.name, result))
    agreeing: set[Node] = set()
    differing: list[Node] = []

    def compare(node: Node, result: Any) -> None:
        expected, basis = known.get(node.name), bases.get(node)
        squares = node not in bases and any(bases.get(operand) for operand in node.all_input_nodes)
        if differing or squares or not isinstance(result, Tensor) or not isinstance(expected, Tensor):
            return
        if basis is not None and expected.shape == result.shape:
            expected = (expected.double() @ recipe.rotations[basis].double()).to(expected.dtype)
        if _differ(result, expected):
            differing.append(node)
        else:
            agreeing.add(node)

    _run(attempt, original.inputs, folded, compare)
    sites = [frozenset(linear.path for linear in site.site.linears) for site in rewritten.sites]
    if not differing:
        return Fault(frozenset().union(*sites), "the rewritten graph computes something else")
    made_of: set[str] = set()
    pending, seen = [differing[0]], set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            made_of |= set(rewritten.folded[node].paths) if node in rewritten.folded else set()
            pending.extend(operand for operand in node.all_input_nodes if operand not in agreeing)
    faulty = [site for site in sites if site <= made_of]
    if not faulty:
        # no site's weight: the rotations of a stream, which all its readers share
        faulty = [frozenset(x.path for x in site.site.linears) for site in rewritten.sites if site.site.basis] or sites
    reason = f"the self-check found another value at '{differing[0].name}' after rewriting; these sites stay dense"
    return Fault(frozenset().union(*faulty), reason)


class _NothingDropped(Interpreter):
    """Runs a graph with every sparse op keeping all its inputs, and shows each value to an observer."""

    def __init__(self, module: GraphModule, observe: Observer) -> None:
        super().__init__(module)
        self._observe = observe

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self._observe(n, result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ops.sparse_linear:
            return half.product(args[0], args[1])
        return args[0] if target in (ops.sparsify, ops.keep_above) else super().call_function(target, args, kwargs)


def _run(
    captured: Captured,
    inputs: list[Any],
    folded: list[Tensor] | None = None,
    observe: Observer = lambda node, result: None,
) -> list[Any]:
    """Outputs, and what became of the inputs: a cache is written to in place, hence the copies."""
    copies = [
        value.clone() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else value
        for value in inputs
    ]
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = _NothingDropped(captured.graph.module, observe)
        outputs = module.run(*copies, *(folded or ()), enable_io_processing=False)
    return [*outputs, *copies]


def _differ(found: Any, expected: Any) -> bool:
    """Whether too many rows differ by too much; equal infinities and NaNs agree."""
    if found is expected or not isinstance(expected, Tensor) or not expected.is_floating_point():
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return True
    if not expected.numel() or torch.equal(found, expected):
        return False
    wide, reference = (
        tensor.double().reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in (found, expected)
    )
    same = (wide == reference) | (wide.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, wide - reference).norm(dim=-1)
    length = torch.where(reference.isfinite(), reference, 0.0).norm(dim=-1)
    # a row of nearly nothing is measured against the others
    error = difference / length.clamp_min(1e-3 * float(length.pow(2).mean().sqrt()) or 1.0)
    share, tolerance = TOLERANCES.get(expected.dtype, DEFAULT_TOLERANCE)
    return not float(error.nan_to_num(torch.inf).quantile(share)) <= tolerance
