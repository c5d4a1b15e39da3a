"""Folded weights: built once per model and recipe, shared by every graph that reads them, freed with the last."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from larosa_compile.capture import Captured
from larosa_compile.errors import StaleWeightsError
from larosa_compile.memory import return_freed, return_mapped, use_huge_pages
from larosa_compile.passes.graph import GraphInvariantError
from larosa_compile.passes.parameters import Parameters
from larosa_compile.passes.quantised import stored_in
from larosa_compile.passes.rewriting import FoldedTensor
from larosa_compile.recipe import Recipe
from larosa_compile.released import check_not_released, is_released, release

Version = tuple[tuple[int, int], ...]
"""What tells whether a parameter was written to: a count and an address for each tensor that holds its values."""


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """A folded tensor and the parameters it was made of, at the versions it was made from."""

    tensor: Tensor
    sources: tuple[tuple[weakref.ref[Tensor], Version], ...]

    def is_made_of(self, parameters: list[Tensor]) -> bool:
        return len(parameters) == len(self.sources) and all(
            reference() is parameter and _is_unchanged(parameter, version)
            for parameter, (reference, version) in zip(parameters, self.sources, strict=True)
        )


def _version(parameter: Tensor) -> Version:
    """Changes when the parameter is written to, and when its `data` is replaced."""
    return tuple((held._version, 0 if is_released(held) else held.data_ptr()) for held in stored_in(parameter))


def _is_unchanged(parameter: Tensor, version: Version) -> bool:
    """Whether a parameter still has the values it had at `version`; nobody can write to a released one."""
    if type(parameter) is Parameter:  # of these there are hundreds, and every call asks
        return ((parameter._version, parameter.data_ptr()),) == version
    return is_released(parameter) or _version(parameter) == version


# Only compiled graphs hold folded weights; when the last one goes, so do they. A parameter's id may be reused
# after its death, hence `is_made_of`.
_folded: weakref.WeakValueDictionary[tuple[object, ...], FoldedWeight] = weakref.WeakValueDictionary()


class FoldedWeights:
    """The folded weights of one graph, in the order of its added inputs. They are there once `fold` was called.

    release: give the memory of every parameter back once the last weight that it is folded into is made, so that
    no more than one weight is there twice.
    """

    def __init__(self, folded: list[FoldedTensor], captured: Captured, recipe: Recipe, release: bool = False) -> None:
        self._parameters = {path: captured.tensors[node] for node, path in captured.graph.paths.items()}
        needed = Counter(path for spec in folded for path in spec.paths)
        inputs = [node for node in captured.graph.graph.nodes if node.op == "placeholder"]
        self._sources = [
            (index, self._parameters[path], _version(self._parameters[path]), path)
            for index, path in ((index, captured.graph.paths.get(node, "")) for index, node in enumerate(inputs))
            if path in needed
        ]
        self._read = {path for node, path in captured.graph.paths.items() if node.users}
        # what is too small to matter stays
        self._releasable = [path for path in needed if self._parameters[path].ndim > 1]
        self._made: dict[int, FoldedWeight] = {}
        self._steps = self._folding(folded, needed, recipe, release)

    def fold(self) -> "FoldedWeights":
        """Makes all that are not there yet."""
        while self.fold_one():
            pass
        return self

    def fold_one(self) -> bool:
        """Makes one of those that are not there yet. Returns whether there was one."""
        with torch.no_grad():
            return next(self._steps, False)

    def _folding(
        self, folded: list[FoldedTensor], needed: Counter[str], recipe: Recipe, release: bool
    ) -> Iterator[bool]:
        # the largest first: what folding it takes besides is then not on top of all the others
        for index, spec in sorted(enumerate(folded), key=lambda numbered: -numbered[1].bytes):
            self._made[index] = _fold(spec, self._parameters, recipe)
            needed.subtract(spec.paths)
            if release:
                self.release(path for path in spec.paths if not needed[path])
            return_mapped(recipe.rotations.values())
            yield True
        use_huge_pages(self.tensors)  # all at once: a page may hold parts of several

    def release(self, paths: Iterable[str] | None = None) -> None:
        """Gives back the memory of the parameters, all or these, that folded weights are made of.

        What the graph itself still reads stays, but for what is in a mapped file: of an embedding it reads a few rows.
        """
        for path in self._releasable if paths is None else set(paths).intersection(self._releasable):
            if path in self._read:
                return_mapped([self._parameters[path]], written=True)
            else:
                release(self._parameters[path])
        return_freed()

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are made, in order."""
        return [self._made[index].tensor for index in sorted(self._made)]

    def check_fresh(self, inputs: list[Any]) -> None:
        """Refuses to run on weights that no longer are the model's. `inputs`: the graph's own, in order.

        Raises:
            StaleWeightsError: a parameter was written to, or replaced, after it was folded.
        """
        for index, parameter, version, path in self._sources:
            if inputs[index] is not parameter:
                # a guard says so before, unless a guard_filter_fn took it out
                raise StaleWeightsError(
                    f"'{path}' is not the parameter that larosa folded: it was replaced, or belongs to another model "
                    "of the same class, and a guard_filter_fn took out the guards that tell models apart; leave it "
                    "out, or call torch._dynamo.reset() and run the compiled model again"
                )
            if not _is_unchanged(parameter, version):
                raise StaleWeightsError(
                    f"'{path}' was changed after larosa folded it, so the compiled model would use its old value; "
                    "call torch._dynamo.reset() and run the compiled model again to fold the new weights"
                )


def _fold(spec: FoldedTensor, parameters: Parameters, recipe: Recipe) -> FoldedWeight:
    sources = [parameters[path] for path in spec.paths]
    key, known = _known(spec, sources, recipe)
    if known is None:
        check_not_released(sources)
        plain = _known(spec.source, sources, recipe)[1] if spec.source is not None else None
        if plain is not None and spec.convert is not None:
            tensor = spec.convert(lambda columns: plain.tensor[:, columns])
        else:
            tensor = spec.build(parameters, recipe.rotations)
        if tensor.shape != spec.shape or (tensor.dtype, tensor.device.type) != (spec.dtype, spec.device.type):
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            wanted = f"{spec.dtype} {spec.shape} on {spec.device}"
            raise GraphInvariantError("fold weights", None, f"'{spec.key}' has to be {wanted}, not {found}")
        known = FoldedWeight(tensor, tuple((weakref.ref(p), _version(p)) for p in sources))
        _folded[key] = known
    return known


def _known(spec: FoldedTensor, sources: list[Tensor], recipe: Recipe) -> tuple[tuple[object, ...], FoldedWeight | None]:
    """The key of a folded weight, and the weight if it is there and its parameters are as they were."""
    key = (recipe.rotations_digest, spec.key, str(spec.device), *map(id, sources))
    known = _folded.get(key)
    return key, known if known is not None and known.is_made_of(sources) else None
