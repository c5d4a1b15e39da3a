"""Second moments of stream activations, streamed over batches: what the rotations are computed from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from larosa_compile.passes.analysis import GraphFacts


class Moments:
    """Uncentred second moments `Σ xᵀx` per basis, float64; memory is one [d, d] matrix a basis."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, basis: str, activation: Tensor) -> None:
        """Adds every row of `activation` [..., d]."""
        x = activation.detach().reshape(-1, activation.shape[-1]).double()
        total = self.sums.setdefault(basis, torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
        total.addmm_(x.T.to(total.device), x.to(total.device))

    def rotations(self) -> dict[str, Tensor]:
        """Q per basis, [d, d] float32: eigenvectors of the moment, eigenvalues descending (paper: equation 5).

        The paper's damping by a multiple of the identity moves eigenvalues only, so it is left out. Signs are
        fixed (largest entry of a column positive) so that equal moments give equal files.
        """
        return {basis: _descending_eigenvectors(total).float() for basis, total in self.sums.items()}


def _descending_eigenvectors(moment: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def observe(facts: GraphFacts, bases: Mapping[str, str | None], moments: Moments) -> None:
    """Makes the graph itself report what each rotated reader group sees, before the norm's scale.

    bases: path of a linear -> its basis, None where it is not rotated; readers that share a basis add up.
    """
    graph = facts.graph.graph
    for reader in facts.readers:
        basis = bases.get(reader.group.name)
        if basis is not None:
            with graph.inserting_after(reader.source):
                graph.call_function(moments.add, (basis, reader.source))
    facts.graph.module.recompile()
