"""The method's algebra, in float64 or what `precision` says. Rows are feature vectors,
`y = x W + b`, W is [in, out], `x ↦ x Q` rotates.

Source: LaRoSA (arXiv 2507.01299) section 3; the folds follow from orthogonality alone.
"""

from collections.abc import Mapping

import torch

from larosa_compile.passes.products import rotation_for

Basis = str | None
"""Name of an orthogonal basis; None is the model's own."""

Rotations = Mapping[str, torch.Tensor]
"""Basis name -> Q, [features, features], orthogonal, columns are the basis vectors."""


_SLICE = 1024
"""Rows or columns of a folded weight that are computed at a time: what is not rounded yet stays small."""


def matrix(rotations: Rotations, basis: Basis) -> torch.Tensor | None:
    """Q of a basis, None for the model's own."""
    return None if basis is None else rotations[basis]


def precision(dtype: torch.dtype) -> torch.dtype:
    """What values to be rounded to `dtype` are computed in.

    A product of thousands of terms in float32 errs by 1e-6 of its length, a rounding to 16 bits by 5e-4 or more.
    """
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


def change_of_basis(
    start: torch.Tensor | None, end: torch.Tensor | None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """`Q_startᵀ Q_end`, computed in `dtype`: takes features from one basis to another, [features, features].

    One of them may be None.
    """
    if start is None:
        assert end is not None
        return end.to(dtype)
    return start.to(dtype).T if end is None else start.to(dtype).T @ end.to(dtype)


def fold_weight(
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    write: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Q_readᵀ diag(scale) W Q_write`; weight [in, out], scale [in] up to leading ones.

    read, write: of which features come by falling energy. out: [in, out], where the result is rounded to, once but for
    what `passes/products.py` says of bfloat16; by default a new tensor in float64.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
    wide = precision(out.dtype)
    factors = None if scale is None else scale.to(wide).reshape(-1, 1)
    if read is not None:
        left = (read.to(wide) if factors is None else factors * read.to(wide)).T
        if write is None:
            rotation = rotation_for(left, weight.dtype, out.dtype)
            for columns in _slices(weight.shape[1]):
                rotation.before(weight[:, columns], out[:, columns])
            return out
        weight, factors = left @ weight.to(wide), None
    dtype = weight.dtype if factors is None else wide
    right = None if write is None else rotation_for(write.to(wide).T, dtype, out.dtype)
    for rows in _slices(weight.shape[0]):
        part = weight[rows] if factors is None else factors[rows] * weight[rows].to(wide)
        if right is not None:
            right.after(part, out[rows])
        else:
            out[rows] = part
    return out


def _slices(size: int) -> list[slice]:
    return [slice(start, start + _SLICE) for start in range(0, size, _SLICE)]


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
