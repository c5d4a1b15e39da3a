"""Second moments of stream activations, streamed over batches: what the rotations are computed from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.plan import HEAD, SiteChoice


class Moments:
    """Uncentred second moments `Σ xᵀx` per basis, float64; memory is one [d, d] matrix a basis."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, basis: str, activation: Tensor) -> None:
        """Adds every row of `activation` [..., d]."""
        x = activation.detach().reshape(-1, activation.shape[-1]).double()
        total = self.sums.setdefault(basis, torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
        total.addmm_(x.T.to(total.device), x.to(total.device))

    def principal_components(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rotations and spectra by basis.

        Rotations: Q, [d, d] float32: eigenvectors of the moment, eigenvalues descending (paper: equation 5).

        The paper's damping by a multiple of the identity moves eigenvalues only, so it is left out. Signs are
        fixed (largest entry of a column positive) so that equal moments give equal files.

        Spectra: [d] float32, the eigenvalues over their sum: the share of the energy `Σ x²` along each column.
        """
        rotations, spectra = {}, {}
        for basis, total in self.sums.items():
            values, vectors = _descending_eigen(total)
            rotations[basis] = vectors.float()
            # rounding makes a zero eigenvalue slightly negative
            energy = values.clamp_min(0)
            spectra[basis] = (energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)).float()
        return rotations, spectra


def _descending_eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values.flip(0), vectors * largest.sign()


def observe(facts: GraphFacts, choices: Mapping[str, SiteChoice], moments: Moments) -> None:
    """Makes the graph itself report what is rotated: what a reader sees before the norm's scale, a head behind it.

    choices: path of a linear -> its site, which may have no basis; sites that share a basis add up.
    """
    graph = facts.graph.graph
    for group in facts.groups:
        choice, reader = choices.get(group.name), facts.reader_of(group)
        if choice is None or choice.basis is None:
            continue
        source = reader.source if reader is not None and choice.kind != HEAD else group.activation
        with graph.inserting_after(source):
            graph.call_function(moments.add, (choice.basis, source))
    facts.graph.module.recompile()
