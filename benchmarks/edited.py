"""A model with a recipe, run operation by operation, whose sites compute what a benchmark tries; its arguments."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from transformers import PreTrainedModel

from benchmarks import measure
from benchmarks.windows import halves_of
from larosa_compile.kernels import ops, reference
from larosa_compile.passes.pipeline import Rewritten
from larosa_compile.recipe import Recipe
from larosa_compile.stepwise import compile_stepwise

WIKI = "wiki"


@dataclass(frozen=True)
class Product:
    """A site's sparse product, about to be computed.

    path: of the site's first linear. is_sorted: whether the features are those of a basis, sorted by energy. x: [rows,
    features]. weight: [features, columns]. kept: how many features are, None for all.
    """

    path: str
    is_sorted: bool
    x: Tensor
    weight: Tensor
    kept: int | None

    @property
    def largest(self) -> Tensor:
        """x with what a Top-K drops set to 0."""
        return self.x if self.kept is None else reference.sparsify(self.x, self.kept)

    def as_it_is(self) -> Tensor:
        """The output of the site, [rows, columns]."""
        return self.largest @ self.weight


Rule = Callable[[Product], Tensor]
"""What a site puts out, [rows, columns]."""


class Edited:
    """To be called as the model is."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, rule: Rule = Product.as_it_is) -> None:
        self._rule = rule
        self._compiled = compile_stepwise(model, recipe, self._interpreter)

    def __call__(self, **inputs: Any) -> Any:
        with torch.no_grad():
            return self._compiled(**inputs)

    def _interpreter(self, module: GraphModule, rewritten: Rewritten) -> Interpreter:
        sites = {made.products[0]: made.site for made in rewritten.sites}
        known = {node: (site.linears[0].path, site.basis is not None) for node, site in sites.items()}
        return _Editing(module, known, self._rule)


class _Editing(Interpreter):
    def __init__(self, module: GraphModule, sites: dict[Node, tuple[str, bool]], rule: Rule) -> None:
        super().__init__(module)
        self._sites, self._rule = sites, rule

    def run_node(self, n: Node) -> Any:
        if n not in self._sites:
            return super().run_node(n)
        (x, weight, kept, *_), _ = self.fetch_args_kwargs_from_env(n)
        assert n.target is ops.sparse_linear
        return self._rule(Product(*self._sites[n], x, weight, kept))


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all records of such a run have in common."""
    return {"model": arguments.model, "context": arguments.context}


def windows_for(
    arguments: argparse.Namespace, tokenizer: Any, texts: Sequence[str] = (WIKI,)
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Windows of wiki text to learn from, and of each text those to evaluate on."""
    halves = halves_of((WIKI, *texts), tokenizer, arguments.context)
    held_out = {name: halves[name][1][: arguments.windows] for name in texts}
    return halves[WIKI][0][: arguments.calibration_windows], held_out


def argument_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """What every such benchmark is given. quick: what its short run leaves out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name, a folder or a GGUF file")
    parser.add_argument("--context", type=measure.positive, default=1024)
    parser.add_argument("--windows", type=measure.positive, help="to evaluate on, at least 2 (default: 8)")
    parser.add_argument("--calibration-windows", type=measure.positive, help="(default: 24)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, help="write the records to this file, anew after every step")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with the defaults of windows filled in."""
    arguments = parser.parse_args(argv)
    arguments.windows = arguments.windows or (2 if arguments.quick else 8)
    arguments.calibration_windows = arguments.calibration_windows or (4 if arguments.quick else 24)
    if arguments.windows < 2:
        parser.error(f"--windows must be at least 2, for an error to be known, got {arguments.windows}")
    return arguments
