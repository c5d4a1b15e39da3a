"""What a sparse model keeps on some text, site by site: what thresholds promise on average, counted."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from larosa_compile.kernels import ops, reference
from larosa_compile.passes.pipeline import Rewritten
from larosa_compile.recipe import Recipe
from larosa_compile.stepwise import compile_stepwise


class CountingModel:
    """A model with a recipe, called as the model is; runs the rewritten graphs operation by operation and counts.

    Weights keep the model's dtype, whatever format the recipe asks for.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        self._kept, self._seen = Counter[str](), Counter[str]()
        self._compiled = compile_stepwise(
            model, recipe, lambda module, rewritten: _Counting(module, rewritten, self._kept, self._seen)
        )

    def __call__(self, *args: Any, **named: Any) -> Any:
        with torch.no_grad():
            return self._compiled(*args, **named)

    @property
    def shares(self) -> dict[str, float]:
        """By path of a linear: the share of its input's entries that were not zero behind the selection."""
        return {path: self._kept[path] / seen for path, seen in self._seen.items()}


class _Counting(Interpreter):
    def __init__(self, module: GraphModule, rewritten: Rewritten, kept: Counter[str], seen: Counter[str]) -> None:
        super().__init__(module)
        self._kept, self._seen = kept, seen
        self._paths: dict[Node, list[str]] = {
            folded.products[0]: [linear.path for linear in folded.site.linears] for folded in rewritten.sites
        }

    def run_node(self, n: Node) -> Any:
        if n in self._paths:
            args, _ = self.fetch_args_kwargs_from_env(n)
            read = _read_by(n, args)
            kept = int(torch.count_nonzero(read))
            for path in self._paths[n]:
                self._kept[path] += kept
                self._seen[path] += read.numel()
        return super().run_node(n)


def _read_by(product: Node, args: tuple[Any, ...]) -> Tensor:
    """The input of a site's product as the product reads it; of a stack, what is selected stands before it."""
    x: Tensor = args[0]
    selects = product.target is ops.sparse_linear and args[2] is not None
    return reference.sparsify(x, args[2]) if selects else x
