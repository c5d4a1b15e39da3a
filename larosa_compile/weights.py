"""Folded weights: built once per model and recipe, shared by every graph that reads them, freed with the last."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from larosa_compile.errors import StaleWeightsError
from larosa_compile.passes.parameters import Parameters
from larosa_compile.passes.rewriting import FoldedTensor
from larosa_compile.recipe import Recipe


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """A folded tensor and the parameters it was made of, at the versions it was made from."""

    tensor: Tensor
    sources: tuple[tuple[weakref.ref[Tensor], int], ...]

    def is_made_of(self, parameters: list[Tensor]) -> bool:
        return len(parameters) == len(self.sources) and all(
            reference() is parameter and version == parameter._version
            for parameter, (reference, version) in zip(parameters, self.sources, strict=True)
        )


# Only compiled graphs hold folded weights; when the last one goes, so do they. A parameter's id may be reused
# after its death, hence `is_made_of`.
_folded: weakref.WeakValueDictionary[tuple[object, ...], FoldedWeight] = weakref.WeakValueDictionary()


class FoldedWeights:
    """The folded weights of one graph, in the order of its added inputs."""

    def __init__(
        self,
        folded: list[FoldedTensor],
        tensors: Mapping[Node, Tensor],
        paths: Mapping[Node, str],
        recipe: Recipe,
    ) -> None:
        parameters = {path: tensors[node] for node, path in paths.items()}
        with torch.no_grad():
            self._weights = [_fold(spec, parameters, recipe) for spec in folded]
        used = dict.fromkeys(path for spec in folded for path in spec.paths)
        self._versions = [(parameters[path], parameters[path]._version, path) for path in used]

    @property
    def tensors(self) -> list[Tensor]:
        return [weight.tensor for weight in self._weights]

    def check_fresh(self) -> None:
        """Refuses to run on weights that no longer are the model's.

        Raises:
            StaleWeightsError: a parameter was written to after it was folded.
        """
        for parameter, version, path in self._versions:
            if parameter._version != version:
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
        known = FoldedWeight(tensor, tuple((weakref.ref(p), p._version) for p in sources))
        _folded[key] = known
    return known
