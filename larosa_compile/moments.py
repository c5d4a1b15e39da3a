"""Second moments of stream activations, streamed over batches: what the rotations are computed from."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from larosa_compile.passes.analysis import GraphFacts
from larosa_compile.passes.plan import HEAD, SiteChoice


class Moments:
    """Uncentred second moments `Σ xᵀx` per basis, float64; memory is one [d, d] matrix a basis."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._rows: Counter[Hashable] = Counter()

    @property
    def tokens(self) -> int:
        """Tokens added: what one reader has seen, the one that saw most (a head may see the last of each prompt)."""
        return max(self._rows.values(), default=0)

    def add(self, basis: str, reader: Hashable, activation: Tensor) -> None:
        """Adds every row of `activation` [..., d] as `reader` sees it."""
        # a sum made in inference mode could not be added to outside it
        with torch.inference_mode(False), torch.no_grad():
            x = activation.reshape(-1, activation.shape[-1]).double()
            total = self.sums.setdefault(basis, torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
            total.addmm_(x.T.to(total.device), x.to(total.device))
        self._rows[reader] += len(x)

    def joined(self, owners: Mapping[str, str]) -> "Moments":
        """The moments of bases that stand for several of these. owners: basis -> the one that it becomes a part of."""
        joined = Moments()
        for basis, total in self.sums.items():
            owner = owners[basis]
            joined.sums[owner] = joined.sums[owner] + total if owner in joined.sums else total
        return joined

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


def observe(facts: GraphFacts, choices: Mapping[str, SiteChoice], add: Callable[..., None], *more: Node) -> None:
    """Makes the graph itself report what is rotated: what a reader sees before the norm's scale, a head behind it.

    choices: path of a linear -> its site, which may have no basis; sites that share a basis add up.
    add: called as `Moments.add` is, with the values of `more` behind. A reader is a path, and how many times the
    graph has met it before: a weight that layers share reads every token as many times.
    """
    graph = facts.graph.graph
    met: Counter[str] = Counter()
    for group in facts.groups:
        choice, reader = choices.get(group.name), facts.reader_of(group)
        if choice is None or choice.basis is None:
            continue
        if choice.kind == HEAD:
            source = group.activation
        elif reader is not None:
            source = reader.source
        else:
            continue
        with graph.inserting_after(source):
            graph.call_function(add, (choice.basis, (group.name, met[group.name]), source, *more))
        met[group.name] += 1
    facts.graph.module.recompile()
