"""The method's algebra, in float64. Rows are feature vectors, `y = x W + b`, W is [in, out], `x ↦ x Q` rotates.

Source: LaRoSA (arXiv 2507.01299) section 3; the folds follow from orthogonality alone.
"""

from collections.abc import Mapping

import torch

Basis = str | None
"""Name of an orthogonal basis; None is the model's own."""

Rotations = Mapping[str, torch.Tensor]
"""Basis name -> Q, [features, features], orthogonal, columns are the basis vectors."""


def matrix(rotations: Rotations, basis: Basis) -> torch.Tensor | None:
    """Q of a basis in float64, None for the model's own."""
    return None if basis is None else rotations[basis].double()


def change_of_basis(start: torch.Tensor | None, end: torch.Tensor | None) -> torch.Tensor:
    """`Q_startᵀ Q_end`: takes features from one basis to another, [features, features]; one of them may be None."""
    if start is None:
        assert end is not None
        return end.double()
    return start.double().T if end is None else start.double().T @ end.double()


def fold_weight(
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    write: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Q_readᵀ diag(scale) W Q_write`; weight [in, out], scale [in] up to leading ones."""
    folded = weight.double()
    if scale is not None:
        folded = scale.double().reshape(-1, 1) * folded
    if read is not None:
        folded = read.double().T @ folded
    return folded if write is None else folded @ write.double()


def fold_bias(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    write: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(b + shift W) Q_write`, [out]; weight [in, out], bias [out] up to leading ones, shift [in]; None is zero."""
    folded = torch.zeros(weight.shape[1], dtype=torch.float64) if bias is None else bias.double().reshape(-1)
    if shift is not None:
        folded = folded + shift.double() @ weight.double()
    return folded if write is None else folded @ write.double()
