"""Folded weights: built once per model and recipe, shared by every graph that reads them, freed with the last."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from larosa_compile.capture import Captured
from larosa_compile.errors import StaleWeightsError
from larosa_compile.passes.parameters import Parameters
from larosa_compile.passes.rewriting import FoldedTensor
from larosa_compile.recipe import Recipe


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """A folded tensor and the parameters it was made of, at the versions it was made from."""

    tensor: Tensor
    sources: tuple[tuple[weakref.ref[Tensor], tuple[int, int]], ...]

    def is_made_of(self, parameters: list[Tensor]) -> bool:
        return len(parameters) == len(self.sources) and all(
            reference() is parameter and version == _version(parameter)
            for parameter, (reference, version) in zip(parameters, self.sources, strict=True)
        )


def _version(parameter: Tensor) -> tuple[int, int]:
    """Changes when the parameter is written to, and when its `data` is replaced."""
    return parameter._version, parameter.data_ptr()


# Only compiled graphs hold folded weights; when the last one goes, so do they. A parameter's id may be reused
# after its death, hence `is_made_of`.
_folded: weakref.WeakValueDictionary[tuple[object, ...], FoldedWeight] = weakref.WeakValueDictionary()


class FoldedWeights:
    """The folded weights of one graph, in the order of its added inputs."""

    def __init__(self, folded: list[FoldedTensor], captured: Captured, recipe: Recipe) -> None:
        parameters = {path: captured.tensors[node] for node, path in captured.graph.paths.items()}
        with torch.no_grad():
            self._weights = [_fold(spec, parameters, recipe) for spec in folded]
        used = {path for spec in folded for path in spec.paths}
        inputs = [node for node in captured.graph.graph.nodes if node.op == "placeholder"]
        self._sources = [
            (index, parameters[path], _version(parameters[path]), path)
            for index, path in ((index, captured.graph.paths.get(node, "")) for index, node in enumerate(inputs))
            if path in used
        ]

    @property
    def tensors(self) -> list[Tensor]:
        return [weight.tensor for weight in self._weights]

    def check_fresh(self, inputs: list[Any]) -> None:
        """Refuses to run on weights that no longer are the model's. `inputs`: the graph's own, in order.

        Raises:
            StaleWeightsError: a parameter was written to, or replaced, after it was folded.
        """
        for index, parameter, version, path in self._sources:
            if inputs[index] is not parameter or _version(parameter) != version:
                raise StaleWeightsError(
                    f"'{path}' was changed after larosa folded it, so the compiled model would use its old value; "
                    "call torch._dynamo.reset() and run the compiled model again to fold the new weights"
                )


def _fold(spec: FoldedTensor, parameters: Parameters, recipe: Recipe) -> FoldedWeight:
    sources = [parameters[path] for path in spec.paths]
    key = (recipe.digest, spec.key, str(spec.device), *map(id, sources))
    known = _folded.get(key)
    if known is None or not known.is_made_of(sources):
        tensor = spec.build(parameters, recipe.rotations)
        known = FoldedWeight(tensor, tuple((weakref.ref(p), _version(p)) for p in sources))
        _folded[key] = known
    return known
