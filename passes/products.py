"""Products of rotations with weights: what folding a model spends its time on."""

import functools
from typing import Protocol

import torch

ONE_IN = 8
"""Of so many features, by falling energy, one has both halves."""


class Rotation(Protocol):
    """A matrix R [features, in]. What is written into `out` is rounded to its dtype once."""

    def before(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """`out = R W`; weight [in, columns], out [features, columns]."""

    def after(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """`out = W Rᵀ`; weight [rows, in], out [rows, features]."""


def rotation_for(matrix: torch.Tensor, weight: torch.dtype, out: torch.dtype) -> Rotation:
    """How a matrix [features, in], features by falling energy, is best multiplied with weights of a dtype."""
    if weight == out == torch.bfloat16 and matrix.device.type == "cpu" and _multiplies_bfloat16():
        return _InHalves(matrix)
    return _Whole(matrix)


class _Whole:
    """In the precision that the matrix has."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    def before(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        out[:] = self._matrix @ weight.to(self._matrix.dtype)

    def after(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        out[:] = weight.to(self._matrix.dtype) @ self._matrix.T


class _InHalves:
    """In bfloat16, which takes a fraction of the time of float32.

    `R = H + L`, each part rounded to bfloat16, keeps 16 bits of R's 24. `H W + L W` is then a product of bfloat16
    numbers: exact term by term, summed in float32, and rounded to 8 bits at its end. `L` takes as long as `H`, and
    without it a folded weight errs √2 times as much as by its own rounding. That could count where the energy is, so
    only the leading features have it.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self._leading = -(-len(matrix) // ONE_IN)
        upper = matrix.bfloat16()
        first, self._rest = upper.split([self._leading, len(matrix) - self._leading])
        self._both = _side_by_side(first, (matrix[: self._leading] - first.float()).bfloat16(), 1)

    def before(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        out[: self._leading] = self._both @ _side_by_side(weight, weight, 0)
        out[self._leading :] = self._rest @ weight

    def after(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        out[:, : self._leading] = _side_by_side(weight, weight, 1) @ self._both.T
        out[:, self._leading :] = weight @ self._rest.T


def _side_by_side(first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
    """Transposed views are copied in the order that they have in memory, which is several times as fast."""
    if first.stride(0) == 1:
        return torch.cat([first.T, second.T], 1 - dim).T
    return torch.cat([first, second], dim)


@functools.cache
def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
